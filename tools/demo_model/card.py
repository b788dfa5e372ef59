"""Write the model card and the scores that lie beside the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .export import load
from .model import Shape
from .parallel import Counters

CARD = """# K2 Tiny, the demo model of hybrid-k2

K2 Tiny is a toy that shows the engine at work. It has the architecture and the file format of Kimi K2.6 (multi-head
latent attention, a dense first layer, sigmoid router with correction bias, INT4 routed experts, a shared expert,
tiktoken vocabulary, the same control tokens and chat layout), at about a hundred-thousandth of the size.

**It is not Kimi K2.6, contains none of its weights, and says nothing about its quality.** It was trained on
made-up dialogues only; the grammar that makes them is in `tools/demo_model/`.

It can greet, say who it is, answer questions about hybrid-k2 and its commands and some about Kimi K2.6, do small sums
with written steps, name capitals and opposites, tell very short stories and poems, give a few recipes and code
snippets, remember a name over some turns, call tools that are offered and answer from their results, say a little in
Chinese, and decline the rest. It knows nothing else, is easily confused by wording that it has not met, makes
mistakes, and reads text only. Do not use it for anything but trying out the engine.

| | |
| --- | --- |
| parameters | {parameters:.1f} million, {active:.1f} million of them used for each token |
| layers | {layers}, the first one dense; {experts} routed experts, {used} for each token, and a shared one |
| trained | {tokens:.1f} million tokens ({learnt:.1f} million learnt to write), {steps} steps, {minutes:.0f} minutes |
| machine | {machine} |
| seed | {seed} |
| started from | {origin} |
| recipe | `{command}` |

## Scores

Share of right answers, greedy, from the files in this folder, on {count} fresh prompts for each skill and mode.
Numbers, words, names and tools are drawn anew; closed sets such as facts and capitals were all met in training, in
other wordings of politeness, case, punctuation and typing errors. Answers must be exactly right, except for stories and
lists, which are judged by their form, and refusals, by their opening.

| skill | thinking | instant |
| --- | --- | --- |
{rows}

Tool calls without an offered tool: {stray} in {alone} prompts.
"""


@dataclass(frozen=True)
class Run:
    """Say how a checkpoint was made."""

    seed: int
    machine: str
    origin: str  # what the weights were before
    command: str


def active_parameters(shape: Shape) -> int:
    """Count the parameters that one token uses, the embedding table left out."""
    heads = shape.num_attention_heads
    attention = (
        shape.hidden_size * (shape.q_lora_rank + shape.kv_lora_rank + shape.qk_rope_head_dim)
        + shape.q_lora_rank * heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        + shape.kv_lora_rank * heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        + heads * shape.v_head_dim * shape.hidden_size
    )
    experts = shape.num_experts_per_tok + shape.n_shared_experts
    mixture = 3 * shape.hidden_size * shape.moe_intermediate_size * experts + shape.hidden_size * shape.n_routed_experts
    dense = 3 * shape.hidden_size * shape.intermediate_size
    mixtures = shape.num_hidden_layers - shape.first_k_dense_replace
    layers = shape.num_hidden_layers * attention + shape.first_k_dense_replace * dense + mixtures * mixture
    return layers + shape.vocab_size * shape.hidden_size


def write_card(folder: Path, scores: dict[str, Any], counters: Counters, run: Run) -> None:
    """Write README.md and scores.json into the checkpoint folder."""
    model = load(folder)
    training = {
        "tokens": counters.tokens,
        "learnt_tokens": counters.learnt,
        "steps": counters.step,
        "minutes": round(counters.seconds / 60, 1),
        **asdict(run),
    }
    (folder / "scores.json").write_text(json.dumps({"training": training, "scores": scores}, indent=2) + "\n")
    rows = [f"| {skill} | {row['thinking']:.1%} | {row['instant']:.1%} |" for skill, row in scores["skills"].items()]
    text = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        active=active_parameters(model.shape) / 1e6,
        layers=model.shape.num_hidden_layers,
        experts=model.shape.n_routed_experts,
        used=model.shape.num_experts_per_tok,
        tokens=counters.tokens / 1e6,
        learnt=counters.learnt / 1e6,
        steps=counters.step,
        minutes=counters.seconds / 60,
        machine=run.machine,
        seed=run.seed,
        origin=run.origin,
        command=run.command,
        count=scores["prompts_per_skill_and_mode"],
        rows="\n".join(rows),
        stray=scores["stray_tool_calls"],
        alone=scores["prompts_without_tools"],
    )
    (folder / "README.md").write_text(text)
