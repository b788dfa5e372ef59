"""Dense matrices on the native kernels against float64, and int8 against its definition."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_k2.dense import GROUP, HostMatrix, Int8Weight, fits_blocks, multiply_all, quantize_int8
from hybrid_k2.errors import CheckpointError, EngineError
from hybrid_k2.experts import ExpertsRuntime
from hybrid_k2.experts.cpu import NativeRuntime
from hybrid_k2.host.binding import warn_unbound
from hybrid_k2.host.threads import NodeThreads, virtual_nodes
from tests.unit.experts_common import ACTIVATIONS, NOT_FINITE, native_runtime, set_bits, usable_isas

EPS = torch.finfo(torch.float32).eps
DTYPES = ("bf16", "int8")


@pytest.fixture(scope="module")
def runtime() -> Iterator[ExpertsRuntime]:
    runtime = native_runtime()
    yield runtime
    runtime.close()


def random_weight(rows: int, inputs: int) -> Tensor:
    """Weights of a real layer's size, with rows of other sizes, groups of zeros and a few outliers."""
    weight = torch.randn(rows, inputs) * torch.exp(torch.randn(rows, 1)) / inputs**0.5
    weight[:: max(1, rows // 5), :GROUP] = 0
    weight[torch.rand_like(weight) < 0.01] *= 20
    return weight.bfloat16()


def matrix(runtime: ExpertsRuntime, weight: Tensor, dtype: str) -> HostMatrix:
    """Load it in two pieces, the second one in fp32."""
    loaded = HostMatrix(runtime.native, *weight.shape, dtype)
    first = len(weight) // 2 // 32 * 32
    loaded.load_rows(0, weight[:first])
    loaded.load_rows(first, weight[first:].float())
    return loaded


def widened(weight: Tensor | Int8Weight) -> Tensor:
    return (weight.dequantize() if isinstance(weight, Int8Weight) else weight).double()


@pytest.mark.parametrize("inputs", [32, 96, 608])
def test_int8_rounds_to_half_a_step(inputs: int) -> None:
    weight = random_weight(64, inputs)
    int8 = quantize_int8(weight)
    step = int8.scale.double().repeat_interleave(GROUP, dim=1)
    assert int8.values.abs().max() == 127
    # The largest of a group may be cut: its scale, rounded to bf16, is too small by at most 2^-9.
    assert ((int8.dequantize().double() - weight.double()).abs() <= 0.5 * step * (1 + 2**-7)).all()
    assert torch.equal(quantize_int8(int8.dequantize()).values, int8.values)
    assert not int8.dequantize()[0, :GROUP].any()


def test_int8_costs_half_a_percent_of_gaussian_weights() -> None:
    weight, x = torch.randn(512, 1024), torch.randn(8, 1024).double()
    exact = x @ weight.double().T
    error = (x @ quantize_int8(weight).dequantize().double().T - exact).norm() / exact.norm()
    assert 0.003 < error < 0.007


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 32448.5, -32500.0])
def test_int8_refuses_what_it_cannot_hold(value: float, runtime: ExpertsRuntime) -> None:
    weight = torch.randn(160, 64)
    weight[101, 40] = value
    message = rf"^weight: expected finite values below 32448\.5 for int8, got {value:g}(\.0)? at row 101, input 40$"
    with pytest.raises(CheckpointError, match=message):
        quantize_int8(weight)
    loaded = HostMatrix(runtime.native, 160, 64, "int8")
    with pytest.raises(CheckpointError, match=message):
        loaded.load_rows(0, weight)
    with pytest.raises(CheckpointError, match=message):
        loaded.load_rows(64, weight[64:])


def test_int8_computes_with_the_largest_weights_and_activations(runtime: ExpertsRuntime) -> None:
    weight, x = torch.zeros(32, 64), torch.zeros(3, 64)
    weight[3, 40] = 32448.498
    assert quantize_int8(weight).scale[3, 1] == 255
    loaded = matrix(runtime, weight, "int8")
    assert torch.equal(loaded.read().values, quantize_int8(weight).values)
    x[0, 41] = 3.7e22  # where the weight is zero
    x[1, 40], x[2, 40] = 8e15, 1e16  # on both sides of the largest sum
    got, expected = loaded(x), x.double() @ widened(loaded.read()).T
    assert not got[0].any()
    assert torch.allclose(got[1].double(), expected[1], rtol=1e-4)
    assert expected[1, 3] < 2.0**68 < expected[2, 3]
    assert got[2, 3] == torch.inf


def test_int8_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="expected a multiple of 32 inputs, got 40"):
        quantize_int8(torch.ones(32, 40))
    assert fits_blocks(64, 96)
    assert not any(fits_blocks(*shape) for shape in ((48, 96), (64, 100), (0, 32)))


@pytest.mark.parametrize(("rows", "inputs"), [(32, 32), (96, 160), (416, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_what_the_definition_says(rows: int, inputs: int, dtype: str, runtime: ExpertsRuntime) -> None:
    weight = random_weight(rows, inputs)
    weight[1, :GROUP] = 1e-37  # its scale would not be a normal number
    loaded = matrix(runtime, weight, dtype)
    if dtype == "bf16":
        assert loaded.nbytes == rows * inputs * 2
        assert torch.equal(loaded.read(), weight)
        return
    expected, got = quantize_int8(weight), loaded.read()
    assert loaded.nbytes == rows * inputs * 34 // 32
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.scale, expected.scale)


def test_rounds_fp32_to_bf16(runtime: ExpertsRuntime) -> None:
    weight = torch.randn(32, 64) * torch.exp(20 * torch.randn(32, 64))
    weight[3, :4] = torch.tensor([float("nan"), float("inf"), 3.4e38, 1e-40])
    loaded = HostMatrix(runtime.native, 32, 64, "bf16")
    loaded.load_rows(0, weight)
    assert torch.equal(loaded.read().view(torch.int16)[:, 1:], weight.bfloat16().view(torch.int16)[:, 1:])
    assert loaded.read()[3, 0].isnan()


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", usable_isas())
def test_multiplies_like_float64(isa: str, dtype: str, kind: str) -> None:
    runtime = native_runtime(isa)
    weight, x = random_weight(160, 608), ACTIVATIONS[kind](19, 608).float()
    loaded = matrix(runtime, weight, dtype)
    wide = widened(loaded.read())
    expected, size = x.double() @ wide.T, x.double().abs() @ wide.abs().T
    if dtype == "bf16":
        bound = 608 * EPS * size  # a rounding for each input
    else:  # a rounding to 16 bits of the group's largest activation for each input, and two in fp32 for each group
        largest = x.view(19, -1, GROUP).abs().amax(-1).repeat_interleave(GROUP, dim=1).double()
        bound = largest @ wide.abs().T / 32512 + 2 * (608 / GROUP + 1) * EPS * size
    got = loaded(x)
    assert got.dtype == torch.float32
    assert ((got.double() - expected).abs() <= bound).all()
    assert (got.double() - expected).norm() / expected.norm() < (2e-6 if dtype == "bf16" else 2e-4)
    runtime.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_keeps_its_bits_in_any_batch_on_any_threads_and_isa(dtype: str) -> None:
    weight, x = random_weight(352, 288), torch.randn(150, 288)
    expected = None
    for isa in usable_isas():
        for threads in (1, 3):
            runtime = native_runtime(isa, threads)
            loaded = matrix(runtime, weight, dtype)
            got = loaded(x)
            expected = got if expected is None else expected
            assert torch.equal(got, expected)
            order = torch.randperm(len(x))
            for count in (*range(1, 14), 64, 65):
                assert torch.equal(loaded(x[order[:count]]), expected[order[:count]]), (isa, threads, count)
            runtime.close()


@pytest.mark.parametrize("rows", [32, 352])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nodes_give_the_bits_of_one(dtype: str, rows: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also where memory cannot be bound to a node, because there is none of its number."""
    weight, x = random_weight(rows, 288), torch.randn(70, 288)
    with closing(native_runtime(threads=1)) as runtime:
        one = [matrix(runtime, part, dtype) for part in (weight, weight[:32])]
        expected = [loaded(x) for loaded in one]
    warn_unbound.cache_clear()
    for nodes in (virtual_nodes(2, 2), virtual_nodes(5, 3), (NodeThreads(2, 90_000), NodeThreads(1, 90_001))):
        with closing(NativeRuntime(usable_isas()[0], sum(node.threads for node in nodes), nodes=nodes)) as runtime:
            parts = [matrix(runtime, part, dtype) for part in (weight, weight[:32])]
            assert parts[0].bound == (nodes[0].node is None)
            assert torch.equal(widened(parts[0].read()), widened(one[0].read()))
            assert torch.equal(parts[0](x[:1]), expected[0][:1])
            for got, whole in zip(multiply_all(parts, x), expected, strict=True):
                assert torch.equal(got, whole)
    assert len([record for record in caplog.records if "mbind" in record.message]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_matrices_at_once_give_what_each_gives(dtype: str, runtime: ExpertsRuntime) -> None:
    matrices = [matrix(runtime, random_weight(rows, 96), dtype) for rows in (64, 32, 320)]
    for tokens in (0, 1, 5, 70):
        x = torch.randn(tokens, 96)
        for got, one in zip(multiply_all(matrices, x), matrices, strict=True):
            assert got.shape == (tokens, one.shape[0])
            assert torch.equal(got, one(x))


def test_bf16_follows_ieee_and_int8_gives_nan_rows(runtime: ExpertsRuntime) -> None:
    weight, x = random_weight(64, 64).abs() + 0.01, torch.randn(6, 64)
    plain = {dtype: matrix(runtime, weight, dtype)(x) for dtype in DTYPES}
    x[1, 3], x[3, 60], x[4, 10] = float("nan"), float("inf"), 4e22
    for dtype in DTYPES:
        got = matrix(runtime, weight, dtype)(x)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2, 5]], plain[dtype][[0, 2, 5]])
        assert (got[3] == float("inf")).all() if dtype == "bf16" else got[3].isnan().all()
        assert got[4].isfinite().all() if dtype == "bf16" else got[4].isnan().all()


@pytest.mark.parametrize("bits", NOT_FINITE)
@pytest.mark.parametrize("isa", usable_isas())
def test_int8_gives_nan_for_every_row_that_is_not_finite(isa: str, bits: int) -> None:
    runtime = native_runtime(isa)
    weight, x = random_weight(64, 64), torch.randn(4, 64)
    set_bits(x, 2, 37, bits)
    got = matrix(runtime, weight, "int8")(x)
    assert got.isnan().all(dim=1).tolist() == [False, False, True, False]
    runtime.close()


def test_a_signal_handler_may_multiply_while_its_thread_waits_for_a_product() -> None:
    runtime = native_runtime("portable")
    long, wide = (matrix(runtime, random_weight(2048, inputs), "int8") for inputs in (512, 1024))
    x, y = torch.randn(600, 512), torch.randn(64, 1024)
    expected = long(x), wide(y)
    got: list[Tensor] = []
    before = signal.signal(signal.SIGALRM, lambda *_: got.append(wide(y)))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert torch.equal(long(x), expected[0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(got) == 1
    assert torch.equal(got[0], expected[1])
    runtime.close()


def test_gives_the_dtype_of_the_rows(runtime: ExpertsRuntime) -> None:
    loaded, x = matrix(runtime, random_weight(32, 64), "int8"), torch.randn(3, 64)
    assert torch.equal(loaded(x.bfloat16()), loaded(x.bfloat16().float()).bfloat16())
    with torch.inference_mode():
        assert torch.equal(loaded(x.T.contiguous().T), loaded(x))  # not contiguous


def test_wrong_arguments_are_named(runtime: ExpertsRuntime) -> None:
    with pytest.raises(ValueError, match="rows: expected a multiple of 32, got 33"):
        HostMatrix(runtime.native, 33, 64, "bf16")
    with pytest.raises(ValueError, match="dtype: expected one of bf16, int8, got 'fp8'"):
        HostMatrix(runtime.native, 32, 64, "fp8")
    loaded = matrix(runtime, random_weight(64, 64), "bf16")
    with pytest.raises(ValueError, match=r"x: expected shape \[3, 64\], got \[3, 32\]"):
        loaded(torch.randn(3, 32))
    with pytest.raises(ValueError, match="rows: expected at most 64, got 96"):
        loaded.load_rows(32, torch.randn(64, 64))
    with pytest.raises(ValueError, match="rows: expected a multiple of 32, got 20 from 0"):
        loaded.load_rows(0, torch.randn(20, 64))
    with pytest.raises(ValueError, match="matrices: expected equal inputs, got 32"):
        multiply_all([loaded, matrix(runtime, random_weight(64, 32), "bf16")], torch.randn(1, 64))
    misaligned = np.zeros(3 * 64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 64)
    with pytest.raises(ValueError, match="x: expected an aligned array, got a misaligned one"):
        loaded(torch.from_numpy(misaligned))
    loaded.close()
    with pytest.raises(EngineError, match="dense matrix: expected an open one, got a closed one"):
        loaded(torch.randn(1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_threads_run_while_a_matrix_is_read(dtype: str, runtime: ExpertsRuntime) -> None:
    loaded = HostMatrix(runtime.native, 4096, 2048, dtype)
    turns, ends = [0], threading.Event()

    def take_turns() -> None:
        while not ends.is_set():
            turns[0] += 1
            time.sleep(0)  # gives the interpreter away; this thread takes it from nobody

    interval = sys.getswitchinterval()
    other = threading.Thread(target=take_turns)
    other.start()
    try:
        sys.setswitchinterval(60)
        seen = []
        for _ in range(20):
            before = turns[0]
            loaded._matrix.read()
            seen.append(turns[0] - before)
    finally:
        sys.setswitchinterval(interval)
        ends.set()
        other.join()
    assert max(seen) > 0
