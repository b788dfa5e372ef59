"""Score an exported checkpoint on fresh prompts of every skill."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import torch

from .cases import Case, Reply, cases
from .export import load
from .generate import generate
from .template import render_prompt
from .tokenizer import Tokenizer

ROWS = 48  # prompts answered at once
_CALL = re.compile(r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>", re.S)


def parse(text: str, thinking: bool) -> Reply:
    """Take a decoded reply apart."""
    thought, mark, rest = text.partition("</think>") if thinking else ("", "", text)
    if thinking and not mark:
        thought, rest = "", text
    answer, _, section = rest.partition("<|tool_calls_section_begin|>")
    return Reply(answer, _CALL.findall(section), thought)


def answer(folder: Path, asked: list[Case]) -> list[Reply]:
    """Answer all cases, those of like length together."""
    model, tokenizer = load(folder), Tokenizer(folder / "tiktoken.model")
    prompts = [tokenizer.encode(render_prompt(c.messages, c.tools, c.thinking))[0] for c in asked]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    replies: dict[int, Reply] = {}
    for start in range(0, len(order), ROWS):
        chunk = order[start : start + ROWS]
        outputs = generate(model, [prompts[i] for i in chunk], tokenizer.special["<|im_end|>"])
        for i, ids in zip(chunk, outputs, strict=True):
            replies[i] = parse(tokenizer.decode(ids), asked[i].thinking)
    return [replies[i] for i in range(len(asked))]


def summarise(asked: list[Case], replies: list[Reply]) -> dict[str, dict[str, float]]:
    """Return the share of right replies of each skill in each mode, and the means."""
    marks: defaultdict[str, defaultdict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for case, reply in zip(asked, replies, strict=True):
        marks[case.skill]["thinking" if case.thinking else "instant"].append(case.judge(reply))
    table = {skill: {mode: sum(m) / len(m) for mode, m in modes.items()} for skill, modes in marks.items()}
    modes = sorted({mode for row in table.values() for mode in row})
    table["mean"] = {mode: sum(row[mode] for row in table.values()) / len(table) for mode in modes}
    return table


def stray_calls(asked: list[Case], replies: list[Reply]) -> tuple[int, int]:
    """Count replies that call a tool though none was offered, and the prompts without tools."""
    alone = [reply for case, reply in zip(asked, replies, strict=True) if not case.tools]
    return sum(bool(r.calls) or "<|tool_call" in r.text for r in alone), len(alone)


def score(folder: Path, seed: int, count: int, failures: bool = False) -> dict[str, object]:
    """Score the checkpoint, printing wrong answers if wanted."""
    asked = [case for thinking in (True, False) for case in cases(seed, count, thinking)]
    replies = answer(folder, asked)
    if failures:
        for case, reply in zip(asked, replies, strict=True):
            if not case.judge(reply):
                print(
                    f"[{case.skill}, {'thinking' if case.thinking else 'instant'}] {case.messages[-1]['content']!r}\n  "
                    f"{reply}"
                )
    stray, alone = stray_calls(asked, replies)
    return {
        "seed": seed,
        "prompts_per_skill_and_mode": count,
        "skills": summarise(asked, replies),
        "stray_tool_calls": stray,
        "prompts_without_tools": alone,
    }


def show(scores: dict[str, object]) -> None:
    """Print the table."""
    skills: dict[str, dict[str, float]] = scores["skills"]  # type: ignore[assignment]
    for skill, row in skills.items():
        print(f"{skill:18} " + "  ".join(f"{mode} {share:6.1%}" for mode, share in sorted(row.items(), reverse=True)))
    print(f"stray tool calls   {scores['stray_tool_calls']} of {scores['prompts_without_tools']}")


def main() -> None:
    """Read the command line and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--failures", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    show(score(args.folder, args.seed, args.count, args.failures))


if __name__ == "__main__":
    main()
