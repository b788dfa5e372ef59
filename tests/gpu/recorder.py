"""A stand-in for CUDA's graphs on the host: what is launched is recorded, and launched again on the same memory.

While it records, nothing is computed, as on a stream that is being captured: operations of torch give tensors full of
garbage, kernels of Triton are not run, and what would wait for the device or copy from ordinary memory raises. When it
is launched again, everything runs with the arguments that were recorded:

* numbers of Python among them are those of the recording,
* tensors that the recording made are the same memory, full of garbage again before each launch: another graph may have
  used it,
* other tensors are known by their memory alone; that it has been given back since is an error.

So an operation that is not replayable shows as an error or as wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Launch = Callable[[], None]
COMPOSITE = "CompositeImplicitAutograd"
# Copies a number to the host, or one from there; their results depend on data, or on memory that nobody keeps.
WAITING = ("_local_scalar_dense", "lift_fresh", "equal", "is_nonzero", "nonzero", "masked_select", "unique")


@dataclass(frozen=True)
class Outside:
    """A tensor that a recording reads or writes but did not make: memory that others must keep."""

    memory: StorageWeakRef
    dtype: torch.dtype
    place: tuple[int, torch.Size, tuple[int, ...]]

    def tensor(self) -> Tensor:
        if self.memory.expired():
            raise AssertionError(f"a graph reads memory that was given back: {self.dtype} {list(self.place[1])}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Recorder(TorchDispatchMode):
    """Record operations of torch and kernels of Triton, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[Launch] = []
        self._made: dict[int, Tensor] = {}  # by their memory

    def record(self, op: Launch) -> Launch:
        """Record what an operation launches, and return what launches it again."""
        from triton.runtime.interpreter import InterpretedFunction

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self._add(lambda *a, **o: original(kernel, *a, grid=grid, warmup=warmup, **o), args, options)

        original, InterpretedFunction.run = InterpretedFunction.run, run
        try:
            with torch.inference_mode(), self:
                op()
        finally:
            InterpretedFunction.run = original
        return self._launch

    @property
    def launches(self) -> int:
        return len(self._launches)

    def _launch(self) -> None:
        with torch.inference_mode():
            for made in self._made.values():
                spoil(made)
            for launch in self._launches:
                launch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        masked = name == "index" and any(mask is not None and mask.dtype == torch.bool for mask in args[1])
        if name in WAITING or masked:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:
                return func.decompose(*args, **kwargs)
        aliases = [returned.alias_info for returned in func._schema.returns]
        if func._schema.is_mutable:
            self._add(func, args, kwargs)
            written = [(each.name, i) for i, each in enumerate(func._schema.arguments) if _is_written(each)]
            results = [kwargs[name] if name in kwargs else args[i] for name, i in written]
            return results[0] if len(aliases) == 1 else tuple(results) if aliases else None
        if any(aliases):  # a view: nothing is launched for it
            return func(*args, **kwargs)
        shapes = func(*tree_map_only(Tensor, _shape_of, args), **tree_map_only(Tensor, _shape_of, _on_meta(kwargs)))
        made = tree_map_only(Tensor, self._make, shapes)
        targets = [made] if isinstance(made, Tensor) else list(made)
        if not name.startswith(("empty", "new_empty")):
            self._add(lambda *a, **o: _copy(func(*a, **o), targets), args, kwargs)
        return made

    def _make(self, shape: Tensor) -> Tensor:
        made = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
        self._made[_memory(made)] = made
        return spoil(made)

    def _add(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        def outside(tensor: Tensor) -> Tensor | Outside:
            if _memory(tensor) in self._made:
                return tensor
            place = tensor.storage_offset(), tensor.size(), tensor.stride()
            return Outside(StorageWeakRef(tensor.untyped_storage()), tensor.dtype, place)

        args, kwargs = tree_map_only(Tensor, outside, (list(args), dict(kwargs)))

        def launch() -> None:
            a, o = tree_map_only(Outside, Outside.tensor, (args, kwargs))
            call(*a, **o)

        self._launches.append(launch)


def spoil(tensor: Tensor) -> Tensor:
    """Fill memory with what nobody wrote there."""
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    flat.view(torch.uint8).fill_(0xFF)  # NaN, -1
    return tensor


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | ({"device": torch.device("meta")} if "device" in kwargs else {})


def _copy(results: Any, targets: list[Tensor]) -> None:
    for result, target in zip([results] if isinstance(results, Tensor) else results, targets, strict=True):
        target.copy_(result)
