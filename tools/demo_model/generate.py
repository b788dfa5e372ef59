"""Answer many prompts at once with the training model, greedily; scoring needs nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Model


@torch.no_grad()
def generate(model: Model, prompts: list[list[int]], stop: int, limit: int = 320) -> list[list[int]]:
    """Return the ids that follow each prompt, up to and without the stop token."""
    longest = max(map(len, prompts))
    rows = len(prompts)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    shift = torch.tensor([longest - len(p) for p in prompts])[:, None]
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
    place = torch.arange(longest)[None]
    seen, positions = place >= shift, (place - shift).clamp_min(0)
    caches: list[dict[str, Tensor]] = [{} for _ in model.layers]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    # A padded position looks at itself, so that no row of the softmax is empty.
    mask = (seen[:, None, None, :] & causal) | torch.eye(longest, dtype=torch.bool)
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * rows
    for _ in range(limit):
        hidden = model(ids, positions, mask, caches)[:, -1]
        ids = model.logits(hidden).argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token == stop
            if not done[row]:
                out[row].append(token)
        if all(done):
            break
        positions = positions[:, -1:] + 1
        seen = torch.cat([seen, torch.ones(rows, 1, dtype=torch.bool)], 1)
        mask = seen[:, None, None, :]
    return out
