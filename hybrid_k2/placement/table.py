"""The plan as aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hybrid_k2.placement.budget import find_budget
from hybrid_k2.placement.memories import HOST, memory_of
from hybrid_k2.placement.sizes import format_bytes

if TYPE_CHECKING:
    from hybrid_k2.placement.plan import Plan

_HEAD = ("group", "layers", "device", "dtype", "size", "budget")
_RIGHT = (4, 5)  # the columns with numbers
_HOST_READ = 100e9  # bytes per second


def format_table(plan: Plan) -> str:
    """Write rows, totals per device and notes."""
    title = f"{plan.config.model_type}, {plan.config.num_hidden_layers} layers, by {plan.rules.source}"
    return "\n".join([title, "", *_align([_HEAD, *_rows(plan)]), "", *_summary(plan)])


def _rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    budgets = {memory: find_budget(memory, plan.rules, plan.machine).nbytes for memory in plan.devices}
    cache = plan.kv_cache
    lines = [(row.name, row.layer_text, row.device, row.dtype, row.nbytes) for row in plan.rows]
    lines.append(("kv_cache", "", cache.device, cache.dtype, cache.nbytes))
    lines += [(one.what, "", one.device, "", one.nbytes) for one in plan.overheads]
    for what, layers, device, dtype, nbytes in lines:
        yield (
            what,
            layers or "-",
            device,
            dtype or "-",
            format_bytes(nbytes),
            _share(nbytes, budgets[memory_of(device)]),
        )


def _summary(plan: Plan) -> Iterator[str]:
    for device in plan.devices:
        budget = find_budget(device, plan.rules, plan.machine)
        needed = plan.bytes_on(device)
        yield f"{device}: {format_bytes(needed)} of {format_bytes(budget.nbytes)} ({budget.origin})"
    yield f"kv cache: {plan.kv_cache.tokens} tokens in pages of {plan.kv_cache.page_tokens}"
    threads = _count_threads(plan.threads)
    if len(plan.nodes) > 1:
        kind = "NUMA" if plan.nodes[0].node is not None else "virtual"
        threads += f" on {len(plan.nodes)} {kind} nodes"
    yield f"experts: {plan.numerics}, {threads}; activations {plan.activation_dtype}"
    if plan.accelerator is not None:
        own = f"{_count_threads(plan.twin_threads)}; " if plan.twin_threads else ""
        late = f"; {plan.deferred} of {plan.config.num_experts_per_tok} experts deferred" if plan.deferred else ""
        graphs = "; decode steps as graphs" if plan.graphs else ""
        yield f"{plan.accelerator}: {own}overlap {plan.overlap}{late}{graphs}"
    yield f"prefill: chunks of {plan.chunk_tokens} tokens{'; heavy experts streamed' if plan.stream != 'off' else ''}"
    read = {device: plan.bytes_per_token_on(device) for device in plan.devices}
    parts = ", ".join(f"{format_bytes(nbytes)} on {device}" for device, nbytes in read.items() if nbytes)
    yield f"weights read per decoded token: {parts}"
    yield _host_limit(plan, read[HOST])
    yield from (f"note: {note}" for note in plan.notes)


def _host_limit(plan: Plan, nbytes: int) -> str:
    """What memory allows; only a measurement tells its bandwidth, and a plan may be one for another machine."""
    speed = format(_HOST_READ / nbytes, ",.1f")
    more = ", more where hot experts are chosen" if any(row.hottest for row in plan.rows) else ""
    return f"one sequence: at most {speed} tokens/s for each 100 GB/s of host memory{more}"


def _count_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _align(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = (
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"
