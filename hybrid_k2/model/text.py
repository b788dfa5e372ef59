"""The text model: embedding, layers of attention and MLP around a residual stream, norm, lm_head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import EngineError, RequestError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.model.attention import Attention
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import Matrix, RmsNorm, SwiGlu, linear
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.rope import Rope, Rotation

HEAD_ROWS = 256  # rows that lm_head takes at once, so that wide vocabularies do not need the logits twice


@dataclass(frozen=True)
class Layer:
    """Hold one layer; the residual stream lies on the device of its attention."""

    input_norm: RmsNorm
    attention: Attention
    post_norm: RmsNorm
    mlp: SwiGlu | Moe

    @property
    def device(self) -> torch.device:
        """Device of the attention."""
        return self.attention.q_a.device

    def __call__(self, x: Tensor, batch: Batch, cache: LatentCache, rotation: Rotation) -> Tensor:
        """Return the residual stream behind the layer.

        Shapes: x [T, hidden] -> [T, hidden].
        """
        x = x + self.attention(self.input_norm(x), batch, cache, rotation).to(x)
        return x + self.mlp(self.post_norm(x)).to(x)


class TextModel:
    """Compute logits for batches of tokens; owns the weights and the experts' runtime until `close`."""

    def __init__(
        self,
        config: ModelConfig,
        activation_dtype: torch.dtype,
        embedding: Tensor,
        layers: Sequence[Layer],
        final_norm: RmsNorm,
        lm_head: Matrix,
        experts_runtime: ExpertsRuntime,
    ) -> None:
        self.config = config
        self.experts_runtime = experts_runtime
        self.layers = list(layers)
        self._activation_dtype = activation_dtype
        self._embedding = embedding
        self._final_norm = final_norm
        self._lm_head: Matrix = lm_head
        self._rope = Rope(config)
        self._closed = False

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Run the batch through all layers and return the logits of its logit rows.

        Shapes: -> [R, vocab] fp32, on lm_head's device.
        Effects: the new tokens' latents are in the cache afterwards; the caller counts them.
        Raises: RequestError for a token outside the vocabulary; EngineError for too few pages or a closed model.
        """
        self._check(batch, cache)
        # An ordinary tensor, written to in inference mode: callers may change it in place.
        logits = torch.empty(len(batch.logit_rows), self.config.vocab_size, device=self._lm_head.device)  # [R, vocab]
        with torch.inference_mode():
            hidden = self._run_layers(batch, cache)[batch.logit_rows]  # [R, hidden]
            for rows, part in zip(torch.split(logits, HEAD_ROWS), torch.split(hidden, HEAD_ROWS), strict=True):
                rows.copy_(linear(self._final_norm(part), self._lm_head))
        return logits

    def close(self) -> None:
        """Release weights, experts and threads. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        for layer in self.layers:
            if isinstance(layer.mlp, Moe):
                layer.mlp.experts.close()
        self.experts_runtime.close()
        self.layers.clear()
        self._embedding = torch.empty(0)
        self._lm_head = self._embedding

    def _run_layers(self, batch: Batch, cache: LatentCache) -> Tensor:
        ids = batch.token_ids.to(self._embedding.device)
        x = functional.embedding(ids, self._embedding).to(self._activation_dtype)  # [T, hidden]
        rotation = self._rope.rotation(batch.positions)
        for layer in self.layers:
            x, rotation = x.to(layer.device), rotation.to(layer.device)
            x = layer(x, batch, cache, rotation)  # [T, hidden]
        return x

    def _check(self, batch: Batch, cache: LatentCache) -> None:
        if self._closed:
            raise EngineError("model: expected an open one, got one that was closed")
        low, high = int(batch.token_ids.min()), int(batch.token_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(f"token ids: expected 0..{self.config.vocab_size - 1}, got {low}..{high}")
        cache.check(batch)
