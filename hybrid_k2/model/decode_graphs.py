"""Decode steps as graphs: what a step launches is recorded once for each size of batch, and then launched as one.

A layer of a decode step is some 30 small launches, and each costs the host some microseconds. A graph repeats launches
that were recorded: the same kernels in the same order, with the same numbers among their arguments and on the same
memory. So everything that differs from step to step lies in memory that stays (`DecodeInputs`), and a batch is filled
up to the next size that there is a graph for. Rows that fill it up change no other row: they write nothing to the
cache, the host computes no experts for them, and they are not counted.

The first step of each size is launched operation by operation: kernels are compiled and libraries take their memory
then, which cannot be recorded. Before the second one, the step is recorded. The second is launched both ways, and only
if both give the same bits is the graph used from then on: what went into it by mistake is of the step before. The graph
goes first, for it would find what the other way had already written to the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from hybrid_k2.accelerator import Accelerator, Handoff, Label
from hybrid_k2.config import ModelConfig
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.decode_inputs import DecodeInputs, Moves
from hybrid_k2.model.devices import upload
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.rope import Rotation
from hybrid_k2.model.schedule import Half, Operation
from hybrid_k2.placement import Plan
from hybrid_k2.placement.overheads import GRAPH_ROWS

log = logging.getLogger("hybrid_k2")

Program = Callable[[Sequence[Half]], Iterator[Operation]]  # takes halves that have begun through all layers, to logits
Rows = Callable[[Batch], tuple[Tensor, Rotation]]  # the rows of a batch, and their rotation on the host


@dataclass(frozen=True)
class Form:
    """Say what a step looks like that takes all batches of up to `size` rows: in one part, or two equal halves."""

    size: int
    parts: int

    @classmethod
    def of(cls, count: int, *, two_halves: bool) -> Form:
        """Return the smallest form for so many rows."""
        size = next(size for size in GRAPH_ROWS if size >= count)
        return cls(size, 2 if two_halves and size > 1 else 1)

    @property
    def halves(self) -> list[slice]:
        """The rows of each part."""
        rows = self.size // self.parts
        return [slice(first, first + rows) for first in range(0, self.size, rows)]

    def moves(self, count: int) -> Moves:
        """Say which rows of a batch go where: as many to each part, one more to the first if they are odd."""
        edges = [-(-count * part // self.parts) for part in range(self.parts + 1)]
        starts = [half.start for half in self.halves]
        return [(slice(a, b), slice(at, at + b - a)) for at, a, b in zip(starts, edges[:-1], edges[1:], strict=True)]


@dataclass
class Graph:
    """Hold a recorded step; it is `trusted` once it gave what launching gave."""

    launch: Callable[[], None]
    trusted: bool = False
    same: Tensor | None = None  # what the comparison gave, on the device

    def compare(self, result: Tensor, expected: Tensor) -> None:
        """Compare bits, without waiting for the device."""
        self.same = (result.view(torch.int32) == expected.view(torch.int32)).all()

    def differs(self) -> bool:
        """Say whether the comparison, if there was one, found a difference; waits for it once."""
        if self.same is not None and not self.trusted:
            self.trusted = bool(self.same)
        return self.same is not None and not self.trusted


class DecodeGraphs:
    """Run decode steps, from the third one of each size on as one launch; for one cache at a time.

    Memory: `DecodeInputs`, logits of the largest size, and of each graph what the plan counts (placement/overheads.py).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        handoff: Handoff,
        config: ModelConfig,
        dtype: torch.dtype,
        rows: Rows,
        program: Program,
    ) -> None:
        self._accelerator = accelerator
        self._handoff = handoff
        self._config = config
        self._dtype = dtype
        self._rows = rows
        self._program = program
        self._cache: ReferenceType[LatentCache] | None = None
        self._inputs: DecodeInputs
        self._logits: Tensor  # [rows, vocab]
        self._graphs: dict[Form, Graph | None] = {}  # None: launched once, not yet recorded
        self._refused = False

    def fits(self, batch: Batch) -> bool:
        """Say whether the batch is a decode step that there can be a graph for."""
        return not self._refused and len(batch.sequences) == len(batch.token_ids) <= GRAPH_ROWS[-1]

    def forget(self) -> None:
        """Begin anew, after a step that failed: what it compared is void."""
        self._graphs.clear()

    def operations(self, batch: Batch, cache: LatentCache, logits: Tensor, *, two_halves: bool) -> Iterator[Operation]:
        """List a step of a batch that `fits`; each operation must have been enqueued before the next one is asked for.

        To be called when the step before has ended.
        Shapes: logits [R, vocab] fp32, gets the result.
        """
        self._remember(cache)
        form = Form.of(len(batch.token_ids), two_halves=two_halves)
        moves = form.moves(len(batch.token_ids))
        graph = self._graph(cache, form)
        if self._refused:
            yield self._handoff.reset, Label("reset")  # of what was posted while it was recorded
        yield partial(self._begin, batch, moves), Label("embed")
        with self._accelerator.allocating():
            result = logits if graph is None or graph.trusted else torch.empty_like(logits)
        if graph is not None:
            yield graph.launch, Label("graph")
            yield partial(self._end, batch, moves, result), Label("logits")
        if graph is None or not graph.trusted:
            yield from self._step(cache, form)
            yield partial(self._end, batch, moves, logits), Label("logits")
        if graph is not None and not graph.trusted and len(logits):  # none of this step may be wanted
            yield partial(graph.compare, result, logits), Label("compare")

    def _remember(self, cache: LatentCache) -> None:
        """Forget the graphs of another cache: they read and write its memory."""
        if self._cache is not None and self._cache() is cache:
            return
        self._graphs.clear()
        device, rows = self._accelerator.device, GRAPH_ROWS[-1]
        with self._accelerator.allocating():
            self._inputs = DecodeInputs(rows, self._config, self._dtype, cache, device)
            self._logits = torch.zeros(rows, self._config.vocab_size, device=device)
        self._cache = ref(cache)

    def _begin(self, batch: Batch, moves: Moves) -> None:
        self._inputs.fill(batch, *self._rows(batch), moves)

    def _step(self, cache: LatentCache, form: Form) -> Iterator[Operation]:
        begun = []
        for slot, rows in enumerate(form.halves):
            half = Half(slot, self._inputs.batch(rows), cache, self._handoff, self._logits[rows])
            yield partial(half.start, *self._inputs.stream(rows)), Label("start", half=slot)
            begun.append(half)
        yield from self._program(begun)

    def _graph(self, cache: LatentCache, form: Form) -> Graph | None:
        """Return the graph of a step; None for the first step of its form, and where there can be none."""
        if form not in self._graphs:
            self._graphs[form] = None
            return None
        graph = self._graphs[form] = self._graphs[form] or self._record(cache, form)
        if graph is not None and graph.differs():
            self._refuse("a recorded one computed something else")
            return None
        return graph

    def _record(self, cache: LatentCache, form: Form) -> Graph | None:
        """Record a step; None if that fails, which it will then for every other one."""

        def launch() -> None:
            for op, _ in self._step(cache, form):
                op()

        try:
            return Graph(self._accelerator.capture(launch))
        except RuntimeError as error:  # torch's
            self._refuse(f"they cannot be recorded: {error}")
            return None

    def _refuse(self, why: str) -> None:
        log.warning("graphs: decode steps are launched operation by operation: %s", why)
        self._refused = True
        self._graphs.clear()

    def _end(self, batch: Batch, moves: Moves, logits: Tensor) -> None:
        """Pick the wanted rows."""
        places = torch.cat([torch.arange(here.start, here.stop) for _, here in moves])  # [T]
        logits.copy_(self._logits[upload(places[batch.logit_rows], self._logits.device)])


def why_not(plan: Plan, accelerator: Accelerator, handoff: Handoff, layers: Sequence[Layer]) -> str | None:
    """Say why a model's decode steps cannot be graphs; None: they can."""
    if not plan.graphs:
        return "the plan has none"
    if not accelerator.captures:
        return f"{accelerator.name} cannot record what it launches"
    if not handoff.replays:
        return "the hand-off to the experts is no kernel"
    if any(layer.attention.gpu is None for layer in layers):
        return "torch computes attention, whose operations depend on the length of each sequence"
    return None
