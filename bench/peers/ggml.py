"""ggml's experts as contenders: llama.cpp's library and that of the fork ik_llama.cpp.

The graph is that of a mixture of experts in llama.cpp: gate and up by `mul_mat_id`, silu(gate) * up, down by
`mul_mat_id`, routing weights, sum over a token's experts. Weights are q4_0, in the buffer type that llama.cpp gives
them on a CPU. The fork has operations of its own for gate and up together and for weights and sum, which it uses by
default; so does this graph.
"""

from __future__ import annotations

from ctypes import c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.exchange import MATRICES, Array, Sizes, read_matrix, widen
from bench.peers.ggml_library import F32, I32, Q4_0, Library
from bench.peers.q4_0 import to_q4_0

WEIGHTS_BUFFER = 1  # enum ggml_backend_buffer_usage
IK_SILU = 10  # enum ggml_unary_op of the fork


class _Graph:
    """Describe the layer for one number of tokens."""

    def __init__(self, layer: GgmlLayer, tokens: int) -> None:
        lib, sizes = layer.lib, layer.sizes
        context = lib.context(16 + 2 * sizes.top_k)
        self.hidden = lib.ggml_new_tensor_3d(context, F32, sizes.hidden, 1, tokens)
        self.ids = lib.ggml_new_tensor_2d(context, I32, sizes.top_k, tokens)
        self.weights = lib.ggml_new_tensor_3d(context, F32, 1, sizes.top_k, tokens)
        for tensor in (self.hidden, self.ids, self.weights):
            lib.ggml_set_input(tensor)
        self.out = layer.build(context, self, tokens)
        lib.ggml_set_output(self.out)
        self.graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(self.graph, self.out)
        if not lib.ggml_gallocr_alloc_graph(lib.ggml_gallocr_new(lib.ggml_backend_cpu_buffer_type()), self.graph):
            raise MemoryError(f"ggml: no memory for a graph of {tokens} tokens")


class GgmlLayer:
    """Compute the layer on ggml's threads."""

    def __init__(self, name: str, folder: Path, sizes: Sizes, threads: int) -> None:
        self.sizes = sizes
        self.lib = self.open()
        self.backend = self.lib.ggml_backend_cpu_init()
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.start(threads)
        self.graphs: dict[int, _Graph] = {}
        context = self.lib.context(len(MATRICES))
        inner, outer = (sizes.hidden, sizes.intermediate), (sizes.intermediate, sizes.hidden)
        self.gate, self.up, self.down = (
            self.lib.ggml_new_tensor_3d(context, Q4_0, *shape, sizes.experts) for shape in (inner, inner, outer)
        )
        kind = self.weights_buffer()
        buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(
            context, kind or self.lib.ggml_backend_cpu_buffer_type()
        )
        self.lib.ggml_backend_buffer_set_usage(buffer, WEIGHTS_BUFFER)
        exact = [self._load(tensor, folder, name) for tensor, name in zip(self._tensors(), MATRICES, strict=True)]
        rounded = "the checkpoint's INT4, scales in fp16" + (", all exact" if all(exact) else ", some rounded")
        self.about: dict[str, Any] = {
            "version": self.lib.version,
            "isa": self.lib.isa(),
            "weights": f"q4_0{', rearranged at loading' if kind else ''}: {rounded}",
        }

    def open(self) -> Library:
        """Load the library of the package libggml-python."""
        files = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        return Library("libggml", "lib64", files, "libggml-python")

    def start(self, threads: int) -> None:
        """Give the backend threads that stay, as llama.cpp's programs do."""
        self.lib.ggml_backend_cpu_set_threadpool(self.backend, self.lib.thread_pool(threads))

    def weights_buffer(self) -> c_void_p | None:
        """Choose the buffer type for the weights as llama.cpp does."""
        return self.lib.packing_buffer()

    def build(self, context: c_void_p, graph: _Graph, tokens: int) -> Any:
        """Describe the computation and return its result."""
        lib, sizes = self.lib, self.sizes
        up = lib.ggml_mul_mat_id(context, self.up, graph.hidden, graph.ids)
        gate = lib.ggml_mul_mat_id(context, self.gate, graph.hidden, graph.ids)
        each = lib.ggml_mul_mat_id(context, self.down, lib.ggml_swiglu_split(context, gate, up), graph.ids)
        each = lib.ggml_mul(context, each, graph.weights)
        row, total = 4 * sizes.hidden, None
        for k in range(sizes.top_k):
            part = lib.ggml_view_2d(context, each, sizes.hidden, tokens, sizes.top_k * row, k * row)
            total = part if total is None else lib.ggml_add(context, total, part)
        return total

    def prepare(self, hidden: Array, ids: Array, weights: Array) -> None:
        """See Layer."""
        tokens = len(hidden)
        if tokens not in self.graphs:
            self.graphs[tokens] = _Graph(self, tokens)
        self.tokens, self.graph = tokens, self.graphs[tokens]
        self._set(self.graph.hidden, widen(hidden))
        self._set(self.graph.ids, ids)
        self._set(self.graph.weights, weights)

    def run(self) -> None:
        """See Layer."""
        status = self.lib.ggml_backend_graph_compute(self.backend, self.graph.graph)
        if status:
            raise RuntimeError(f"ggml: expected status 0, got {status}")

    def output(self) -> Array:
        """See Layer."""
        out = np.empty((self.tokens, self.sizes.hidden), np.float32)
        self.lib.ggml_backend_tensor_get(self.graph.out, out.ctypes.data, 0, out.nbytes)
        return out

    def _tensors(self) -> tuple[Any, Any, Any]:
        return self.gate, self.up, self.down

    def _load(self, tensor: Any, folder: Path, name: str) -> bool:
        """Fill the matrices of all experts at once, as rearranging wants it; return whether all scales are exact."""
        parts = [to_q4_0(read_matrix(folder, number, name)) for number in range(self.sizes.distinct)]
        blocks = np.concatenate([parts[expert % len(parts)].blocks for expert in range(self.sizes.experts)])
        self._set(tensor, blocks)
        return all(part.exact for part in parts)

    def _set(self, tensor: Any, values: Array) -> None:
        values = np.ascontiguousarray(values)
        expected = self.lib.ggml_nbytes(tensor)
        if expected != values.nbytes:
            raise ValueError(f"ggml: expected {expected} bytes for a tensor, got {values.nbytes}")
        self.lib.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


class IkLayer(GgmlLayer):
    """Compute the layer on the fork's threads, which OpenMP keeps."""

    def open(self) -> Library:
        """Load the library of the package ik-llama-cpp-python."""
        return Library("ik_llama_cpp", "lib", ("libggml.so",), "ik-llama-cpp-python")

    def start(self, threads: int) -> None:
        """Leave the threads to OpenMP."""

    def weights_buffer(self) -> c_void_p | None:
        """Leave q4_0 as it is, the fork's default."""
        return None

    def build(self, context: c_void_p, graph: _Graph, tokens: int) -> Any:
        """Describe the computation by the fork's fused operations."""
        both = self.lib.ggml_moe_up_gate(context, self.up, self.gate, graph.hidden, graph.ids, IK_SILU)
        each = self.lib.ggml_mul_mat_id(context, self.down, both, graph.ids)
        return self.lib.ggml_mul_multi_add(context, each, graph.weights)
