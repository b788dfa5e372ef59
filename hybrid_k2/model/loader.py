"""Read a checkpoint into a text model: each tensor to the device and in the dtype that the plan says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from hybrid_k2.accelerator import (
    Accelerator,
    DirectHandoff,
    Handoff,
    HostTwin,
    InlineAccelerator,
    MailboxHandoff,
    SubmitHandoff,
)
from hybrid_k2.accelerator.cuda import CudaAccelerator
from hybrid_k2.accelerator.gpu_matrix import check_kernels
from hybrid_k2.accelerator.handoff_cuda import CudaHandoff
from hybrid_k2.checkpoint import VISION, Checkpoint, check_checkpoint, expected_tensors, experts_packed
from hybrid_k2.config import ModelConfig
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime, open_experts
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.model.decode_graphs import why_not
from hybrid_k2.model.devices import torch_device, torch_dtype
from hybrid_k2.model.expert_loading import load_experts, make_layer, warn_of_small_pages
from hybrid_k2.model.host_layer import joined
from hybrid_k2.model.hot_loading import HotLoader
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.part_loading import PartLoader
from hybrid_k2.model.room import room_for
from hybrid_k2.model.stream_loading import make_split
from hybrid_k2.model.text import EXPERTS_LIMIT, TextModel
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST, TWIN, memory_of

log = logging.getLogger("hybrid_k2")

Progress = Callable[[int, int], None]  # bytes read so far, bytes to read

LARGE_BYTES = 1 << 30  # experts that fit the caches, or nearly, gain nothing from tuning or from huge pages


def load_text_model(
    checkpoint: Checkpoint, config: ModelConfig, plan: Plan, progress: Progress | None = None
) -> TextModel:
    """Load the text model as the plan says; `progress` is called in the caller's thread after each tensor or expert.

    Beyond what the plan counts, memory holds one dense tensor as it is stored, or a piece of one that the native
    kernels compute, and per reading thread 9 MB, or one expert where the native kernels are missing.
    Effects: torch's thread count becomes the plan's, the twin's where there is one, for torch computes on it then. What
    was loaded is released if loading fails or is interrupted.
    Raises: CheckpointError before anything large is read, or if a
    file changes meanwhile; HardwareError for a device that is not there, is full, or lacks the kernels.
    """
    for row in plan.rows:
        if row.dtype in ("int8", "fp8") and memory_of(row.device) != HOST:
            check_kernels(row.dtype, row.device)
    check_checkpoint(checkpoint, config)
    torch.set_num_threads(plan.twin_threads or plan.threads)
    with ExitStack() as undo:
        packed = experts_packed(checkpoint, config)
        runtime = open_experts(plan.numerics, plan.threads, packed=packed, nodes=plan.nodes)
        undo.callback(runtime.close)
        if plan.expert_bytes >= LARGE_BYTES:
            runtime.tune()
        runtimes = {HOST: runtime}
        if plan.accelerator == TWIN:
            runtimes[TWIN] = open_experts(plan.numerics, plan.twin_threads, packed=packed)
            undo.callback(runtimes[TWIN].close)
        model = _Builder(checkpoint, config, plan, progress or _ignore, runtimes, undo).model()
        undo.pop_all()
    return model


class _Builder:
    """Put the parts of the model together."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        plan: Plan,
        progress: Progress,
        runtimes: Mapping[str, ExpertsRuntime],
        undo: ExitStack,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.plan = plan
        self.progress = progress
        self.runtimes = runtimes
        self.undo = undo
        self.hot = HotLoader(checkpoint, config, plan, runtimes, undo)
        self.pages_unchecked = plan.expert_bytes >= LARGE_BYTES
        self.parts = PartLoader(checkpoint, config, plan.where, runtimes, self.count, plan.kv_cache)
        self.done = 0
        specs = [spec for spec in expected_tensors(config, checkpoint.has) if spec.what != VISION]
        self.total = sum(checkpoint.info(spec.name).nbytes for spec in specs)

    def model(self) -> TextModel:
        embedding = self.parts.embedding()
        layers = [self.layer(layer) for layer in range(self.config.num_hidden_layers)]
        accelerator = self.accelerator()
        handoff = self.handoff(layers, accelerator)
        if isinstance(handoff, DirectHandoff) and self.plan.activation_dtype == "fp32":
            layers = joined(layers)
        moe = {i: layer.mlp for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)}
        no_graphs = why_not(self.plan, accelerator, handoff, layers)
        if no_graphs is not None:
            log.debug("decode steps are launched operation by operation: %s", no_graphs)
        return TextModel(
            config=self.config,
            activation_dtype=torch_dtype(self.plan.activation_dtype),
            embedding=embedding,
            layers=layers,
            final_norm=self.parts.final_norm(),
            lm_head=self.parts.lm_head(),
            runtimes=list(self.runtimes.values()),
            accelerator=accelerator,
            handoff=handoff,
            hot=self.hot.hot_set(moe),
            split=make_split(self.plan, moe, self.runtimes, self.undo),
            ping_pong=self.plan.overlap == "ping_pong",
            deferred=self.plan.deferred,
            graphs=no_graphs is None,
        )

    def accelerator(self) -> Accelerator:
        made: Accelerator
        if self.plan.accelerator == TWIN:
            made = HostTwin()
        elif self.plan.accelerator is not None and self.plan.holds_stream(self.plan.accelerator):
            made = CudaAccelerator(torch_device(self.plan.accelerator))
        else:
            made = InlineAccelerator()
        self.undo.callback(made.close)
        return made

    def handoff(self, layers: Sequence[Layer], accelerator: Accelerator) -> Handoff:
        """Let the experts compute beside the accelerator, or beside whatever lies elsewhere."""
        experts = {i: layer.mlp.experts for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)}
        native = {i: backend for i, backend in experts.items() if isinstance(backend, NativeExperts)}
        if native and len(native) == len(experts) and not isinstance(accelerator, InlineAccelerator):
            runtime = self.runtimes[HOST].native
            mailbox: MailboxHandoff | CudaHandoff
            with room_for("hand-off to the experts", HOST):
                if isinstance(accelerator, CudaAccelerator):
                    mailbox = CudaHandoff(accelerator, runtime, native, self.plan.batch_tokens, EXPERTS_LIMIT)
                else:
                    mailbox = MailboxHandoff(runtime, native, EXPERTS_LIMIT)
            self.undo.callback(mailbox.close)
            return mailbox
        beside = any(self.plan.where("shared_experts", layer).device != HOST for layer in experts)
        if self.plan.accelerator == TWIN or self.plan.overlap == "ping_pong" or beside:
            return SubmitHandoff(experts, EXPERTS_LIMIT)
        return DirectHandoff(experts)

    def layer(self, layer: int) -> Layer:
        parts = self.parts
        input_norm, attention, post_norm = parts.input_norm(layer), parts.attention(layer), parts.post_norm(layer)
        mlp = parts.dense_mlp(layer) if layer in self.config.dense_layers else self.moe(layer)
        return Layer(input_norm, attention, post_norm, mlp)

    def moe(self, layer: int) -> Moe:
        router, shared = self.parts.router(layer), self.parts.shared_experts(layer)
        experts, device = self.experts(layer), router.bias.device
        return Moe(router, experts, shared, self.hot.load(layer, device, self.count), self.hot.usage(layer, device))

    def experts(self, layer: int) -> ExpertsBackend:
        config, held = self.config, self.hot.on_host(layer)
        backend = make_layer(self.runtimes[HOST], config, layer, len(held))
        self.undo.callback(backend.close)
        dtype = self.plan.where("routed_experts", layer).dtype
        load_experts(
            backend, self.checkpoint, config, layer, held, dtype=dtype, threads=self.plan.threads, count=self.count
        )
        if self.pages_unchecked:
            # The first layer's pages tell for all; walking those of every layer would take minutes.
            warn_of_small_pages(backend)
            self.pages_unchecked = False
        return backend

    def count(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def _ignore(done: int, total: int) -> None:
    """Report nothing."""
