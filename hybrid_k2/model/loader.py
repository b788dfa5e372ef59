"""Read a checkpoint into a text model: each tensor to the device and in the dtype that the plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from hybrid_k2.accelerator import (
    Accelerator,
    DirectHandoff,
    Handoff,
    HostTwin,
    InlineAccelerator,
    MailboxHandoff,
    SubmitHandoff,
)
from hybrid_k2.accelerator.gpu_matrix import check_kernels
from hybrid_k2.checkpoint import Checkpoint, check_checkpoint, expected_tensors, experts_packed
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix
from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.experts import ExpertsBackend, ExpertsRuntime, open_experts
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.model.attention import Attention
from hybrid_k2.model.dense_loading import load_gpu_matrix, load_host_matrix, load_router
from hybrid_k2.model.devices import torch_device, torch_dtype
from hybrid_k2.model.expert_loading import load_experts, make_layer, warn_of_small_pages
from hybrid_k2.model.hot_loading import HotLoader
from hybrid_k2.model.layer import Layer
from hybrid_k2.model.layers import Matrix, RmsNorm, SwiGlu
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.moe import Moe
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.router import Router
from hybrid_k2.model.stream_loading import make_split
from hybrid_k2.model.text import EXPERTS_WATCHDOG_S, TextModel
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST, TWIN, memory_of
from hybrid_k2.placement.plan import Placement

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
    """Build the parts of the model; names are given without the checkpoint's prefix."""

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
        shape = MlaShape.of(config)
        self.native_attention = {name: NativeAttention.open(runtime, shape) for name, runtime in runtimes.items()}
        self.done = 0
        self.total = sum(checkpoint.info(spec.name).nbytes for spec in expected_tensors(config, checkpoint.has))

    def model(self) -> TextModel:
        embedding = self.weight("model.embed_tokens", "embedding")
        layers = [self.layer(layer) for layer in range(self.config.num_hidden_layers)]
        moe = {i: layer.mlp for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)}
        return TextModel(
            config=self.config,
            activation_dtype=torch_dtype(self.plan.activation_dtype),
            embedding=embedding,
            layers=layers,
            final_norm=RmsNorm(self.weight("model.norm", "lm_head"), self.config.rms_norm_eps),
            lm_head=self.matrix("lm_head", "lm_head"),
            runtimes=list(self.runtimes.values()),
            accelerator=self.accelerator(),
            handoff=self.handoff(layers),
            hot=self.hot.hot_set(moe),
            split=make_split(self.plan, moe, self.runtimes, self.undo),
            ping_pong=self.plan.overlap == "ping_pong",
        )

    def accelerator(self) -> Accelerator:
        if self.plan.accelerator != TWIN:
            return InlineAccelerator()
        twin = HostTwin()
        self.undo.callback(twin.close)
        return twin

    def handoff(self, layers: Sequence[Layer]) -> Handoff:
        """Let the experts compute beside the accelerator, or beside whatever lies elsewhere."""
        experts = {i: layer.mlp.experts for i, layer in enumerate(layers) if isinstance(layer.mlp, Moe)}
        native = {i: backend for i, backend in experts.items() if isinstance(backend, NativeExperts)}
        if self.plan.accelerator == TWIN and native and len(native) == len(experts):
            mailbox = MailboxHandoff(self.runtimes[HOST].native, native, EXPERTS_WATCHDOG_S)
            self.undo.callback(mailbox.close)
            return mailbox
        beside = any(self.plan.where("shared_experts", layer).device != HOST for layer in experts)
        if self.plan.accelerator == TWIN or self.plan.overlap == "ping_pong" or beside:
            return SubmitHandoff(experts, EXPERTS_WATCHDOG_S)
        return DirectHandoff(experts)

    def layer(self, layer: int) -> Layer:
        name, eps = f"model.layers.{layer}", self.config.rms_norm_eps
        dense = layer in self.config.dense_layers
        input_norm = RmsNorm(self.weight(f"{name}.input_layernorm", "attention", layer), eps)
        attention = self.attention(f"{name}.self_attn", layer)
        post = self.weight(f"{name}.post_attention_layernorm", "dense_mlp" if dense else "router", layer)
        mlp = self.swiglu(f"{name}.mlp", "dense_mlp", layer) if dense else self.moe(f"{name}.mlp", layer)
        return Layer(input_norm, attention, RmsNorm(post, eps), mlp)

    def attention(self, name: str, layer: int) -> Attention:
        def weight(part: str) -> Tensor:
            return self.weight(f"{name}.{part}", "attention", layer)

        def matrix(part: str) -> Matrix:
            return self.matrix(f"{name}.{part}", "attention", layer)

        eps = self.config.latent_norm_eps
        return Attention(
            layer=layer,
            shape=MlaShape.of(self.config),
            q_a=matrix("q_a_proj"),
            q_a_norm=RmsNorm(weight("q_a_layernorm"), eps),
            q_b=matrix("q_b_proj"),
            kv_a=matrix("kv_a_proj_with_mqa"),
            kv_a_norm=RmsNorm(weight("kv_a_layernorm"), eps),
            kv_b=weight("kv_b_proj"),
            o=matrix("o_proj"),
            native=self.native_attention.get(self.plan.where("attention", layer).device),
        )

    def moe(self, name: str, layer: int) -> Moe:
        router = Router(
            weight=self.router_matrix(f"{name}.gate", layer),
            bias=self.correction_bias(f"{name}.gate.e_score_correction_bias", layer),
            experts_per_token=self.config.num_experts_per_tok,
            normalise=self.config.norm_topk_prob,
            scale=self.config.routed_scaling_factor,
        )
        shared = self.swiglu(f"{name}.shared_experts", "shared_experts", layer)
        experts, device = self.experts(layer), router.bias.device
        return Moe(router, experts, shared, self.hot.load(layer, device, self.count), self.hot.usage(layer, device))

    def swiglu(self, name: str, what: str, layer: int) -> SwiGlu:
        gate, up, down = (self.matrix(f"{name}.{part}_proj", what, layer) for part in ("gate", "up", "down"))
        return SwiGlu(gate, up, down)

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

    def matrix(self, name: str, what: str, layer: int | None = None) -> Matrix:
        """Load the matrix of a linear layer in the form that its kernels read."""
        prefix, placement = self.config.tensor_prefix + name, self.plan.where(what, layer)
        matrix: Matrix | None
        if placement.memory == HOST:
            matrix = load_host_matrix(self.checkpoint, prefix, placement, self.runtime_of(placement), self.count)
        else:
            device = torch_device(placement.device)
            matrix = load_gpu_matrix(self.checkpoint, prefix, placement, device, self.count)
        return self.weight(name, what, layer) if matrix is None else matrix

    def router_matrix(self, name: str, layer: int) -> Tensor | HostMatrix:
        prefix, placement = self.config.tensor_prefix + name, self.plan.where("router", layer)
        matrix = load_router(self.checkpoint, prefix, placement, self.runtime_of(placement), self.count)
        return self.weight(name, "router", layer) if matrix is None else matrix

    def runtime_of(self, placement: Placement) -> ExpertsRuntime:
        """Return the threads that compute there: the twin has its own, so that it works beside the experts."""
        return self.runtimes.get(placement.device, self.runtimes[HOST])

    def weight(self, name: str, what: str, layer: int | None = None) -> Tensor:
        """Load a tensor; where its group is int8 or fp8, it is one of those that stay bf16."""
        prefix, placement = self.config.tensor_prefix + name, self.plan.where(what, layer)
        dtype = torch.bfloat16 if placement.dtype in ("int8", "fp8") else torch_dtype(placement.dtype)
        tensor = self.place(prefix, placement.device, dtype, self.checkpoint.read_linear(prefix))
        self.count(self.checkpoint.linear_bytes(prefix))
        return tensor

    def correction_bias(self, name: str, layer: int) -> Tensor:
        """The router adds it in fp32, whatever dtype its matrix has."""
        full = self.config.tensor_prefix + name
        device = self.plan.where("router", layer).device
        tensor = self.place(full, device, torch.float32, self.checkpoint.read(full))
        self.count(self.checkpoint.info(full).nbytes)
        return tensor

    def place(self, name: str, device: str, dtype: torch.dtype, tensor: Tensor) -> Tensor:
        try:
            return tensor.to(torch_device(device), dtype)
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(
                f"{name}: expected room for {tensor.numel() * dtype.itemsize} bytes on {device}, got none left",
                hint="another program may be using the GPU; the plan counts on all of its memory",
            ) from error

    def count(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


def _ignore(done: int, total: int) -> None:
    """Report nothing."""
