"""The comparison with other packages: what it reports, what it skips and why. None of the packages is needed."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers.__main__ import main
from bench.peers.exchange import MATRICES, Matrix, Sizes, read_experts, widen
from bench.peers.inputs import Inputs
from bench.peers.process import AbsentError, Contender
from bench.peers.q4_0 import to_q4_0
from bench.peers.report import Report, Samples
from bench.peers.worker import Session
from hybrid_k2.checkpoint import PackedWeight
from hybrid_k2.experts.cpu import native_isas

needs_native = pytest.mark.skipif(not native_isas(), reason="the native kernels are not built")
TINY = ["--hidden=64", "--intermediate=32", "--experts=6", "--top-k=2", "--threads=1", "--rounds=2", "--tokens=1,3"]
TINY_NAMES = ["exact", "fast"]


def script(folder: Path, text: str) -> str:
    """Write an interpreter that does something else than Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def reason(python: str, folder: Path, timeout: float = 60.0, sizes: dict[str, int] | None = None) -> str:
    """Return why a contender on this interpreter is left out."""
    contender = None
    try:
        contender = Contender("ggml", python, folder, timeout=timeout)
        contender.ask("load", sizes=sizes or {}, threads=1)
    except AbsentError as error:
        return str(error)
    finally:
        if contender is not None:
            contender.close()
    raise AssertionError("expected a reason, got a layer")


def samples(**seconds: list[float]) -> Samples:
    """Make rounds of 2 tokens, 4 experts of 3 GB and 8e9 operations, at 10 GB/s of raw read."""
    rounds = [dict(zip(seconds, each, strict=True)) for each in zip(*seconds.values(), strict=True)]
    count = len(rounds)
    errors = dict.fromkeys(seconds, 0.25)
    return Samples(2, 3 * 10**9, 8e9, [4] * count, [10.0] * count, rounds, errors)


def report(each: Samples, **skipped: str) -> Report:
    """Make a report of one number of tokens."""
    return Report({"cpu": "Some CPU", "threads": 2}, {}, 3, "wall", 10.0, {}, skipped, tuple(each.results()))


def test_ratios_are_medians_within_rounds() -> None:
    exact, peer = samples(exact=[1.0, 2.0, 4.0], peer=[2.0, 6.0, 4.0]).results()
    assert (exact.ms, exact.times_exact, exact.times_fast) == (2000.0, 1.0, None)
    assert (peer.ms, peer.times_exact) == (4000.0, 2.0)  # ratios 2, 3, 1
    assert (peer.gbps, peer.gops, peer.distinct_experts) == (3.0, 2.0, 4)
    assert peer.share_of_read == pytest.approx(0.3)


def test_a_peer_that_left_keeps_its_rounds() -> None:
    each = samples(exact=[1.0, 2.0, 4.0], peer=[2.0, 6.0, 4.0])
    del each.rounds[2]["peer"]
    assert [(r.contender, r.ms) for r in each.results()] == [("exact", 2000.0), ("peer", 4000.0)]


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (3.0, "against peer, the fastest peer, exact wins by 3.00x, fast wins by 1.50x"),
        (1.96, "against peer, the fastest peer, exact wins by 1.96x, fast is level"),
        (0.5, "against peer, the fastest peer, exact loses by 2.00x, fast loses by 4.00x"),
    ],
)
def test_verdicts_say_who_wins(peer: float, said: str) -> None:
    (verdict,) = report(samples(exact=[1.0], fast=[2.0], peer=[peer], slow=[9.0])).verdicts()
    assert verdict == f"2 tokens: {said}"


def test_a_run_without_peers_says_so() -> None:
    assert report(samples(exact=[1.0], fast=[1.0])).verdicts() == ["2 tokens: no peer to compare with"]


def test_table_and_json_hold_everything() -> None:
    found = report(samples(exact=[1.0], peer=[4.0]), other="not there")
    table = found.table()
    row = next(line for line in table.splitlines() if " peer " in line and "4000.00" in line)
    assert row.split() == ["2", "4", "peer", "4000.00", "3.0", "30%", "2", "4.00x", "2.5e-01"]
    assert table.endswith("skipped other: not there")
    data = json.loads(json.dumps(found.to_json()))
    assert data["skipped"] == {"other": "not there"}
    assert [(r["contender"], r["times_exact"]) for r in data["results"]] == [("exact", 1.0), ("peer", 4.0)]


def matrix(scale: torch.Tensor) -> PackedWeight:
    words = torch.randint(-(2**31), 2**31, (len(scale), scale.shape[1] * 4), dtype=torch.int32)
    return PackedWeight(words, scale.to(torch.bfloat16))


def q4_0(weight: PackedWeight) -> tuple[np.ndarray, bool]:
    """Convert, and read the blocks back by the definition of the format."""
    got = to_q4_0(Matrix(weight.packed.numpy(), weight.scale.view(torch.uint16).numpy()))
    assert got.blocks.dtype.itemsize == 18
    nibbles = got.blocks["nibbles"].astype(np.int32)
    values = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1) - 8
    return (values * got.blocks["scale"].astype(np.float64)[..., None]).reshape(weight.shape), got.exact


def test_q4_0_has_the_same_weights() -> None:
    exponent = torch.randint(-17, 15, (24, 5))
    weight = matrix((1 + torch.rand(24, 5)) * 2.0**exponent * 0.99)
    weight = PackedWeight(weight.packed, weight.scale.clamp(min=2.0**-17))
    values, exact = q4_0(weight)
    assert exact
    assert (values == weight.dequantize(torch.float64).numpy()).all()


@pytest.mark.parametrize("scale", [1.5 * 2.0**-24, 1.0078125 * 2.0**-18, 70000.0])
def test_q4_0_says_when_a_scale_does_not_fit(scale: float) -> None:
    scales = torch.full((3, 2), 0.01)
    scales[2, 1] = scale
    weight = matrix(scales)
    assert not to_q4_0(Matrix(weight.packed.numpy(), weight.scale.view(torch.uint16).numpy())).exact


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path, Sizes(64, 32, 7, 3, most_tokens=5, distinct=2), seed=int(torch.seed() % 2**32))


def test_routing_takes_experts_in_turn(inputs: Inputs) -> None:
    distinct = inputs.route(1)
    ids = np.load(inputs.folder / "ids.npy")
    assert ids.shape == (8, 1, 3)
    assert ids.reshape(-1).tolist() == [number % 7 for number in range(24)]
    assert distinct == 3
    inputs.route(5)
    ids, weights = (np.load(inputs.folder / f"{name}.npy") for name in ("ids", "weights"))
    assert ids.shape == weights.shape == (1, 5, 3)
    assert ids[0, 0].tolist() == [3, 4, 5]
    assert all(len(set(row)) == 3 for row in ids[0].tolist())


def test_error_is_measured_against_the_shared_weights(inputs: Inputs) -> None:
    inputs.route(5)
    hidden = widen(np.load(inputs.folder / "hidden.npy")).astype(np.float64)
    ids, weights = (np.load(inputs.folder / f"{name}.npy")[-1] for name in ("ids", "weights"))
    experts = [
        {
            name: PackedWeight(
                torch.from_numpy(np.array(each[name].words)),
                torch.from_numpy(np.array(each[name].scales)).view(torch.bfloat16),
            ).dequantize(torch.float64).numpy()
            for name in MATRICES
        }
        for _, each in read_experts(inputs.folder, inputs.sizes)
    ]  # fmt: skip
    right = np.zeros((5, 64))
    for token in range(5):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            w = experts[expert]
            gate = w["gate"] @ hidden[token]
            right[token] += weight * (w["down"] @ (gate / (1 + np.exp(-gate)) * (w["up"] @ hidden[token])))
    assert inputs.error(right) < 1e-12
    assert inputs.error(right * 1.25) == pytest.approx(0.25)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    assert "/nowhere/python does not start: No such file" in reason("/nowhere/python", tmp_path)


def test_a_build_for_another_cpu(tmp_path: Path) -> None:
    said = reason(script(tmp_path, "echo loading >&2; kill -ILL $$"), tmp_path)
    assert "ended by SIGILL, its build does not support this CPU: loading" in said


def test_a_process_that_ends(tmp_path: Path) -> None:
    said = reason(script(tmp_path, "echo 'No module named numpy' >&2; exit 3"), tmp_path)
    assert said.endswith("ended with status 3: No module named numpy")


def test_a_process_that_says_something_else(tmp_path: Path) -> None:
    assert "expected an answer in JSON" in reason(script(tmp_path, "echo hello; sleep 60"), tmp_path)


def test_a_process_that_says_nothing(tmp_path: Path) -> None:
    assert reason(script(tmp_path, "exec sleep 60"), tmp_path, timeout=0.1) == "no answer within 0 s"


@pytest.mark.skipif(find_spec("libggml") is not None, reason="the package libggml-python is installed here")
def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    np.save(tmp_path / "hidden.npy", np.zeros((1, 32), np.uint16))
    sizes = {"hidden": 32, "intermediate": 32, "experts": 1, "top_k": 1, "most_tokens": 1, "distinct": 1}
    said = reason(sys.executable, tmp_path, sizes=sizes)
    assert said == f"ModuleNotFoundError: No module named 'libggml' ({sys.executable})"


class TwoThreads:
    """A layer whose second thread works while the first one waits."""

    about: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool

    def prepare(self, *arguments: Any) -> None:
        pass

    def run(self) -> None:
        self.pool.submit(self.work).result()

    def work(self) -> None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass

    def output(self) -> np.ndarray:
        return np.zeros((1, 4), np.float32)


def test_processor_time_is_that_of_the_busiest_thread(tmp_path: Path) -> None:
    session = Session("two", tmp_path)
    session.hidden = np.zeros((2, 4), np.uint16)
    np.save(tmp_path / "ids.npy", np.zeros((2, 1, 1), np.int32))
    np.save(tmp_path / "weights.npy", np.zeros((2, 1, 1), np.float32))
    with ThreadPoolExecutor(1) as pool:
        session.layer = TwoThreads(pool)
        answer = session.run(1)
    assert all(0.03 <= seconds < 0.06 for seconds in answer["cpu"])
    assert all(wall >= cpu - 0.01 for wall, cpu in zip(answer["wall"], answer["cpu"], strict=True))
    assert len(answer["wall"]) == 2


def test_processor_time_has_no_share_of_the_bandwidth() -> None:
    each = samples(exact=[1.0], peer=[4.0])
    each.read_gbps.clear()
    found = Report({"cpu": "Some CPU", "threads": 1}, {}, 1, "cpu", None, {}, {}, tuple(each.results()))
    assert [r.share_of_read for r in found.results] == [None, None]
    assert "1 threads; times are processor time" in found.table()


@needs_native
def test_ours_are_measured_where_peers_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaves = script(tmp_path, """read line; echo '{"about": {"version": "7"}}'; read line; exit 5""")
    output = tmp_path / "out.json"
    main(
        [*TINY, "--kt-python=/nowhere/python", f"--ggml-python={leaves}", f"--output={output}", "--ik-python=/nowhere"]
    )
    printed = capsys.readouterr().out
    data = json.loads(output.read_text())
    assert [(r["tokens"], r["contender"]) for r in data["results"]] == [(t, n) for t in (1, 3) for n in TINY_NAMES]
    for result in data["results"]:
        assert 0 < result["error"] < (4e-4 if result["contender"] == "exact" else 8e-2)
        assert result["ms"] > 0
    assert data["contenders"]["exact"]["activations"] == "16 bits"
    assert data["contenders"]["ggml"] == {"version": "7"}
    assert set(data["skipped"]) == {"kt-kernel", "ggml", "ik_llama"}
    assert data["skipped"]["ggml"].endswith("ended with status 5")
    assert data["raw_read_gbps"] > 0
    assert "1 token: no peer to compare with" in printed
    assert "skipped kt-kernel: /nowhere/python does not start" in printed


def test_too_many_experts_are_refused_before_anything_is_made() -> None:
    with pytest.raises(SystemExit, match=r"error: expected \d+ MiB of memory"):
        main(["--experts=4096", "--hidden=65536", "--intermediate=65536"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--numerics=exactly", "expected exact or fast, got 'exactly'"),
        ("--numerics=", "expected exact or fast, got ''"),
        ("--tokens=1,x", "expected a number 1..65536, got 'x'"),
        ("--tokens=4,0", "expected a number 1..65536, got '0'"),
        ("--tokens=", "expected a number 1..65536, got ''"),
        ("--hidden=65", "expected a number 32..65536, a multiple of 32, got '65'"),
        ("--intermediate=0", "expected a number 32..65536, a multiple of 32, got '0'"),
        ("--experts=" + "9" * 5000, "expected a number 1..4096"),
        ("--top-k=7", "expected at most the 6 experts of the layer, got 7"),
        ("--rounds=0", "expected a number 1..10000, got '0'"),
        ("--threads=0", "expected a number 1..4096, got '0'"),
        ("--seed=-1", "expected a number 0..9223372036854775807, got '-1'"),
        ("--output=/nowhere/x.json", "expected a file that can be written, got No such file or directory"),
    ],
)
def test_wrong_usage(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*TINY, argument])
    assert ended.value.code == 2
    assert f"argument {argument.partition('=')[0]}: {said}" in capsys.readouterr().err


def test_wrong_usage_leaves_no_file_behind(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("{}")
    for output in (new, old):
        with pytest.raises(SystemExit):
            main([*TINY, f"--output={output}", "--rounds=0"])
    assert not new.exists()
    assert old.read_text() == "{}"
