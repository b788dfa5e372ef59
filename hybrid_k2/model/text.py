"""The text model: embedding, layers of attention and MLP around a residual stream, norm, lm_head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from hybrid_k2.accelerator import Accelerator, Handoff, Label, TimeLimit, Trace
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError, RequestError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.usage import ExpertUse, LayerUsage
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.decode_graphs import DecodeGraphs
from hybrid_k2.model.host_layer import FEW_ROWS
from hybrid_k2.model.hot_set import HotSet
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.layers import Matrix, RmsNorm
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.prefill_split import LEAST_TOKENS, PrefillSplit
from hybrid_k2.model.rope import Rope, Rotation
from hybrid_k2.model.schedule import Half, Operation, embedded, through_layers

# What no machine that can run the model at all exceeds. The experts of a layer of K2.6 take 0.7 * 10^9 operations for a
# token: 0.25 s of a single core without vector units. The start is for pages that must come back from swap.
EXPERTS_LIMIT = TimeLimit(120.0, 0.25)
OPERATION_LIMIT = TimeLimit(240.0, 0.5)  # of any operation: more, so that the hand-off says what it waited for


class TextModel:
    """Compute logits for batches of tokens; owns weights, threads, accelerator and hand-off until `close`.

    `ping_pong`: cut batches of several sequences into two halves that alternate. `deferred`: so many of each token's
    experts are added one layer late. `graphs`, where there are some, run decode steps.
    """

    graphs: DecodeGraphs | None

    def __init__(
        self,
        config: ModelConfig,
        activation_dtype: torch.dtype,
        embedding: Tensor,
        layers: Sequence[Layer],
        final_norm: RmsNorm,
        lm_head: Matrix,
        runtimes: Sequence[ExpertsRuntime],
        accelerator: Accelerator,
        handoff: Handoff,
        *,
        hot: HotSet | None = None,
        split: PrefillSplit | None = None,
        ping_pong: bool = False,
        deferred: int = 0,
        graphs: bool = False,
        limit: TimeLimit = OPERATION_LIMIT,
    ) -> None:
        """Take everything over; `runtimes`: that of the experts first, then any that the accelerator has for itself.

        `graphs`: decode steps can be recorded, and shall be.
        """
        self.config = config
        self.experts_runtime = runtimes[0]
        self.layers = list(layers)
        self.accelerator = accelerator
        self.handoff = handoff
        self.hot = hot
        self.split = split
        self._runtimes = list(runtimes)
        self.ping_pong = ping_pong
        self._deferred = deferred
        self._limit = limit
        self.activation_dtype = activation_dtype
        self.embedding = embedding
        self.final_norm = final_norm
        self.lm_head: Matrix = lm_head
        self._rope = Rope(config)
        self.graphs = (
            DecodeGraphs(accelerator, handoff, config, activation_dtype, self._rows, self._through) if graphs else None
        )
        self._failed = False  # the last step: something may be in flight
        self._closed = False

    @property
    def usage(self) -> dict[int, LayerUsage]:
        """The counters of chosen experts, by layer; empty where none are counted."""
        moe = {i: layer.mlp for i, layer in enumerate(self.layers) if isinstance(layer.mlp, Moe)}
        return {i: layer.usage for i, layer in moe.items() if layer.usage is not None}

    def expert_use(self) -> dict[int, ExpertUse]:
        """Return which experts are used, by layer; any thread may ask while steps run. Empty when closed."""
        moe = {i: layer.mlp for i, layer in enumerate(self.layers) if isinstance(layer.mlp, Moe)}
        return {
            i: ExpertUse(part.usage.counts(), sorted(part.hot.experts if part.hot is not None else ()))
            for i, part in moe.items()
            if part.usage is not None
        }

    @property
    def any_cut(self) -> bool:
        """Whether a token's latents have the same bits however its sequence is cut into chunks, in any company."""
        return all(layer.attention.any_cut and layer.mlp.any_batch for layer in self.layers)

    @property
    def trace(self) -> Trace | None:
        """Where the times of operations go."""
        return self.accelerator.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self.accelerator.trace = self.handoff.trace = trace
        if self.hot is not None:
            self.hot.trace = trace
        if self.split is not None:
            self.split.stream.trace = trace

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Run the batch through all layers and return the logits of its logit rows.

        Shapes: -> [R, vocab] fp32, on lm_head's device.
        Effects: the new tokens' latents are in the cache afterwards; the caller counts them. After an error or an
        interrupt the next call works, or says that it cannot.
        Raises: RequestError for a token outside the vocabulary; EngineError for too few pages, more tokens than the
        hand-off has room for, a closed model, or a part that did not answer in time.
        """
        self._check(batch, cache)
        # An ordinary tensor, written to in inference mode: callers may change it in place.
        with self.accelerator.allocating():
            logits = torch.empty(len(batch.logit_rows), self.config.vocab_size, device=self.lm_head.device)
        failed, self._failed = self._failed, True
        try:
            if failed:
                self.accelerator.enqueue(self.handoff.reset, Label("reset"))
                if self.graphs is not None:
                    self.graphs.forget()
            if self.hot is not None:
                for op, label in self.hot.between_steps(len(batch.token_ids)):
                    self.accelerator.enqueue(op, label)
            if self.graphs is not None and self.graphs.fits(batch):
                operations = self.graphs.operations(batch, cache, logits, two_halves=self.ping_pong)
            else:
                operations = self._operations(self._halves(batch, cache, logits))
            for op, label in operations:
                self.accelerator.enqueue(op, label)
            self.accelerator.synchronize(self._limit.of(len(batch.token_ids)))
        except BaseException:
            self.accelerator.abandon()
            raise
        self._failed = False
        return logits

    def close(self) -> None:
        """Release weights, experts and threads. Closing twice is fine; an interrupt is raised when all is released."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as left:  # whatever one of them raises, the others are closed; from the last to the first
            left.callback(self._forget_weights)
            for runtime in self._runtimes:
                left.callback(runtime.close)
            for layer in self.layers:
                if isinstance(layer.mlp, Moe):
                    left.callback(layer.mlp.experts.close)
                    if layer.mlp.hot is not None:
                        left.callback(layer.mlp.hot.close)
            if self.split is not None:
                left.callback(self.split.stream.close)
            if self.hot is not None:
                left.callback(self.hot.close)
            left.callback(self.accelerator.close)
            left.callback(self.handoff.close)

    def _forget_weights(self) -> None:
        self.graphs = None
        self.layers.clear()
        self.embedding = torch.empty(0)
        self.lm_head = self.embedding

    def _halves(self, batch: Batch, cache: LatentCache, logits: Tensor) -> list[Half]:
        parts = batch.halves() if self.ping_pong else [batch]
        places = torch.split(logits, [len(part.logit_rows) for part in parts])
        return [
            Half(
                slot,
                part,
                cache,
                self.handoff,
                place,
                split=self.split if len(part.token_ids) >= LEAST_TOKENS else None,
                alone=len(parts) == 1,
                whole=self.trace is None and len(part.token_ids) <= FEW_ROWS,
            )
            for slot, (part, place) in enumerate(zip(parts, places, strict=True))
        ]

    def _operations(self, halves: Sequence[Half]) -> Iterator[Operation]:
        if self.split is not None and any(half.split is not None for half in halves):
            yield self.split.begin, Label("begin")
        for half in halves:
            embed = partial(half.embed, self.embedding, self.activation_dtype, self._rope, self.layers[0])
            yield embed, Label("embed", half=half.slot)
        yield from self._through(halves)

    def _through(self, halves: Sequence[Half]) -> Iterator[Operation]:
        head = partial(Half.head, norm=self.final_norm, lm_head=self.lm_head)
        return through_layers(self.layers, halves, head, self._deferred)

    def _rows(self, batch: Batch) -> tuple[Tensor, Rotation]:
        rows = embedded(batch, self.embedding, self.activation_dtype, self.layers[0].device)
        return rows, self._rope.rotation(batch.positions)

    def _check(self, batch: Batch, cache: LatentCache) -> None:
        if self._closed:
            raise EngineError("model: expected an open one, got one that was closed")
        low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(f"token ids: expected 0..{self.config.vocab_size - 1}, got {low}..{high}")
        if self.handoff.room is not None and len(batch.token_ids) > self.handoff.room:
            raise EngineError(f"batch: expected at most {self.handoff.room} tokens, got {len(batch.token_ids)}")
        cache.check(batch)
