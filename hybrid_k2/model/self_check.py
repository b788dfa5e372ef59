"""Compare what a loaded model computes with a reference, before it serves: wrong text is worse than none.

Each part of a few layers gets a small random batch on three ways: as the plan placed it, on the accelerator's lane and
through the hand-off; by the host's kernels; and by plain torch in fp32 from the checkpoint's own numbers, read anew. So
wrong kernels, wrongly packed or damaged weights and a hand-off that mixes things up show, with the part's name. The
three may differ by what rounding explains (`rounding.py`).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from hybrid_k2.accelerator import Label
from hybrid_k2.accelerator.hot_cuda import DECODE_TOKENS
from hybrid_k2.checkpoint import Checkpoint, ExpertWeights, PackedWeight, StoredExpert
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix, fits_blocks
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import ELSEWHERE, SLOTS
from hybrid_k2.experts.reference import ReferenceRuntime, expert_ffn
from hybrid_k2.model.attention import Attention
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.devices import torch_dtype, upload
from hybrid_k2.model.latent_cache import LatentCache
from hybrid_k2.model.layers import Matrix, RmsNorm, linear
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.part_loading import PartLoader
from hybrid_k2.model.rope import Rope, Rotation
from hybrid_k2.model.rounding import FACTOR, NUMERICS, ROUNDING, Difference, combined, difference, shake
from hybrid_k2.model.router import Router, Routing
from hybrid_k2.model.text import OPERATION_LIMIT, TextModel
from hybrid_k2.placement import NO_SELF_CHECK, Plan
from hybrid_k2.placement.memories import HOST, TWIN
from hybrid_k2.placement.plan import KvCachePlan, Placement

log = logging.getLogger("hybrid_k2")

BUDGET_S = 60.0  # what has not begun by then is left out, with a warning
ROWS = 6
PROMPT_ROWS = 48  # of experts on the accelerator: more than its kernels for few rows take
VOCABULARY_ROWS = 4096  # of lm_head and embedding, in a random place
MORE_EXPERTS = 2  # than a token chooses, among all rows: each is read and computed in fp32
ROUTER_DRAWS = 16  # the weights of a row's experts are few numbers: one draw says little of them
CONTEXT = 70  # tokens before the decode step: more than a page

Step = tuple[Batch, Tensor, Rotation]  # and the rows that attention reads


@dataclass(frozen=True)
class Finding:
    """How far one part is from the reference: as the plan placed it, and on the host."""

    part: str
    layer: int | None
    device: str
    placed: Difference
    host: Difference

    def __str__(self) -> str:
        return self.part if self.layer is None else f"{self.part} of layer {self.layer}"


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, what there was no time for, and how long it took. Units: s."""

    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]
    seconds: float


def self_check(
    model: TextModel, checkpoint: Checkpoint, config: ModelConfig, plan: Plan, budget_s: float = BUDGET_S
) -> SelfCheck:
    """Check embedding, lm_head, and all parts of the first dense layer, the first MoE layer and another by chance.

    Takes some 20 s of one core at the size of K2.6. Parts that have not begun after `budget_s` are left out, with a
    warning. Memory: a part of one layer in fp32 and in bf16, 2.4 GB at the size of K2.6; small batches on each device.
    Raises: EngineError that names the first part that disagrees or fails, and where; CheckpointError.
    """
    start = time.monotonic()
    findings, left_out = [], []
    for part, layer, device, compare in _Checks(model, checkpoint, config, plan).all():
        name = part if layer is None else f"{part} of layer {layer}"
        if time.monotonic() - start > budget_s:
            left_out.append(name)
            continue
        try:
            placed, host = compare()
        except (EngineError, RuntimeError) as error:  # RuntimeError: torch's, of a kernel that fails
            model.accelerator.abandon()
            raise EngineError(f"self-check: {name} on {device}: {error}", hint=_HINT) from error
        findings.append(Finding(part, layer, device, placed, host))
        _refuse_disagreement(findings[-1])
    if left_out:
        log.warning("self-check: no time left after %.0f s for: %s", budget_s, ", ".join(left_out))
    return SelfCheck(tuple(findings), tuple(left_out), time.monotonic() - start)


def check_model(model: TextModel, checkpoint: Checkpoint, config: ModelConfig, plan: Plan) -> None:
    """Check a model if its plan asks for it, and log what came of it; warn where an accelerator is not checked.

    Raises: as `self_check`.
    """
    if plan.self_check:
        done = self_check(model, checkpoint, config, plan)
        most = max((max(found.placed.share, found.host.share) for found in done.findings), default=0.0)
        log.info(
            "self-check: %d parts agree with the reference, the worst within %.0f %% of its bound (%.1f s)",
            len(done.findings), 100 * most, done.seconds,
        )  # fmt: skip
    elif plan.accelerator is not None:
        log.warning("%s", NO_SELF_CHECK)


_HINT = (
    "what was loaded does not compute what the checkpoint says: load again, update driver and triton, or place all on "
    "the host (rules/host.yaml); with self_check: off in the rules it is served all the same"
)


def _refuse_disagreement(found: Finding) -> None:
    for way, device, got in (("the plan's", found.device, found.placed), ("the host's", HOST, found.host)):
        if not got.within:
            raise EngineError(
                f"self-check: {found} on {device} ({way} way): expected to differ from the reference by at most "
                f"{got.bound:.1e} of a row, got {got.error:.1e} (the plan's way: {found.placed.error:.1e}, "
                f"the host's: {found.host.error:.1e})",
                hint=_HINT,
            )


class _Checks:
    """The comparisons; each returns the differences of the plan's way and of the host's from the reference."""

    def __init__(self, model: TextModel, checkpoint: Checkpoint, config: ModelConfig, plan: Plan) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.config = config
        self.plan = plan
        self.random = torch.Generator().manual_seed(random.getrandbits(60))
        reference, host = ReferenceRuntime(), model.experts_runtime
        self.reference = PartLoader(checkpoint, config, _all_on_host("fp32"), {HOST: reference}, _ignore)
        self.host = PartLoader(checkpoint, config, _all_on_host("bf16"), {HOST: host}, _ignore)

    def all(self) -> Iterator[tuple[str, int | None, str, Callable[[], tuple[Difference, Difference]]]]:
        """List part, layer, device and comparison."""
        dense, moe = self.config.dense_layers, self.config.moe_layers
        yield "embedding", None, self._device("embedding", None), self.embedding
        for layer in dense[:1]:
            yield "attention", layer, self._device("attention", layer), partial(self.attention, layer)
            yield "dense_mlp", layer, self._device("dense_mlp", layer), partial(self.dense_mlp, layer)
        for layer in sorted({*moe[:1], *(moe[i] for i in [random.randrange(max(1, len(moe)))] if moe)}):
            yield "attention", layer, self._device("attention", layer), partial(self.attention, layer)
            yield "router", layer, self._device("router", layer), partial(self.router, layer)
            if self.config.n_shared_experts:
                device = self._device("shared_experts", layer)
                yield "shared_experts", layer, device, partial(self.shared_experts, layer)
            yield "routed_experts", layer, HOST, partial(self.routed_experts, layer)
            accelerator = self.plan.accelerator or HOST
            if self._moe(layer).hot is not None:
                yield "hot experts", layer, accelerator, partial(self.hot_experts, layer, ROWS)
                yield "hot experts in a prompt", layer, accelerator, partial(self.hot_experts, layer, PROMPT_ROWS)
            if self.model.split is not None:
                yield "streamed experts", layer, accelerator, partial(self.streamed_experts, layer)
        yield "lm_head", None, self._device("lm_head", None), self.lm_head

    # The parts

    def embedding(self) -> tuple[Difference, Difference]:
        first, last = self._vocabulary()
        ids = torch.randint(first, last, (ROWS,), generator=self.random)
        table, dtype = self.model.embedding, self.model.activation_dtype
        got = self._on_lane(lambda: functional.embedding(upload(ids, table.device), table).to(dtype), None)
        expected = self._rows("model.embed_tokens", first, last)[ids - first]
        shaken = expected * (1 + self._amplitude("embedding", None))
        found = difference(got, expected, shaken)
        return found, found  # a table has no kernels that could differ

    def attention(self, layer: int) -> tuple[Difference, Difference]:
        """A prompt, a chunk of one and a decode step: rows of both forms that torch has, over scattered pages."""
        steps = list(self._steps())
        cache = self.plan.kv_cache
        placed, layer_device = self.model.layers[layer], self.model.layers[layer].device

        def way(norm: RmsNorm, attention: Attention, device: torch.device, where: str, dtype: str) -> Tensor:
            small = KvCachePlan(where, dtype, 8 * cache.page_tokens, cache.page_tokens, 0)
            return _attend(norm, attention, LatentCache(small, self.config), steps, device)

        def reference() -> Tensor:
            x = [(batch, rows.float(), rotation) for batch, rows, rotation in steps]
            small = KvCachePlan(HOST, "fp32", 8 * cache.page_tokens, cache.page_tokens, 0)
            return _attend(norm, attention, LatentCache(small, self.config), x, _HOST_DEVICE)

        got = self._on_lane(
            lambda: way(placed.input_norm, placed.attention, layer_device, cache.device, cache.dtype), layer
        )
        norm, attention = self.host.input_norm(layer), self.host.attention(layer)
        on_host = self._here(lambda: way(norm, attention, _HOST_DEVICE, HOST, cache.dtype))
        norm, attention = self.reference.input_norm(layer), self.reference.attention(layer)
        amplitude = combined(self._amplitude("attention", layer), ROUNDING[cache.dtype])
        return self._compare(got, on_host, reference, (norm, attention), amplitude)

    def dense_mlp(self, layer: int) -> tuple[Difference, Difference]:
        x, placed = self._inputs(), self.model.layers[layer]
        assert not isinstance(placed.mlp, Moe)
        ways = [
            (placed.post_norm, placed.mlp),
            (self.host.post_norm(layer), self.host.dense_mlp(layer)),
            (self.reference.post_norm(layer), self.reference.dense_mlp(layer)),
        ]
        got = self._on_lane(lambda: ways[0][1](ways[0][0](upload(x, placed.device))), layer)
        on_host = self._here(lambda: ways[1][1](ways[1][0](x)))
        return self._compare(
            got, on_host, lambda: ways[2][1](ways[2][0](x.float())), ways[2], self._amplitude("dense_mlp", layer)
        )

    def shared_experts(self, layer: int) -> tuple[Difference, Difference]:
        x, moe = self._inputs(), self._moe(layer)
        host, reference = self.host.shared_experts(layer), self.reference.shared_experts(layer)
        got = self._on_lane(lambda: moe.shared(upload(x, self.model.layers[layer].device)), layer)
        return self._compare(
            got,
            self._here(lambda: host(x)),
            lambda: reference(x.float()),
            (reference,),
            self._amplitude("shared_experts", layer),
        )

    def router(self, layer: int) -> tuple[Difference, Difference]:
        x, placed, moe = self._inputs(), self.model.layers[layer], self._moe(layer)
        host = (self.host.post_norm(layer), self.host.router(layer))
        norm, router = self.reference.post_norm(layer), self.reference.router(layer)
        found: list[Routing] = []

        def route(norm: RmsNorm, router: Router, device: torch.device) -> Tensor:
            found.append(router(norm(upload(x, device))))
            return found[-1].weights

        got = self._on_lane(lambda: route(placed.post_norm, moe.router, placed.device), layer)
        on_host = self._here(lambda: route(*host, _HOST_DEVICE))
        scores = self._here(lambda: router.scores(norm(x.float())))  # [T, E]
        draws: list[Tensor] = []
        for _ in range(ROUTER_DRAWS):
            shaken_norm, shaken = deepcopy((norm, router))
            shake(shaken_norm, self._amplitude("router", layer), self.random)
            shake(shaken.weight, self._amplitude("router", layer), self.random)
            draws.append(self._here(partial(lambda n, r: r.scores(n(x.float())), shaken_norm, shaken)))
        placed_way, host_way = (
            _compare_routing(routing.ids.long().cpu(), weights, scores, draws, router)
            for routing, weights in zip(found, (got, on_host), strict=True)
        )
        return placed_way, host_way

    def routed_experts(self, layer: int) -> tuple[Difference, Difference]:
        """Those that the host has; both slots in flight at once, with different rows."""
        x, moe = self._inputs(), self._moe(layer)
        ids, weights = self._routing(ROWS)
        if moe.hot is not None:
            ids = torch.where(_among(ids, moe.hot.experts), ELSEWHERE, ids)
        lane, handoff, half = self.model.accelerator, self.model.handoff, ROWS // SLOTS
        parts: list[Tensor] = []

        def post(slot: int) -> None:
            rows = slice(slot * half, (slot + 1) * half)
            handoff.post(slot, layer, *(upload(tensor[rows], lane.device) for tensor in (x, ids, weights)))

        def take(slot: int) -> None:
            parts.append(handoff.take(slot, layer))

        for operation in (post, take):
            for slot in range(SLOTS):
                lane.enqueue(partial(operation, slot), Label("self-check", layer, slot))
        lane.synchronize(OPERATION_LIMIT.of(ROWS))
        got = torch.cat(parts).float().cpu()
        on_host = moe.experts.forward(x, ids, weights)
        expected, shaken = self._experts(layer, x, ids, weights, NUMERICS[self.plan.numerics])
        return difference(got, expected, shaken), difference(on_host, expected, shaken)

    def hot_experts(self, layer: int, rows: int) -> tuple[Difference, Difference]:
        """Those that the accelerator has, with few rows or many; the host does not compute them."""
        hot = self._moe(layer).hot
        assert hot is not None
        x, (ids, weights) = self._inputs(rows), self._routing(rows, hot.experts)
        device = self.model.layers[layer].device
        got = self._on_lane(lambda: hot.forward(*(upload(tensor, device) for tensor in (x, ids, weights))), layer)
        ids = torch.where(_among(ids, hot.experts), ids, ELSEWHERE)
        error = self._accelerator_error(exact=rows <= DECODE_TOKENS)
        found = difference(got, *self._experts(layer, x, ids, weights, error))
        return found, found

    def streamed_experts(self, layer: int) -> tuple[Difference, Difference]:
        """Some that the host has, brought over for a prompt; the host's way is that of `routed_experts`."""
        split = self.model.split
        assert split is not None
        held = split.stream.on_host(layer)
        x, (ids, weights) = self._inputs(PROMPT_ROWS), self._routing(PROMPT_ROWS, held)
        ids = torch.where(_among(ids, held), ids, ELSEWHERE)
        device = self.model.layers[layer].device

        def stream() -> Tensor:
            split.begin()
            arrivals = split.stream.ask(layer, sorted({expert for expert in ids.flatten().tolist() if expert >= 0}))
            return split.stream.compute(arrivals, *(upload(tensor, device) for tensor in (x, ids, weights)))

        got = self._on_lane(stream, layer)
        found = difference(got, *self._experts(layer, x, ids, weights, self._accelerator_error(exact=False)))
        return found, found

    def lm_head(self) -> tuple[Difference, Difference]:
        x, model = self._inputs(), self.model
        first, last = self._vocabulary()
        matrix, norm = self._rows("lm_head", first, last), self.reference.final_norm()
        host = self._host_matrix(matrix)
        got = self._on_lane(
            lambda: linear(model.final_norm(upload(x, model.final_norm.weight.device)), model.lm_head)[:, first:last],
            None,
        )
        host_norm = self.host.final_norm()
        on_host = self._here(lambda: linear(host_norm(x), host))
        amplitude = self._amplitude("lm_head", None)
        return self._compare(got, on_host, lambda: linear(norm(x.float()), matrix), (norm, matrix), amplitude)

    # What they share

    def _compare(
        self, got: Tensor, on_host: Tensor, reference: Callable[[], Tensor], parts: tuple[object, ...], amplitude: float
    ) -> tuple[Difference, Difference]:
        """Compute the reference, shake its parts and compute it again."""
        expected = self._here(reference)
        for part in parts:
            shake(part, amplitude, self.random)
        shaken = self._here(reference)
        return difference(got, expected, shaken), difference(on_host, expected, shaken)

    def _on_lane(self, op: Callable[[], Tensor], layer: int | None) -> Tensor:
        """Compute as an operation of the accelerator."""
        results: list[Tensor] = []
        self.model.accelerator.enqueue(lambda: results.append(op()), Label("self-check", layer))
        self.model.accelerator.synchronize(OPERATION_LIMIT.of(ROWS))
        return results[0].float().cpu()

    @staticmethod
    def _here(op: Callable[[], Tensor]) -> Tensor:
        with torch.inference_mode():
            return op().float()

    def _amplitude(self, what: str, layer: int | None) -> float:
        """Return what roundings on both ways amount to: the host's weights are bf16."""
        weights = max(ROUNDING[self.plan.where(what, layer).dtype], ROUNDING["bf16"])
        gate = f"{self.config.tensor_prefix}model.layers.{layer}.mlp.gate.weight"
        if what == "router" and self.checkpoint.info(gate).dtype == "BF16":
            weights = 0.0  # multiplied in fp32 as they are stored, on every way
        return combined(weights, ROUNDING[self.plan.activation_dtype])

    def _experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, error: float) -> tuple[Tensor, Tensor]:
        """Return what the chosen experts add up to in fp32, and the same with weights that are shaken.

        error: of an expert, by what computes it.
        Shapes: x [T, hidden], ids and weights [T, K] -> [T, hidden] fp32 each.
        """
        amplitude = combined(ROUNDING[self.plan.where("routed_experts", layer).dtype], error)
        expected, shaken = torch.zeros(x.shape), torch.zeros(x.shape)
        for expert in sorted(set(ids[ids >= 0].tolist())):
            plain = _plain(StoredExpert(self.checkpoint, self.config, layer, expert).read())
            share = torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)  # [T, 1]
            expected += share * expert_ffn(plain, x.float())
            shake(plain, amplitude, self.random)
            shaken += share * expert_ffn(plain, x.float())
        return expected, shaken

    def _accelerator_error(self, *, exact: bool) -> float:
        """Return the error of an expert that the accelerator computes: the twin has the host's kernels."""
        if self.plan.accelerator == TWIN:
            return NUMERICS[self.plan.numerics]
        return NUMERICS["exact" if exact else "bf16"]

    def _device(self, part: str, layer: int | None) -> str:
        return self.plan.where(part, layer).device

    def _inputs(self, rows: int = ROWS) -> Tensor:
        """Draw rows of the residual stream. Shapes: [T, hidden]."""
        x = torch.randn(rows, self.config.hidden_size, generator=self.random)
        return x.to(torch_dtype(self.plan.activation_dtype))

    def _steps(self) -> Iterator[Step]:
        """Three sequences on scattered pages, at a random place of the longest context."""
        rope = Rope(self.config)
        offset = random.randrange(max(1, self.config.max_position_embeddings - CONTEXT - 16))
        pages = {"a": [5, 2], "b": [7], "c": [0, 4]}
        for chunks in (
            [Chunk([0] * CONTEXT, 0, pages["a"]), Chunk([0] * 5, 0, pages["b"])],
            [Chunk([0], CONTEXT, pages["a"]), Chunk([0] * 3, 5, pages["b"]), Chunk([0] * 9, 0, pages["c"])],
        ):
            batch = Batch.build(chunks)
            yield batch, self._inputs(len(batch.token_ids)), rope.rotation(batch.positions + offset)

    def _routing(self, rows: int, wanted: Collection[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw experts and weights; few experts, so that the reference is quick, the wanted ones first.

        Shapes: [T, K] each.
        """
        experts, k = self.config.n_routed_experts, self.config.num_experts_per_tok
        order = torch.randperm(experts, generator=self.random)
        chosen = _among(order, wanted)
        pool = torch.cat([order[chosen], order[~chosen]])[: k + MORE_EXPERTS]
        places = torch.rand(rows, len(pool), generator=self.random).topk(k).indices
        return pool[places].int(), torch.rand(rows, k, generator=self.random).add_(0.1)

    def _vocabulary(self) -> tuple[int, int]:
        size = self.config.vocab_size
        first = random.randrange(max(1, size - VOCABULARY_ROWS)) // 32 * 32
        return first, min(size, first + VOCABULARY_ROWS)

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows of a matrix that stands outside the layers, in fp32."""
        prefix = self.config.tensor_prefix + name
        if self.checkpoint.has(f"{prefix}.weight"):
            return self.checkpoint.read_rows(f"{prefix}.weight", first, last).float()
        return self.checkpoint.read_linear(prefix)[first:last].float()

    def _host_matrix(self, rows: Tensor) -> Matrix:
        runtime = self.model.experts_runtime.native
        if runtime is None or not fits_blocks(*rows.shape):
            return rows.to(torch.bfloat16)
        matrix = HostMatrix(runtime, rows.shape[0], rows.shape[1], "bf16")
        matrix.load_rows(0, rows)
        return matrix

    def _moe(self, layer: int) -> Moe:
        mlp = self.model.layers[layer].mlp
        assert isinstance(mlp, Moe)
        return mlp


_HOST_DEVICE = torch.device("cpu")


def _all_on_host(dtype: str) -> Callable[[str, int | None], Placement]:
    return lambda what, layer: Placement(HOST, dtype)


def _attend(norm: RmsNorm, attention: Attention, cache: LatentCache, steps: list[Step], device: torch.device) -> Tensor:
    """Return what attention adds to the rows of all steps. Shapes: [T, hidden]."""
    return torch.cat(
        [
            attention(norm(upload(rows, device)), attention.prepare(batch), cache, rotation.to(device))
            for batch, rows, rotation in steps
        ]
    )


def _compare_routing(ids: Tensor, weights: Tensor, scores: Tensor, draws: list[Tensor], router: Router) -> Difference:
    """Compare choice and weights; near ties may go either way.

    Shapes: ids [T, K] int64, weights [T, K]; scores, draws [T, E], the reference's and shaken ones.
    """
    k, experts = ids.shape[1], scores.shape[1]
    in_range = bool(((ids >= 0) & (ids < experts)).all())
    if not in_range or any(len(set(row)) != k for row in ids.tolist()):
        return Difference(float("inf"), 0.0)
    biased = scores + router.bias
    least = biased.topk(k).values[:, -1]  # [T], of the best experts
    missed = float((least - biased.gather(1, ids).amin(1)).max())  # by how much a chosen one is worse
    slack = 2 * FACTOR * max(float((shaken - scores).abs().max()) for shaken in draws)
    if missed > slack:
        return Difference(missed, slack)
    return difference(weights, router.weigh(scores, ids), *(router.weigh(shaken, ids) for shaken in draws))


def _among(ids: Tensor, experts: Collection[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(experts), dtype=ids.dtype))


def _plain(weights: ExpertWeights) -> ExpertWeights:
    """Return an expert's matrices in fp32."""
    gate, up, down = (
        weight.dequantize() if isinstance(weight, PackedWeight) else weight.float()
        for weight in (weights.gate, weights.up, weights.down)
    )
    return replace(weights, gate=gate, up=up, down=down)


def _ignore(nbytes: int) -> None:
    """Report nothing: what is read here was counted when it was loaded."""
