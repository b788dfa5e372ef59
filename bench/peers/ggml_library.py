"""ggml's C interface, as far as a layer of experts needs it, through ctypes from a package that brings the library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

F32, Q4_0, I32 = 0, 2, 26  # enum ggml_type, the same in the fork

# function -> result, arguments; pointers to ggml's structures are opaque here
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
    "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_moe_up_gate": (c_void_p, [c_void_p] * 5 + [c_int]),
    "ggml_mul_multi_add": (c_void_p, [c_void_p] * 3),
    "ggml_set_input": (None, [c_void_p]),
    "ggml_set_output": (None, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_gallocr_new": (c_void_p, [c_void_p]),
    "ggml_gallocr_alloc_graph": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [c_void_p, c_int]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
    "ggml_cpu_has_avx2": (c_int, []),
    "ggml_cpu_has_avx512": (c_int, []),
    "ggml_cpu_has_avx512_vnni": (c_int, []),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Library:
    """Call ggml by the names of its C functions."""

    def __init__(self, package: str, folder: str, files: tuple[str, ...], distribution: str) -> None:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {package!r}")
        root = Path(next(iter(spec.submodule_search_locations))) / folder
        self.version = f"{distribution} {version(distribution)}"
        self.libraries = [ctypes.CDLL(str(root / file), mode=ctypes.RTLD_GLOBAL) for file in files]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        result, arguments = FUNCTIONS[name]
        for library in self.libraries:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
                return function  # type: ignore[no-any-return]
        raise AttributeError(f"{self.version}: expected the function {name}, got none")

    def context(self, tensors: int) -> c_void_p:
        """Make room for the descriptions of tensors, not for their data, and for one graph."""
        init = next(library.ggml_init for library in self.libraries if hasattr(library, "ggml_init"))
        init.restype, init.argtypes = c_void_p, [_InitParams]
        size = tensors * self.ggml_tensor_overhead() + self.ggml_graph_overhead()
        return c_void_p(init(_InitParams(size, None, True)))

    def packing_buffer(self) -> c_void_p | None:
        """Return the buffer type that rearranges weights for the CPU, where there is one."""
        device = self.ggml_backend_reg_dev_get(self.ggml_backend_cpu_reg(), 0)
        address = self.ggml_backend_reg_get_proc_address(
            self.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        position = 0
        while kinds and kinds[position]:
            if b"REPACK" in self.ggml_backend_buft_name(kinds[position]):
                return c_void_p(kinds[position])
            position += 1
        return None

    def thread_pool(self, threads: int) -> c_void_p:
        """Start threads that stay, with ggml's defaults."""
        params = ctypes.create_string_buffer(1024)  # the structure has 528 bytes, 512 of them a mask of CPUs
        init = next(
            lib.ggml_threadpool_params_init for lib in self.libraries if hasattr(lib, "ggml_threadpool_params_init")
        )
        init.restype, init.argtypes = None, [c_void_p, c_int]
        init(params, threads)
        return c_void_p(self.ggml_threadpool_new(params))

    def isa(self) -> str:
        """Name the instruction set that the library was built for."""
        if self.ggml_cpu_has_avx512():
            return "avx512_vnni" if self.ggml_cpu_has_avx512_vnni() else "avx512"
        return "avx2" if self.ggml_cpu_has_avx2() else "below avx2"
