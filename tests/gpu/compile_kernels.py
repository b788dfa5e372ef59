"""Compile every kernel at the widths of K2.6 for one card, without a GPU, and print what the binaries take.

    python -m tests.gpu.compile_kernels 90

prints a JSON list of {name, shared, registers, stack}: bytes of shared memory per block, registers per thread and bytes
of spilled registers or local arrays per thread. A process of its own, because TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybrid_k2.accelerator.kernels import a16, int4_experts, mailbox, mla_decode, norm_rope, router, weight_only

HIDDEN, INTERMEDIATE, TOP_K, Q_LORA = 7168, 2048, 8, 1536
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """One kernel with the types of its arguments and its constants; whole numbers are multiples of 16."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    launch: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4, "enable_fp_fusion": True})


def experts_cases(capability: int) -> Iterator[Case]:
    """Decode and prefill tiles of the grouped INT4 products."""
    tiles = dict.fromkeys(("order", "tile_slot", "tile_first", "tile_stop"), "*i32")
    common = {"words": "*i32", "shifts": "*i32", "slot_words": "i32", "weights": "*fp32", "partial": "*fp32", **tiles}
    sizes = {"HIDDEN": HIDDEN, "INTERMEDIATE": INTERMEDIATE, "K": TOP_K}
    for form, tiling in (("exact", int4_experts.DECODE), ("rounded", int4_experts.PREFILL)):
        types = {**common, "x": "*bf16", "inner": "*fp32" if tiling.exact else "*bf16"}
        for name, rows, inputs in (("gate_up", 2 * INTERMEDIATE, HIDDEN), ("down", HIDDEN, INTERMEDIATE)):
            arguments = tiling.fit(rows, inputs)[1]
            launch = {key: arguments.pop(key) for key in ("num_warps", "enable_fp_fusion")}
            kernel = getattr(int4_experts, f"{name}_kernel")
            yield Case(f"{name}, {form}", kernel, types, {**sizes, **arguments}, launch)
    types = {"partial": "*fp32", "slots": "*i32", "out": "*fp32"}
    yield Case("combine", int4_experts.combine_kernel, types, {**sizes, "COLUMNS": int4_experts.COMBINE_COLUMNS})


def mailbox_cases() -> Iterator[Case]:
    """The hand-off to the host."""
    moved = dict.fromkeys(("hidden", "ids", "weights", "output"), "*i32")
    targets = dict.fromkeys(("to_hidden", "to_ids", "to_weights", "result"), "*i32")
    flags = dict.fromkeys(("request", "reply", "state"), "*i32")
    sizes = dict.fromkeys(("layer", "tokens", "bf16", "hidden_words", "choices", "words"), "i32")
    for name in ("post", "take"):
        kernel, types = getattr(mailbox, f"{name}_kernel"), {**moved, **targets, **flags, **sizes}
        yield Case(f"mailbox, {name}", kernel, types, {"BLOCK": mailbox.BLOCK})


def weight_only_cases(capability: int) -> Iterator[Case]:
    """Decode and prefill tiles of int8 and, where the card has it, fp8."""
    types = {"scales": "*i32", "shifts": "*i32", "x": "*bf16", "tokens": "i32"}
    for form, tiling in (("exact", weight_only.DECODE), ("rounded", weight_only.PREFILL)):
        for dtype, values in (("int8", {"values": "*i8"}), ("fp8", {"values": "*fp8e4nv", "scales": "*fp32"})):
            _, parts, arguments = tiling.fit(Q_LORA, HIDDEN, dtype == "int8")
            launch = {key: arguments.pop(key) for key in ("num_warps", "enable_fp_fusion")}
            if dtype == "int8" or capability >= 89:
                out = {"out": "*bf16" if parts == 1 else "*fp32"}
                kernel = weight_only.weight_only_kernel
                yield Case(f"{dtype}, {form}", kernel, {**types, **values, **out}, arguments, launch)
    types = {"partial": "*fp32", "out": "*bf16", "numbers": "i32"}
    yield Case("add_parts", weight_only.add_parts_kernel, types, {"PARTS": 8, "NUMBERS": weight_only.ADD_NUMBERS})


def attention_cases(capability: int) -> Iterator[Case]:
    """Decode attention with the tiles of this card."""
    tiling = mla_decode.tiling_for(capability // 10)
    numbers = dict.fromkeys(("page_table", "first_pages", "lengths"), "*i32")
    sums = dict.fromkeys(("contexts", "peaks", "totals", "out"), "*fp32")
    types = {"q": "*bf16", "cache": "*bf16", "scale": "fp32", **numbers, **sums}
    constants = {
        "HEADS": 64, "LORA": 512, "ROPE": 64, "PAGE": 64, "SPLITS": tiling.splits, "SPLIT_KEYS": tiling.split_keys,
        "TILE_HEADS": tiling.heads, "KEYS": tiling.keys, "STAGES": tiling.stages,
    }  # fmt: skip
    launch = {"num_warps": tiling.warps, "enable_fp_fusion": True}
    yield Case("attend", mla_decode.attend_kernel, types, constants, launch)
    yield Case("combine contexts", mla_decode.combine_kernel, types, constants)


def small_cases(capability: int) -> Iterator[Case]:
    """Norm, rotation and cache, router, A16."""
    eight = {"num_warps": 8, "enable_fp_fusion": True}
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "size": "i32", "eps": "fp32"}
    yield Case("rms_norm", norm_rope.rms_norm_kernel, types, {"COLUMNS": 8192}, eight)
    strides = dict.fromkeys(("q_token", "q_head", "out_token", "out_head", "heads"), "i32")
    pointers = dict.fromkeys(("latents", "weight", "cache", "q", "q_out"), "*bf16")
    types = {**strides, **pointers, "cos": "*fp32", "sin": "*fp32", "slots": "*i32", "eps": "fp32"}
    constants = {"LORA": 512, "COLUMNS": 512, "PAIRS": 32, "ROTATED": norm_rope.ROTATED_HEADS}
    yield Case("append and rotate", norm_rope.append_rotate_kernel, types, constants)
    types = {**dict.fromkeys(("logits", "bias", "weights"), "*fp32"), "ids": "*i32", "experts": "i32", "scale": "fp32"}
    yield Case("route", router.route_kernel, types, {"K": TOP_K, "WIDTH": 512, "NORMALISE": True})
    types = {"x": "*bf16", "planes": "*i8", "words": "*i32", "fits": "*i8", "groups": "i32"}
    yield Case("pack_a16", a16.pack_a16_kernel, types, {"GROUPS": a16.GROUPS_AT_ONCE})


def cases(capability: int) -> Iterator[Case]:
    """Everything that this card can run."""
    yield from experts_cases(capability)
    yield from mailbox_cases()
    yield from weight_only_cases(capability)
    yield from attention_cases(capability)
    yield from small_cases(capability)


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Compile to a binary and read its resources from it."""
    names = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if case.types.get(name, "fp32") != "fp32"
    }
    source = ASTSource(case.kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "name": case.name, "shared": binary.metadata.shared, "registers": int(registers), "stack": int(stack)
    }  # fmt: skip


if __name__ == "__main__":
    card = int(sys.argv[1])
    json.dump([compile_case(case, card) for case in cases(card)], sys.stdout)
