"""The text model: embedding, layers of attention and MLP around a residual stream, norm, lm_head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hybrid_k2.accelerator import Accelerator, Handoff, Label, Trace
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError, RequestError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.usage import LayerUsage
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.hot_set import HotSet
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.layers import Matrix, RmsNorm
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.prefill_split import LEAST_TOKENS, PrefillSplit
from hybrid_k2.model.rope import Rope
from hybrid_k2.model.schedule import Half, Operation, through_layers

# No operation of a step takes as long as this on any machine that can run the model at all.
WATCHDOG_S = 600.0
EXPERTS_WATCHDOG_S = 300.0  # of the experts of one layer: less, so that the hand-off says what it waited for


class TextModel:
    """Compute logits for batches of tokens; owns weights, threads, accelerator and hand-off until `close`.

    `ping_pong`: cut batches of several sequences into two halves that alternate.
    """

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
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        """Take everything over; `runtimes`: that of the experts first, then any that the accelerator has for itself."""
        self.config = config
        self.experts_runtime = runtimes[0]
        self.layers = list(layers)
        self.accelerator = accelerator
        self.handoff = handoff
        self.hot = hot
        self.split = split
        self._runtimes = list(runtimes)
        self.ping_pong = ping_pong
        self._watchdog_s = watchdog_s
        self._activation_dtype = activation_dtype
        self._embedding = embedding
        self._final_norm = final_norm
        self._lm_head: Matrix = lm_head
        self._rope = Rope(config)
        self._failed = False  # the last step: something may be in flight
        self._closed = False

    @property
    def usage(self) -> dict[int, LayerUsage]:
        """The counters of chosen experts, by layer; empty where none are counted."""
        moe = {i: layer.mlp for i, layer in enumerate(self.layers) if isinstance(layer.mlp, Moe)}
        return {i: layer.usage for i, layer in moe.items() if layer.usage is not None}

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
        Raises: RequestError for a token outside the vocabulary; EngineError for too few pages, a closed model, or a
        part that did not answer in time.
        """
        self._check(batch, cache)
        # An ordinary tensor, written to in inference mode: callers may change it in place.
        logits = torch.empty(len(batch.logit_rows), self.config.vocab_size, device=self._lm_head.device)  # [R, vocab]
        failed, self._failed = self._failed, True
        try:
            if failed:
                self.accelerator.enqueue(self.handoff.reset, Label("reset"))
            if self.hot is not None:
                for op, label in self.hot.between_steps(len(batch.token_ids)):
                    self.accelerator.enqueue(op, label)
            halves = self._halves(batch, cache, logits)
            if self.split is not None and any(half.split is not None for half in halves):
                self.accelerator.enqueue(self.split.begin, Label("begin"))
            for op, label in self._operations(halves):
                self.accelerator.enqueue(op, label)
            self.accelerator.synchronize(self._watchdog_s)
        except BaseException:
            self.accelerator.abandon()
            raise
        self._failed = False
        return logits

    def close(self) -> None:
        """Release weights, experts and threads. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self.handoff.close()
        self.accelerator.close()
        if self.hot is not None:
            self.hot.close()
        if self.split is not None:
            self.split.stream.close()
        for layer in self.layers:
            if isinstance(layer.mlp, Moe):
                layer.mlp.experts.close()
                if layer.mlp.hot is not None:
                    layer.mlp.hot.close()
        for runtime in self._runtimes:
            runtime.close()
        self.layers.clear()
        self._embedding = torch.empty(0)
        self._lm_head = self._embedding

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
            )
            for slot, (part, place) in enumerate(zip(parts, places, strict=True))
        ]

    def _operations(self, halves: Sequence[Half]) -> Iterator[Operation]:
        for half in halves:
            embed = partial(half.embed, self._embedding, self._activation_dtype, self._rope)
            yield embed, Label("embed", half=half.slot)
        yield from through_layers(self.layers, halves, partial(Half.head, norm=self._final_norm, lm_head=self._lm_head))

    def _check(self, batch: Batch, cache: LatentCache) -> None:
        if self._closed:
            raise EngineError("model: expected an open one, got one that was closed")
        low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(f"token ids: expected 0..{self.config.vocab_size - 1}, got {low}..{high}")
        cache.check(batch)
