"""The forward pass as a list of operations, which an accelerator executes in this order; see docs/overlap.md.

For each half of the batch and each layer:

front    attention; then the dense MLP, or norm and router
post     hand the rows and their experts over; the host starts to compute
shared   the shared expert, meanwhile
hot      the accelerator's own routed experts, where it has some
stream   routed experts of a prompt that are brought to the accelerator meanwhile
take     wait for the routed experts, add all up

With two halves, the front of one runs while the host computes the experts of the other:

    front A, post A, front B, post B, | shared A, take A, front A', post A', | shared B, take B, front B', post B', ...

On a host that has everything itself, few rows take a `layer` as one operation in the place of these.

Nothing in the list depends on data. The result does not depend on the halves: rows meet only in attention, each with
its own sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.accelerator import Handoff, HotExperts, Label
from hybrid_k2.accelerator.slots import named
from hybrid_k2.model.batch import Batch
from hybrid_k2.model.devices import upload
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.layers import Matrix, RmsNorm, linear
from hybrid_k2.model.moe import Moe, mixed
from hybrid_k2.model.prefill_split import PrefillSplit, Streamed
from hybrid_k2.model.rope import Rope, Rotation
from hybrid_k2.model.router import Routing

HEAD_ROWS = 256  # rows that lm_head takes at once, so that wide vocabularies do not need the logits twice

Operation = tuple[Callable[[], None], Label]


class Half:
    """Take rows that belong together through the layers; `slot` is the one of the hand-off that they use.

    `logits` gets the result. `split` streams experts of a prompt, if it is one; `alone`: this is all of the batch;
    `whole`: layers that can be are computed in one go.
    Shapes: [R, vocab] fp32, R: the batch's logit rows.
    """

    def __init__(
        self,
        slot: int,
        batch: Batch,
        cache: LatentCache,
        handoff: Handoff,
        logits: Tensor,
        *,
        split: PrefillSplit | None = None,
        alone: bool = True,
        whole: bool = False,
    ) -> None:
        self.slot = slot
        self.split = split
        self._alone = alone
        self._whole = whole
        self._batch = batch
        self._cache = cache
        self._handoff = handoff
        self._logits = logits
        self._x: Tensor  # [T, hidden], the residual stream
        self._normal: Tensor  # [T, hidden], what router and experts read
        self._share: Callable[[], Tensor]  # the shared expert of these rows: [T, hidden]
        self._routing: Routing
        self._shared: Tensor  # [T, hidden]
        self._hot: Tensor  # [T, hidden] fp32
        self._asked: Streamed
        self._streamed: Tensor  # [T, hidden] fp32
        self._rotation: Rotation

    def embed(self, embedding: Tensor, dtype: torch.dtype, rope: Rope, first: Layer) -> None:
        """Start the residual stream on the device of the first layer, and take there what all layers read."""
        device = first.device
        ids = upload(self._batch.token_ids, embedding.device)
        self._x = upload(functional.embedding(ids, embedding).to(dtype), device)
        self._rotation = rope.rotation(self._batch.positions).to(device)
        self._batch = first.attention.prepare(self._batch)

    def joins(self, layer: Layer) -> bool:
        """Say whether these rows take the layer in one go."""
        return self._whole and layer.whole is not None

    def layer(self, index: int, layer: Layer) -> None:
        """Compute all of a layer that the rows join."""
        assert layer.whole is not None
        with named(index):
            ids = layer.whole.run(self._x, self._batch, self._cache.layers[index], self._rotation)
        if isinstance(layer.mlp, Moe) and ids is not None:
            layer.mlp.count(ids, ids)

    def front(self, layer: Layer) -> None:
        """Attend; compute a dense MLP, or prepare what the experts read."""
        self._x, self._rotation = self._x.to(layer.device), self._rotation.to(layer.device)
        self._x = layer.attend(self._x, self._batch, self._cache, self._rotation)
        self._normal = layer.post_norm(self._x)
        if not isinstance(layer.mlp, Moe):
            self._x = self._x + layer.mlp(self._normal).to(self._x)

    def post(self, index: int, moe: Moe) -> None:
        """Route, and start the routed experts that the host has."""
        if self._handoff.concurrent:
            self._routing, self._share = moe.router(self._normal), partial(moe.shared, self._normal)
        else:
            self._routing, self._share = moe.begin(self._normal)
        on_host = moe.on_host(self._routing)
        if self.split is not None:
            on_host, self._asked = self.split.choose(index, on_host, alone=self._alone)
        self._handoff.post(self.slot, index, self._normal, on_host, self._routing.weights)

    def shared(self) -> None:
        """Compute the shared expert."""
        self._shared = self._share()

    def hot(self, hot: HotExperts) -> None:
        """Compute the routed experts that the accelerator has."""
        self._hot = hot.forward(self._normal, self._routing.ids, self._routing.weights)

    def stream(self, split: PrefillSplit) -> None:
        """Compute the routed experts that are brought over, as they arrive."""
        asked = self._asked
        self._streamed = split.stream.compute(asked.arrivals, self._normal, asked.ids, self._routing.weights)

    def take(self, index: int, moe: Moe) -> None:
        """Wait for the routed experts, and add: the host's first, then hot and then streamed ones."""
        routed = self._handoff.take(self.slot, index)
        if moe.hot is not None:
            routed = routed.to(self._hot.device) + self._hot
        if self.split is not None:
            routed = routed.to(self._streamed.device) + self._streamed
        self._x = self._x + mixed(routed, self._shared, self._normal).to(self._x)

    def head(self, norm: RmsNorm, lm_head: Matrix) -> None:
        """Compute the logits of the wanted rows."""
        hidden = self._x[self._batch.logit_rows]  # [R, hidden]
        for rows, part in zip(torch.split(self._logits, HEAD_ROWS), torch.split(hidden, HEAD_ROWS), strict=True):
            rows.copy_(linear(norm(part), lm_head))


def through_layers(
    layers: Sequence[Layer], halves: Sequence[Half], head: Callable[[Half], None]
) -> Iterator[Operation]:
    """List what takes these halves through all layers, and each through `head` as soon as it is there."""
    for index, layer in enumerate(layers):
        for half in halves:
            if index:
                yield from _finish(index - 1, layers[index - 1], half)
            if half.joins(layer):
                yield partial(half.layer, index, layer), _label("layer", index, half)
                continue
            yield partial(half.front, layer), _label("front", index, half)
            if isinstance(layer.mlp, Moe):
                yield partial(half.post, index, layer.mlp), _label("post", index, half)
    for half in halves:
        yield from _finish(len(layers) - 1, layers[-1], half)
        yield partial(head, half), Label("head", half=half.slot)


def _finish(index: int, layer: Layer, half: Half) -> Iterator[Operation]:
    if isinstance(layer.mlp, Moe) and not half.joins(layer):
        yield half.shared, _label("shared", index, half)
        if layer.mlp.hot is not None:
            yield partial(half.hot, layer.mlp.hot), _label("hot", index, half)
        if half.split is not None:
            yield partial(half.stream, half.split), _label("stream", index, half)
        yield partial(half.take, index, layer.mlp), _label("take", index, half)


def _label(name: str, layer: int, half: Half) -> Label:
    return Label(name, layer, half.slot)
