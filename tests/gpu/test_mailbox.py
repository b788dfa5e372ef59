"""The GPU's side of the mailbox, in the interpreter or on a card, against the server of the extension."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from hybrid_k2.accelerator.kernels import mailbox
from hybrid_k2.accelerator.slot_memory import SlotMemory
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.native import native
from tests.unit.experts_common import load_random_experts, native_runtime, random_routing

HIDDEN, EXPERTS, TOP_K, ROOM = 96, 6, 3, 24


@pytest.fixture(scope="module")
def runtime() -> Iterator[ExpertsRuntime]:
    opened = native_runtime(threads=1)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def layer(runtime: ExpertsRuntime) -> NativeExperts:
    made = runtime.make_layer(HIDDEN, 64, EXPERTS, TOP_K)
    assert isinstance(made, NativeExperts)
    load_random_experts(made)
    return made


@pytest.fixture
def slots(runtime: ExpertsRuntime, layer: NativeExperts, device: torch.device) -> Iterator[list[SlotMemory]]:
    """Both slots of a mailbox that is served."""
    if device.type == "cuda":
        pytest.skip("tests/gpu/test_cuda.py maps the memory for a card")
    block = native.Mailbox(runtime.native, HIDDEN, TOP_K, ROOM, {5: layer.native})
    block.keep_awake(True)
    areas = [[torch.from_numpy(area) for area in block.areas(slot)] for slot in range(2)]
    yield [SlotMemory(i, *area, torch.zeros(2, dtype=torch.int32)) for i, area in enumerate(areas)]
    block.close()


def batch(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(tokens, HIDDEN).to(dtype), *random_routing(tokens, EXPERTS, TOP_K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_posted_is_computed_and_taken(
    slots: list[SlotMemory], layer: NativeExperts, dtype: torch.dtype
) -> None:
    for tokens in (1, ROOM, 5):  # one program and several
        halves = [batch(tokens, dtype), batch(1, dtype)]
        for slot, arguments in zip(slots, halves, strict=True):
            mailbox.post(slot, 5, *arguments)
        for slot, arguments in reversed(list(zip(slots, halves, strict=True))):
            result = mailbox.take(slot, torch.empty(arguments[0].shape, dtype=torch.float32))
            assert torch.equal(result, layer.forward(*arguments))
    assert [slot.state.tolist() for slot in slots] == [[3, 0], [3, 0]]
    assert [int(slot.reply[1]) for slot in slots] == [0, 0]


def test_a_failure_is_the_status_and_the_taker_goes_on(slots: list[SlotMemory], layer: NativeExperts) -> None:
    arguments = batch(2, torch.float32)
    mailbox.post(slots[1], 8, *arguments)  # no such layer
    mailbox.take(slots[1], torch.empty(2, HIDDEN))
    assert slots[1].reply.tolist() == [1, 1]
    mailbox.post(slots[1], 5, *arguments)
    assert torch.equal(mailbox.take(slots[1], torch.empty(2, HIDDEN)), layer.forward(*arguments))


def test_tickets_leave_out_zero() -> None:
    host = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in (("request", 4), ("reply", 2))}
    rows, choices = torch.zeros(ROOM, HIDDEN), torch.zeros(ROOM, TOP_K)
    state = torch.tensor([-2, 0], dtype=torch.int32)
    slot = SlotMemory(0, **host, hidden=rows, ids=choices.int(), weights=choices, output=rows, state=state)
    seen = []
    for _ in range(4):
        mailbox.post(slot, 7, *batch(3, torch.bfloat16))
        seen.append(int(slot.request[0]))
        assert slot.request[1:].tolist() == [7, 3, 1]
    assert np.array_equal(seen, [-1, 1, 2, 3])
