"""The GPU's side of the mailbox to the experts on the host: post a batch, take its result.

The protocol, with the numbers of its steps, is at the top of csrc/handoff/mailbox.h. The tickets are kept in the card's
memory, so that a captured graph posts a new one each time it is replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_k2.accelerator.kernels.bf16 import FUSED
from hybrid_k2.accelerator.slot_memory import SlotMemory

BLOCK = 1024  # words of 32 bits that a program moves at once
MAX_PROGRAMS = 32  # more would crowd out other kernels while they wait, and PCIe is full before


@triton.jit
def _copy(source, target, words, BLOCK: tl.constexpr):
    """Move this program's share of the words."""
    first = tl.program_id(0) * BLOCK
    while first < words:  # the interpreter of triton 3.6 has no range over tensors
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)
        first += tl.num_programs(0) * BLOCK


@triton.jit
def _publish(flag, value):
    """Store a flag behind everything that the program has written or seen written, for the host to see (step 3)."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.u32 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [flag, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _await(flag, value):
    """Wait until a flag has this value, before anything that the program reads behind a barrier (step 7).

    One thread asks: each question goes over PCIe, past the computation that it waits for.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred other;
            .reg .u32 thread, seen;
            mov.u32 $0, 0;
            mov.u32 thread, %tid.x;
            setp.ne.u32 other, thread, 0;
            @other bra done;
        ask:
            ld.acquire.sys.global.u32 seen, [$1];
            setp.ne.u32 other, seen, $2;
            @other bra ask;
        done:
        }
        """,
        "=r,l,r",
        [flag, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


if triton.knobs.runtime.interpret:  # the interpreter has no assembly; on its host, these are what that does

    @triton.jit
    def _publish(flag, value):
        tl.store(flag, value)

    @triton.jit
    def _await(flag, value):
        seen = tl.load(flag)
        while seen != value:
            seen = tl.load(flag)


@triton.jit(do_not_specialize=["layer", "tokens", "bf16", "hidden_words", "choices"])
def post_kernel(
    hidden, ids, weights, to_hidden, to_ids, to_weights, request, state, layer, tokens, bf16, hidden_words, choices,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Write the payload with all programs; the last one of them raises the request flag."""
    _copy(hidden, to_hidden, hidden_words, BLOCK)
    _copy(ids, to_ids, choices, BLOCK)
    _copy(weights, to_weights, choices, BLOCK)
    tl.debug_barrier()  # what the program's threads wrote comes before what one of them adds
    if tl.atomic_add(state + 1, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1:
        tl.store(state + 1, 0)
        last = tl.load(state)
        ticket = tl.where(last == -1, 1, last + 1)  # 0 is left out
        tl.store(state, ticket)
        tl.store(request + 1, layer)
        tl.store(request + 2, tokens)
        tl.store(request + 3, bf16)
        tl.debug_barrier()
        _publish(request, ticket)


@triton.jit(do_not_specialize=["words"])
def take_kernel(reply, state, output, result, words, BLOCK: tl.constexpr):
    """Wait for the reply to the last post, and read the result."""
    _await(reply, tl.load(state))
    tl.debug_barrier()
    _copy(output, result, words, BLOCK)


def _programs(words: int) -> tuple[int]:
    return (max(1, min(MAX_PROGRAMS, triton.cdiv(words, BLOCK))),)


def post(slot: SlotMemory, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Write a batch into the slot and raise its request flag, on the current stream.

    Shapes: hidden [T, H] bf16 or fp32, H even, ids [T, K] int32, weights [T, K] fp32; T rows fit the slot.
    """
    bf16 = hidden.dtype == torch.bfloat16
    words = hidden.contiguous().view(torch.int32)
    post_kernel[_programs(words.numel())](
        words, ids.contiguous(), weights.contiguous().view(torch.int32),
        slot.hidden.view(torch.int32), slot.ids, slot.weights.view(torch.int32),
        slot.request, slot.state, layer, hidden.shape[0], int(bf16), words.numel(), ids.numel(),
        BLOCK=BLOCK, **FUSED,
    )  # fmt: skip


def take(slot: SlotMemory, result: Tensor) -> Tensor:
    """Wait on the current stream for the slot's reply, and read the rows of `result` from it.

    Shapes: result [T, H] fp32.
    """
    take_kernel[_programs(result.numel())](
        slot.reply, slot.state, slot.output.view(torch.int32), result.view(torch.int32), result.numel(),
        BLOCK=BLOCK, **FUSED,
    )  # fmt: skip
    return result
