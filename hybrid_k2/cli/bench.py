"""The command `bench`: measurements of this machine, each beside its limit."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any

import typer

from hybrid_k2.cli.exits import ends_cleanly
from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.options import trace_file
from hybrid_k2.cli.terminal import Nowhere, Output

MOST_TOKENS = 65536
MOST_PROMPT = 1 << 29
NUMERICS = ("exact", "fast", "bf16")

app = typer.Typer(help="Measure this machine, each figure beside its limit.", no_args_is_help=True)


def _number(text: str, least: int, most: int | None = None) -> Any:
    return typer.Option(metavar="N", help=text, min=least, max=most)


@app.callback()
def _bench() -> None:
    """Measure this machine, each figure beside its limit."""


@app.command()
@ends_cleanly
def experts(
    hidden: Annotated[int, _number("Width of the model, a multiple of 32.", 32, 65536)] = 7168,
    intermediate: Annotated[int, _number("Width of an expert, a multiple of 32.", 32, 65536)] = 2048,
    experts: Annotated[int, _number("Experts of the layer; K2.6 has 384 (9.5 GB).", 1, 4096)] = 64,
    top_k: Annotated[int, _number("Experts of each token.", 1)] = 8,
    tokens: Annotated[str, typer.Option(metavar="N,N,…", help="Tokens of a batch.")] = "1,4,16,64",
    threads: Annotated[int | None, _number("Left out: one for each core at hand.", 1, 4096)] = None,
    numerics: Annotated[str, typer.Option(metavar="NAME,…", help="exact, fast, bf16.")] = "exact",
    isa: Annotated[str | None, typer.Option(metavar="NAME", help="Instruction set (left out: the best).")] = None,
    rounds: Annotated[int, _number("Measurements of each case.", 1, 10000)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.")] = False,
) -> None:
    """Time one MoE layer of random INT4 experts against the memory's bandwidth and the instructions' peak."""
    counts = _positive_numbers(tokens, "--tokens")
    names = _names(numerics)
    for option, value in (("--hidden", hidden), ("--intermediate", intermediate)):
        if value % 32:
            raise typer.BadParameter(f"expected a multiple of 32, got {value}", param_hint=option)
    if top_k > experts:
        raise typer.BadParameter(
            f"expected at most the {experts} experts of the layer, got {top_k}", param_hint="--top-k"
        )

    with leaving_at_once():
        from hybrid_k2.bench.experts import measure_experts, memory_bytes
        from hybrid_k2.errors import MemoryBudgetError
        from hybrid_k2.experts import ExpertsShape
        from hybrid_k2.experts.read_probe import probe_bytes
        from hybrid_k2.host.threads import spread_threads
        from hybrid_k2.placement import Machine
        from hybrid_k2.placement.sizes import format_bytes

    machine = Machine.probe()
    threads = threads or machine.cores
    probe_bytes(threads)  # before anything is loaded
    shape = ExpertsShape(hidden, intermediate, experts, top_k)
    needed = memory_bytes(shape, max(counts))
    if needed > machine.host_available_bytes:
        raise MemoryBudgetError(
            f"bench experts: expected {format_bytes(needed)} of memory for {experts} experts and {max(counts)} tokens, "
            f"got {format_bytes(machine.host_available_bytes)} available",
            hint="ask for fewer --experts or --tokens",
        )
    notes = Output(Nowhere() if quiet else sys.stderr)
    nodes = spread_threads(threads, machine.core_cpus, machine.nodes, own=not machine.cpu_quota)
    try:
        report = measure_experts(
            shape, counts, names, isa, nodes, rounds=rounds, progress=lambda text: notes.line(text, "dim")
        )
    except MemoryError as error:
        raise MemoryBudgetError(
            f"bench experts: expected {format_bytes(needed)} of memory, got none left ({error})",
            hint="another program or a limit takes it; ask for fewer --experts or --tokens",
        ) from error
    out = Output(sys.stdout)
    out.line(json.dumps(report.to_json()) if as_json else report.table())


@app.command()
@ends_cleanly
def overlap(
    device: Annotated[
        str, typer.Option(metavar="twin|cuda", help="A thread in the place of a GPU, or a GPU.")
    ] = "twin",
    sequences: Annotated[int, _number("Sequences that decode together.", 1, 1024)] = 2,
    scale: Annotated[int, typer.Option(metavar="N", help="Divide the widths of K2.6 by 1, 2, 4 or 8.")] = 4,
    layers: Annotated[int, _number("Layers, the first one dense.", 2, 61)] = 7,
    experts: Annotated[int, _number("Experts of a layer.", 8, 384)] = 16,
    context: Annotated[int, _number("Tokens before the first step.", 1, 200000)] = 256,
    steps: Annotated[int, _number("Steps that are measured.", 1, 10000)] = 12,
    hot: Annotated[int, _number("Experts of a layer that the device computes.", 0, 384)] = 0,
    graphs: Annotated[bool, typer.Option("--graphs", help="Measure steps as CUDA graphs, too.")] = False,
    deferred: Annotated[int, _number("Experts of a token that act one layer late.", 0, 7)] = 0,
    trace: Annotated[str | None, typer.Option(metavar="FILE", help="Write the steps for Chrome or Perfetto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.")] = False,
) -> None:
    """Decode a slice of a model with random weights, attention on the device and experts on the host beside it."""
    if device not in ("twin", "cuda"):
        raise typer.BadParameter(f"expected twin or cuda, got {device!r}", param_hint="--device")
    if scale not in (1, 2, 4, 8):
        raise typer.BadParameter(f"expected 1, 2, 4 or 8, got {scale}", param_hint="--scale")
    if hot > experts:
        raise typer.BadParameter(f"expected at most the {experts} experts of a layer, got {hot}", param_hint="--hot")
    trace_to = trace_file(trace)

    with leaving_at_once():
        from hybrid_k2.bench.overlap import check_tokens, measure_overlap
        from hybrid_k2.errors import ConfigError

    try:
        check_tokens(sequences, context, steps)
    except ConfigError as error:
        raise typer.BadParameter(error.message, param_hint="--sequences, --context, --steps") from error
    notes = Output(Nowhere() if quiet else sys.stderr)
    report = measure_overlap(
        device,
        sequences,
        scale=scale,
        layers=layers,
        experts=experts,
        context=context,
        steps=steps,
        hot=hot,
        graphs=graphs,
        deferred=deferred,
        trace_to=trace_to,
        progress=lambda text: notes.line(text, "dim"),
    )
    out = Output(sys.stdout)
    out.line(json.dumps(report.to_json()) if as_json else report.table())


@app.command()
@ends_cleanly
def model(
    model: Annotated[
        str, typer.Argument(metavar="PATH_OR_REPO_ID", help="A checkpoint folder, a repository, or demo.")
    ] = "demo",
    rules: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Placement rules (left out: chosen for the machine).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Tokens of prompts (left out: 512,4096, if they fit).")
    ] = None,
    sequences: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Sequences that decode at once (left out: 1,4,16, if they fit).")
    ] = None,
    depth: Annotated[int | None, _number("Tokens before those that are decoded (left out: 512).", 1, 1 << 30)] = None,
    tokens: Annotated[int, _number("Tokens that each sequence decodes.", 1, MOST_TOKENS)] = 32,
    repeat: Annotated[int, _number("Measurements of each case.", 1, 10000)] = 3,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.")] = False,
) -> None:
    """Load a checkpoint as a chat does, and time prompts and decoding against the host's limits."""
    prompts = None if prompt is None else _positive_numbers(prompt, "--prompt", MOST_PROMPT)
    counts = None if sequences is None else _positive_numbers(sequences, "--sequences")
    if rules is not None and not rules.strip():
        raise typer.BadParameter("expected a rule file or a name, got an empty text", param_hint="--rules")

    with leaving_at_once():
        from hybrid_k2.bench.model import choose_cases, measure_model
        from hybrid_k2.cli.loading import load_engine
        from hybrid_k2.placement import Plan

    def check(plan: Plan) -> None:
        choose_cases(plan, prompts, counts, depth, tokens)

    notes = Output(Nowhere() if quiet else sys.stderr)
    with load_engine(model, rules, notes, check=check) as engine:
        cases = choose_cases(engine.plan, prompts, counts, depth, tokens)
        report = measure_model(
            engine, model, cases, rounds=repeat, seed=seed, progress=lambda text: notes.line(text, "dim")
        )
    out = Output(sys.stdout)
    out.line(json.dumps(report.to_json()) if as_json else report.table())


def _positive_numbers(text: str, option: str, most: int = MOST_TOKENS) -> list[int]:
    """Read `1,4,16`. Raises: typer.BadParameter."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) and 0 < int(part) <= most for part in parts):
        raise typer.BadParameter(f"expected numbers 1..{most} with commas, got {text!r}", param_hint=option)
    return [int(part) for part in parts]


def _names(text: str) -> list[str]:
    """Read `exact,fast`. Raises: typer.BadParameter."""
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in NUMERICS]:
        raise typer.BadParameter(f"expected {', '.join(NUMERICS)}, got {unknown[0]!r}", param_hint="--numerics")
    return list(dict.fromkeys(names))
