"""Multi-head latent attention (MLA) of one layer over a batch of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.model.batch import Batch, SequenceSlice
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import Matrix, RmsNorm, linear, linear_all
from hybrid_k2.model.mla import MlaShape, absorb_queries, expand_values, latent_attention, naive_attention
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.rope import Rotation


@dataclass(frozen=True)
class Attention:
    """Project to queries and latents, cache the latents, attend sequence by sequence, project back.

    Shapes: q_a [q_lora, hidden], q_b [heads * (nope + rope), q_lora], kv_a [kv_lora + rope, hidden] (and padding),
    kv_b [heads * (nope + value), kv_lora], o [hidden, heads * value].
    `native` computes the absorbed form where weights and cache lie on the host; torch does without it.
    """

    layer: int
    shape: MlaShape
    q_a: Matrix
    q_a_norm: RmsNorm
    q_b: Matrix
    kv_a: Matrix
    kv_a_norm: RmsNorm
    kv_b: Tensor
    o: Matrix
    native: NativeAttention | None = None

    def __call__(self, x: Tensor, batch: Batch, cache: LatentCache, rotation: Rotation) -> Tensor:
        """Attend from each row to its own sequence, up to itself.

        Shapes: x [T, hidden] -> [T, hidden].
        Effects: writes the rows' latents to the cache.
        """
        x = x.to(self.q_a.device)
        q_lora, latent = linear_all(x, (self.q_a, self.kv_a))  # [T, q_lora], [T, kv_lora + rope]
        latents = self._latents(latent, rotation)  # [T, kv_lora + rope] fp32
        for sequence in batch.sequences:
            cache.append(self.layer, sequence, latents[sequence.rows])
        values = self._attend(self._queries(q_lora, rotation), batch, cache)  # [T, heads, value] fp32
        return linear(values.flatten(1).to(x.dtype), self.o)

    def _queries(self, q_lora: Tensor, rotation: Rotation) -> Tensor:
        q = linear(self.q_a_norm(q_lora), self.q_b)  # [T, heads * (nope + rope)]
        q = q.view(len(q), self.shape.heads, -1)  # [T, heads, nope + rope]
        q_nope, q_rope = q[..., : self.shape.nope], q[..., self.shape.nope :]
        return torch.cat((q_nope.float(), rotation.apply(q_rope)), dim=-1)  # [T, heads, nope + rope] fp32

    def _latents(self, latent: Tensor, rotation: Rotation) -> Tensor:
        own = self.shape.kv_lora + self.shape.rope
        c, k_rope = latent[:, : self.shape.kv_lora], latent[:, self.shape.kv_lora : own]
        return torch.cat((self.kv_a_norm(c).float(), rotation.apply(k_rope)), dim=-1)  # [T, kv_lora + rope] fp32

    def _attend(self, q: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        """Give each sequence the form that is cheaper for it."""
        kv_b = self.kv_b.view(self.shape.heads, -1, self.shape.kv_lora)  # [heads, nope + value, kv_lora]
        values = q.new_empty(*q.shape[:2], self.shape.value)  # [T, heads, value]
        absorbed: list[int] = []
        for i, sequence in enumerate(batch.sequences):
            if self.shape.prefer_absorbed(sequence.stop - sequence.start, sequence.length):
                absorbed.append(i)
            else:
                rows = sequence.rows
                values[rows] = naive_attention(q[rows], cache.gather(self.layer, sequence), kv_b, self.shape)
        if absorbed and self.native is not None:
            spans = batch.spans if len(absorbed) == len(batch.sequences) else batch.spans[absorbed]
            self.native.attend(q, self.kv_b, cache.layers[self.layer], batch.page_table, spans, values)
        elif absorbed:
            self._attend_absorbed(q, [batch.sequences[i] for i in absorbed], cache, kv_b, values)
        return values

    def _attend_absorbed(
        self, q: Tensor, sequences: list[SequenceSlice], cache: LatentCache, kv_b: Tensor, values: Tensor
    ) -> None:
        """Fill in the rows of these sequences; all of them pass through W_UK and W_UV together."""
        rows = torch.cat([torch.arange(s.start, s.stop) for s in sequences]).to(q.device)
        q_latent = absorb_queries(q[rows], kv_b, self.shape)  # [heads, rows, kv_lora + rope]
        parts = torch.split(q_latent, [s.stop - s.start for s in sequences], dim=1)
        contexts = [
            latent_attention(part, cache.gather(self.layer, sequence), self.shape)  # [heads, rows of it, kv_lora]
            for sequence, part in zip(sequences, parts, strict=True)
        ]
        values[rows] = expand_values(torch.cat(contexts, dim=1), kv_b, self.shape)
