"""Train one model in shared memory with several processes, each with its own batch and one thread.

Small matrices gain little from more threads; two processes with one thread each do half as much again as one with
two. Each process adds up its own gradients; then each updates its share of the parameters from the mean of all.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import Batch
from .model import Model
from .optim import adam, is_matrix, muon_step

BIAS_STEP = 0.002


@dataclass
class Counters:
    """Count what a run has done."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    learnt: int = 0
    loss: float = 0.0


@dataclass
class Shared:
    """Hold what all processes see: parameters, gradients, momenta, counts, and a meeting point."""

    model: Model
    workers: int
    barrier: Any
    grads: list[list[Tensor]]
    momenta: list[Tensor]
    counts: Tensor  # [workers, 3]: tokens, learnt tokens and loss of the last step
    picks: Tensor  # [workers, layers, experts]
    fraction: Tensor  # of the run, set by the first process

    @classmethod
    def create(cls, model: Model, workers: int, barrier: Any) -> Shared:
        """Allocate the shared state on the model's device."""
        parameters = list(model.parameters())
        moes = model.mixtures()
        shared = cls(
            model,
            workers,
            barrier,
            [[torch.zeros_like(p, requires_grad=False) for p in parameters] for _ in range(workers)],
            [torch.zeros_like(p, requires_grad=False) for p in parameters],
            torch.zeros(workers, 3, dtype=torch.float64),
            torch.zeros(workers, len(moes), model.shape.n_routed_experts),
            torch.zeros(1, dtype=torch.float64),
        )
        if workers > 1:
            model.share_memory()
            for t in (
                *shared.momenta,
                *(g for own in shared.grads for g in own),
                shared.counts,
                shared.picks,
                shared.fraction,
            ):
                t.share_memory_()
        return shared


@dataclass
class Worker:
    """Do one process's part of each step."""

    shared: Shared
    rank: int
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        named = list(self.shared.model.named_parameters())
        self.parameters = [p for _, p in named]
        matrices = [i for i, (name, p) in enumerate(named) if is_matrix(name, p)]
        matrices.sort(key=lambda i: -self.parameters[i].numel())
        self.matrices = matrices[self.rank :: self.shared.workers]
        # The rest is small: the first process updates it all.
        self.others = [i for i, (name, p) in enumerate(named) if not is_matrix(name, p)]
        self.adam = adam([self.parameters[i] for i in self.others])

    def step(self, batch: Batch, rate: float, fraction: float) -> None:
        """Take one step together with the other processes, at this learning rate and fraction of the run."""
        own = self.shared.grads[self.rank]
        for p, grad in zip(self.parameters, own, strict=True):
            p.grad = grad.zero_()
        self.backward(batch)
        self.shared.barrier.wait()
        self.update(rate)
        if self.rank == 0:
            self.steer(BIAS_STEP * (1 - fraction))
        self.count()
        self.shared.barrier.wait()

    def backward(self, batch: Batch) -> None:
        """Compute this process's gradients and counts."""
        model, device = self.shared.model, self.shared.model.embed_tokens.device.type
        ids, positions, mask, learnt = batch.tensors(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            hidden = model(ids, positions, mask)
            logits = model.logits(hidden[:, :-1][learnt])
            loss = functional.cross_entropy(logits.float(), ids[:, 1:][learnt])
        loss.backward()
        used = float((batch.document >= 0).sum())
        self.shared.counts[self.rank] = torch.tensor([used, float(learnt.sum()), loss.item()])
        for layer, moe in enumerate(model.mixtures()):
            self.shared.picks[self.rank, layer] = moe.picks

    def mean_grad(self, index: int) -> Tensor:
        """Average the gradients of all processes for one parameter."""
        return sum(own[index] for own in self.shared.grads) / self.shared.workers  # type: ignore[return-value]

    def update(self, rate: float) -> None:
        """Update this process's share of the parameters."""
        for i in self.matrices:
            muon_step(self.parameters[i], self.mean_grad(i), self.shared.momenta[i], rate)
        if self.rank == 0:
            for i in self.others:
                self.parameters[i].grad = self.mean_grad(i)
            nn.utils.clip_grad_norm_([self.parameters[i] for i in self.others], 1.0)
            self.adam.param_groups[0]["lr"] = rate
            self.adam.step()

    def steer(self, size: float) -> None:
        """Move the correction bias of each expert against its share of the tokens."""
        for moe, picks in zip(self.shared.model.mixtures(), self.shared.picks.sum(0), strict=True):
            moe.bias += size * torch.sign(picks.mean() - picks).to(moe.bias.device)

    def count(self) -> None:
        """Add up the counts of the step."""
        tokens, learnt, loss = self.shared.counts.sum(0).tolist()
        c, loss = self.counters, loss / self.shared.workers
        c.loss = loss if c.step == 0 else 0.95 * c.loss + 0.05 * loss
        c.step += 1
        c.tokens += int(tokens)
        c.learnt += int(learnt)

    def save(self, path: Path) -> None:
        """Write the state in one move, so that a reader never sees half of it."""
        state = {
            "model": self.shared.model.state_dict(),
            "momenta": self.shared.momenta,
            "adam": self.adam.state_dict(),
            "counters": vars(self.counters),
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Take up a saved state."""
        state = torch.load(path, map_location="cpu")
        self.counters = Counters(**state["counters"])
        self.adam.load_state_dict(state["adam"])
        if self.rank == 0:
            self.shared.model.load_state_dict(state["model"])
            for momentum, saved in zip(self.shared.momenta, state["momenta"], strict=True):
                momentum.copy_(saved)
        self.shared.barrier.wait()


def lone_barrier() -> threading.Barrier:
    """Return the meeting point of a single process."""
    return threading.Barrier(1)
