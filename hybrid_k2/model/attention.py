"""Multi-head latent attention (MLA) of one layer over a batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.dense import HostMatrix
from hybrid_k2.model.batch import Batch, Places, SequenceSlice
from hybrid_k2.model.gpu_attention import GpuAttention
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import Matrix, RmsNorm, linear, linear_all
from hybrid_k2.model.mla import MlaShape, absorb_queries, expand_values, latent_attention, naive_attention
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.prompt_attention import prompt_attention
from hybrid_k2.model.rope import Rotation


@dataclass(frozen=True)
class Attention:
    """Project to queries and latents, cache the latents, attend sequence by sequence, project back.

    Shapes: q_a [q_lora, hidden], q_b [heads * (nope + rope), q_lora], kv_a [kv_lora + rope, hidden] (and padding),
    kv_b [heads * (nope + value), kv_lora], o [hidden, heads * value].
    `native` computes the absorbed form where weights and cache lie on the host, `gpu` where they lie on a GPU, for few
    new tokens; torch does without them. The native form is for prompts, too: a row has the same bits in any chunk then,
    and at K2.6's widths it takes as long as torch's naive form from 4096 tokens on, for all its additional products.
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
    gpu: GpuAttention | None = None

    def prepare(self, batch: Batch) -> Batch:
        """Bring what attention reads of a batch to its device; the same for all layers of a model."""
        return batch.to(self.q_a.device, self.gpu.page_tokens if self.gpu else None)

    def __call__(self, x: Tensor, batch: Batch, cache: LatentCache, rotation: Rotation) -> Tensor:
        """Attend from each row to its own sequence, up to itself.

        Shapes: x [T, hidden] -> [T, hidden]; the batch is one that `prepare` returned.
        Effects: writes the rows' latents to the cache.
        """
        x = x.to(self.q_a.device)
        q_lora, latent = linear_all(x, (self.q_a, self.kv_a))  # [T, q_lora], [T, kv_lora + rope]
        q = linear(self.q_a_norm(q_lora), self.q_b)  # [T, heads * (nope + rope)]
        q = q.view(len(q), self.shape.heads, -1)  # [T, heads, nope + rope]
        if self.gpu is not None and batch.places is not None:
            values = self._by_kernels(self.gpu, batch.places, q, latent, batch, cache, rotation)
        elif self.native is not None and self.native.takes(latent, q, cache.layers[self.layer]):
            self.native.append(latent, self.kv_a_norm, rotation, q, batch, cache.layers[self.layer])
            values = self._attend(q, batch, cache)  # [T, heads, value] fp32
        else:
            latents = self._latents(latent, rotation)  # [T, kv_lora + rope] fp32
            for sequence in batch.sequences:
                cache.append(self.layer, sequence, latents[sequence.rows])
            rotated = self._rotated(q, rotation)
            del q, latent, latents  # a long prompt's are large
            values = self._attend(rotated, batch, cache)  # [T, heads, value] fp32
        return linear(values.flatten(1).to(x.dtype), self.o)

    def _rotated(self, q: Tensor, rotation: Rotation) -> Tensor:
        q_nope, q_rope = q[..., : self.shape.nope], q[..., self.shape.nope :]
        return torch.cat((q_nope.float(), rotation.apply(q_rope)), dim=-1)  # [T, heads, nope + rope] fp32

    def _latents(self, latent: Tensor, rotation: Rotation) -> Tensor:
        own = self.shape.kv_lora + self.shape.rope
        c, k_rope = latent[:, : self.shape.kv_lora], latent[:, self.shape.kv_lora : own]
        return torch.cat((self.kv_a_norm(c).float(), rotation.apply(k_rope)), dim=-1)  # [T, kv_lora + rope] fp32

    def _attend(self, q: Tensor, batch: Batch, cache: LatentCache) -> Tensor:
        """Attend by native kernels, or give each sequence the form that is cheaper for it."""
        values = q.new_empty(*q.shape[:2], self.shape.value)  # [T, heads, value]
        if self.native is not None:
            self.native.attend(q, self.kv_b, cache.layers[self.layer], batch.page_table, batch.spans, values)
        elif absorbed := self._attend_naive(q, batch.sequences, cache, values):
            self._attend_absorbed(q, [batch.sequences[i] for i in absorbed], cache, values)
        return values

    def _by_kernels(
        self,
        gpu: GpuAttention,
        places: Places,
        q: Tensor,
        latent: Tensor,
        batch: Batch,
        cache: LatentCache,
        rotation: Rotation,
    ) -> Tensor:
        """Append, and attend: few new tokens by the kernel, the others by torch. Shapes: -> [T, heads, value]."""
        norm, pages = self.kv_a_norm, cache.layers[self.layer]
        gpu.append(latent, norm.weight, norm.eps, rotation, q, places, pages)
        few = [s for s in batch.sequences if s.stop - s.start <= gpu.most_rows]
        if len(few) == len(batch.sequences):
            return gpu.attend(q, self._heads, pages, places, None)
        values = q.new_empty(*q.shape[:2], self.shape.value, dtype=torch.float32)  # [T, heads, value]
        many, wide = [s for s in batch.sequences if s.stop - s.start > gpu.most_rows], q.float()
        if absorbed := self._attend_naive(wide, many, cache, values):
            self._attend_absorbed(wide, [many[i] for i in absorbed], cache, values)
        if few:
            rows = _rows(few, q.device)
            values[rows] = gpu.attend(q[rows], self._heads, pages, places, rows).float()
        return values

    @property
    def any_cut(self) -> bool:
        """Whether a row has the same bits in whatever chunk of its sequence it comes."""
        matrices = (self.q_a, self.q_b, self.kv_a, self.o)
        return self.native is not None and all(isinstance(matrix, HostMatrix) for matrix in matrices)

    @property
    def _heads(self) -> Tensor:
        return self.kv_b.view(self.shape.heads, -1, self.shape.kv_lora)  # [heads, nope + value, kv_lora]

    def _attend_naive(
        self, q: Tensor, sequences: Sequence[SequenceSlice], cache: LatentCache, values: Tensor
    ) -> list[int]:
        """Fill in the rows of the sequences for which the naive form is cheaper; return the numbers of the others."""
        attend = naive_attention if self.gpu is None else prompt_attention
        others: list[int] = []
        for i, sequence in enumerate(sequences):
            if self.shape.prefer_absorbed(sequence.stop - sequence.start, sequence.length):
                others.append(i)
            else:
                rows = sequence.rows
                values[rows] = attend(q[rows], cache.gather(self.layer, sequence), self._heads, self.shape)
        return others

    def _attend_absorbed(
        self, q: Tensor, sequences: Sequence[SequenceSlice], cache: LatentCache, values: Tensor
    ) -> None:
        """Fill in the rows of these sequences; all of them pass through W_UK and W_UV together."""
        kv_b, rows = self._heads, _rows(sequences, q.device)
        q_latent = absorb_queries(q[rows], kv_b, self.shape)  # [heads, rows, kv_lora + rope]
        parts = torch.split(q_latent, [s.stop - s.start for s in sequences], dim=1)
        contexts = [
            latent_attention(part, cache.gather(self.layer, sequence), self.shape)  # [heads, rows of it, kv_lora]
            for sequence, part in zip(sequences, parts, strict=True)
        ]
        values[rows] = expand_values(torch.cat(contexts, dim=1), kv_b, self.shape)


def _rows(sequences: Sequence[SequenceSlice], device: torch.device) -> Tensor:
    """Number the rows of these sequences."""
    return torch.cat([torch.arange(sequence.start, sequence.stop, device=device) for sequence in sequences])
