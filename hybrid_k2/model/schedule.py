"""The forward pass as a list of operations, which an accelerator executes in this order; see docs/overlap.md.

For each half of the batch and each layer:

front    attention; then the dense MLP, or norm and router
post     hand the rows and their experts over; the host starts to compute
shared   the shared expert, meanwhile
hot      the accelerator's own routed experts, where it has some
stream   routed experts of a prompt that are brought to the accelerator meanwhile
take     wait for the routed experts, add all up
defer    hand those over that are added one layer late; the host computes them beside the next front
collect  wait for these, before the next post

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
from hybrid_k2.model.deferral import part_choices
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
        self._later: Tensor  # [T, K] int32, the choices that are deferred
        self._late: Tensor | None = None  # [T, hidden] fp32, what was deferred in the layer before
        self._rotation: Rotation
        self._live: Tensor | None = None  # [T] bool, the rows that are not there to fill up the batch; None: all

    def embed(self, embedding: Tensor, dtype: torch.dtype, rope: Rope, first: Layer) -> None:
        """Start the residual stream on the device of the first layer, and take there what all layers read."""
        device = first.device
        self.start(
            embedded(self._batch, embedding, dtype, device), rope.rotation(self._batch.positions).to(device), None
        )
        self._batch = first.attention.prepare(self._batch)

    def start(self, x: Tensor, rotation: Rotation, live: Tensor | None) -> None:
        """Start the residual stream with rows that are there already; `live` marks those that count, None: all do.

        Shapes: x [T, hidden], live [T].
        """
        self._x, self._rotation = x, rotation
        self._live = None if live is None else live.bool()

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

    def post(self, index: int, moe: Moe, deferred: int = 0) -> None:
        """Route, and start the routed experts that the host has, less those that are deferred."""
        if self._handoff.concurrent:
            self._routing, self._share = moe.router(self._normal), partial(moe.shared, self._normal)
        else:
            self._routing, self._share = moe.begin(self._normal)
        on_host = moe.on_host(self._routing, self._live)
        if self.split is not None:
            on_host, self._asked = self.split.choose(index, on_host, alone=self._alone)
        if deferred:
            on_host, self._later = part_choices(on_host, deferred)
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
        """Wait for the routed experts, and add: the host's, those of the layer before, then hot and streamed ones."""
        routed = self._handoff.take(self.slot, index)
        if self._late is not None:
            routed, self._late = routed + self._late, None
        if moe.hot is not None:
            routed = routed.to(self._hot.device) + self._hot
        if self.split is not None:
            routed = routed.to(self._streamed.device) + self._streamed
        self._x = self._x + mixed(routed, self._shared, self._normal).to(self._x)

    def defer(self, index: int) -> None:
        """Start the experts that are deferred."""
        self._handoff.post(self.slot, index, self._normal, self._later, self._routing.weights)

    def collect(self, index: int) -> None:
        """Wait for them."""
        self._late = self._handoff.take(self.slot, index)

    def head(self, norm: RmsNorm, lm_head: Matrix) -> None:
        """Compute the logits of the wanted rows."""
        hidden = self._x[self._batch.logit_rows]  # [R, hidden]
        for rows, part in zip(torch.split(self._logits, HEAD_ROWS), torch.split(hidden, HEAD_ROWS), strict=True):
            rows.copy_(linear(norm(part), lm_head))


def embedded(batch: Batch, embedding: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Look up the rows of a batch, or take those of images, and bring them to a device. Shapes: -> [T, hidden]."""
    ids = upload(batch.token_ids, embedding.device)
    rows = upload(functional.embedding(ids, embedding).to(dtype), device)
    if batch.seen is not None:
        rows[upload(batch.seen.rows, device)] = upload(batch.seen.features.to(dtype), device)
    return rows


def through_layers(
    layers: Sequence[Layer], halves: Sequence[Half], head: Callable[[Half], None], deferred: int = 0
) -> Iterator[Operation]:
    """List what takes these halves through all layers, and each through `head` as soon as it is there.

    deferred: so many of each token's experts are added one layer late, where that layer has experts.
    """
    for index, layer in enumerate(layers):
        late = deferred > 0 and _may_defer(layers, index - 1)
        for half in halves:
            if index:
                yield from _finish(index - 1, layers[index - 1], half)
            if half.joins(layer):
                yield partial(half.layer, index, layer), _label("layer", index, half)
                continue
            if late:
                yield partial(half.defer, index - 1), _label("defer", index - 1, half)
            yield partial(half.front, layer), _label("front", index, half)
            if late:
                yield partial(half.collect, index - 1), _label("collect", index - 1, half)
            if isinstance(layer.mlp, Moe):
                waiting = deferred if _may_defer(layers, index) else 0
                yield partial(half.post, index, layer.mlp, waiting), _label("post", index, half)
    for half in halves:
        yield from _finish(len(layers) - 1, layers[-1], half)
        yield partial(head, half), Label("head", half=half.slot)


def _may_defer(layers: Sequence[Layer], index: int) -> bool:
    """Say whether a layer and the next one have experts."""
    pair = layers[max(index, 0) : index + 2]
    return len(pair) == 2 and all(isinstance(layer.mlp, Moe) for layer in pair)


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
