"""Read the dense parts of a model from a checkpoint: each tensor to the device and in the dtype of its placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hybrid_k2.accelerator.kernels import have_triton
from hybrid_k2.checkpoint import Checkpoint
from hybrid_k2.config import ModelConfig
from hybrid_k2.dense import HostMatrix
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.model.attention import Attention
from hybrid_k2.model.dense_loading import load_gpu_matrix, load_host_matrix, load_padded
from hybrid_k2.model.devices import torch_device, torch_dtype
from hybrid_k2.model.gpu_attention import GpuAttention
from hybrid_k2.model.layers import Matrix, RmsNorm, SwiGlu
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.native_attention import NativeAttention
from hybrid_k2.model.room import room_for
from hybrid_k2.model.router import Router
from hybrid_k2.placement.memories import HOST, memory_of
from hybrid_k2.placement.plan import KvCachePlan, Placement

Where = Callable[[str, int | None], Placement]  # a group, in one layer if it has layers


class PartLoader:
    """Build parts; names are given without the checkpoint's prefix.

    `runtimes`: the threads that compute on each device of the host, "host" among them. `count` gets the bytes on disk
    of what was read. `cache`: where attention finds the latents; without it no kernels of a GPU are used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        where: Where,
        runtimes: Mapping[str, ExpertsRuntime],
        count: Callable[[int], None],
        cache: KvCachePlan | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.where = where
        self.runtimes = runtimes
        self.count = count
        shape = MlaShape.of(config)
        on_gpu = cache is not None and memory_of(cache.device) != HOST
        self.gpu_attention = GpuAttention.open(shape, cache) if cache is not None and on_gpu else None
        self.native_attention = {name: NativeAttention.open(runtime, shape) for name, runtime in runtimes.items()}

    def embedding(self) -> Tensor:
        return self.weight("model.embed_tokens", "embedding")

    def final_norm(self) -> RmsNorm:
        return self.norm("model.norm", "lm_head", None)

    def lm_head(self) -> Matrix:
        return self.matrix("lm_head", "lm_head")

    def input_norm(self, layer: int) -> RmsNorm:
        return self.norm(f"model.layers.{layer}.input_layernorm", "attention", layer)

    def post_norm(self, layer: int) -> RmsNorm:
        group = "dense_mlp" if layer in self.config.dense_layers else "router"
        return self.norm(f"model.layers.{layer}.post_attention_layernorm", group, layer)

    def norm(self, name: str, what: str, layer: int | None, eps: float | None = None) -> RmsNorm:
        """Load a norm, with the model's epsilon or another one."""
        eps, placement = self.config.rms_norm_eps if eps is None else eps, self.where(what, layer)
        threads = self.runtime_of(placement).native if placement.memory == HOST else None
        return RmsNorm(self.weight(name, what, layer), eps, self.has_kernels(what, layer), threads)

    def has_kernels(self, what: str, layer: int | None) -> bool:
        """Say whether Triton's kernels compute this group: on a GPU, where triton is there."""
        return self.where(what, layer).memory != HOST and have_triton()

    def attention(self, layer: int) -> Attention:
        name = f"model.layers.{layer}.self_attn"

        def matrix(part: str) -> Matrix:
            return self.matrix(f"{name}.{part}", "attention", layer)

        eps = self.config.latent_norm_eps
        return Attention(
            layer=layer,
            shape=MlaShape.of(self.config),
            q_a=matrix("q_a_proj"),
            q_a_norm=self.norm(f"{name}.q_a_layernorm", "attention", layer, eps),
            q_b=matrix("q_b_proj"),
            kv_a=self.latent_matrix(f"{name}.kv_a_proj_with_mqa", layer),
            kv_a_norm=self.norm(f"{name}.kv_a_layernorm", "attention", layer, eps),
            kv_b=self.weight(f"{name}.kv_b_proj", "attention", layer),
            o=matrix("o_proj"),
            native=self.native_attention.get(self.where("attention", layer).device),
            gpu=self.gpu_attention,
        )

    def dense_mlp(self, layer: int) -> SwiGlu:
        return self.swiglu(f"model.layers.{layer}.mlp", "dense_mlp", layer)

    def shared_experts(self, layer: int) -> SwiGlu:
        return self.swiglu(f"model.layers.{layer}.mlp.shared_experts", "shared_experts", layer)

    def router(self, layer: int) -> Router:
        name = f"model.layers.{layer}.mlp.gate"
        return Router(
            weight=self.router_matrix(name, layer),
            bias=self.correction_bias(f"{name}.e_score_correction_bias", layer),
            experts_per_token=self.config.num_experts_per_tok,
            normalise=self.config.norm_topk_prob,
            scale=self.config.routed_scaling_factor,
            kernel=self.has_kernels("router", layer),
        )

    def swiglu(self, name: str, what: str, layer: int) -> SwiGlu:
        gate, up, down = (self.matrix(f"{name}.{part}_proj", what, layer) for part in ("gate", "up", "down"))
        return SwiGlu(gate, up, down)

    def matrix(self, name: str, what: str, layer: int | None = None) -> Matrix:
        """Load the matrix of a linear layer in the form that its kernels read."""
        prefix, placement = self.config.tensor_prefix + name, self.where(what, layer)
        matrix: Matrix | None
        if placement.memory == HOST:
            matrix = load_host_matrix(self.checkpoint, prefix, placement, self.runtime_of(placement), self.count)
        else:
            device = torch_device(placement.device)
            matrix = load_gpu_matrix(self.checkpoint, prefix, placement, device, self.count)
        return self.weight(name, what, layer) if matrix is None else matrix

    def router_matrix(self, name: str, layer: int) -> Tensor | HostMatrix:
        prefix, placement = self.config.tensor_prefix + name, self.where("router", layer)
        matrix = load_padded(self.checkpoint, prefix, placement, self.runtime_of(placement), self.count)
        return self.weight(name, "router", layer) if matrix is None else matrix

    def latent_matrix(self, name: str, layer: int) -> Matrix:
        """Load a matrix whose rows small models do not have in whole blocks."""
        prefix, placement = self.config.tensor_prefix + name, self.where("attention", layer)
        matrix = None
        if placement.dtype == "bf16" and self.checkpoint.linear_shape(prefix)[0] % 32:
            matrix = load_padded(self.checkpoint, prefix, placement, self.runtime_of(placement), self.count)
        return self.matrix(name, "attention", layer) if matrix is None else matrix

    def runtime_of(self, placement: Placement) -> ExpertsRuntime:
        """Return the threads that compute there: the twin has its own, so that it works beside the experts."""
        return self.runtimes.get(placement.device, self.runtimes[HOST])

    def weight(self, name: str, what: str, layer: int | None = None) -> Tensor:
        """Load a tensor; where its group is int8 or fp8, it is one of those that stay bf16."""
        prefix, placement = self.config.tensor_prefix + name, self.where(what, layer)
        dtype = torch.bfloat16 if placement.dtype in ("int8", "fp8") else torch_dtype(placement.dtype)
        tensor = place(prefix, placement.device, dtype, self.checkpoint.read_linear(prefix))
        self.count(self.checkpoint.linear_bytes(prefix))
        return tensor

    def correction_bias(self, name: str, layer: int) -> Tensor:
        """The router adds it in fp32, whatever dtype its matrix has."""
        full = self.config.tensor_prefix + name
        device = self.where("router", layer).device
        tensor = place(full, device, torch.float32, self.checkpoint.read(full))
        self.count(self.checkpoint.info(full).nbytes)
        return tensor


def place(name: str, device: str, dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Bring a tensor to a device of the plan. Raises: MemoryBudgetError, HardwareError."""
    with room_for(name, device):
        return tensor.to(torch_device(device), dtype)
