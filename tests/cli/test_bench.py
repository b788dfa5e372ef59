"""`hybrid-k2 bench`: figures on stdout, one clear error for what cannot be measured."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from hybrid_k2.experts import isa_facts
from hybrid_k2.native import NATIVE_ERROR
from tests.cli.conftest import ONE_THREAD, Done, Pipes

Call = Callable[..., Done]
SMALL = (
    "bench",
    "experts",
    "--hidden",
    "64",
    "--intermediate",
    "32",
    "--experts",
    "4",
    "--top-k",
    "2",
    "--rounds",
    "1",
)

pytestmark = [
    pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}"),
    pytest.mark.usefixtures("small_probes"),
]


def test_one_json_object_on_stdout(call: Call) -> None:
    numerics = [name for name in ("exact", "fast", "bf16") if any(fact.offers(name) for fact in isa_facts())]
    done = call(*SMALL, "--tokens", "1,3", "--threads", "1", "--numerics", ",".join(numerics), "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert set(report) == {"raw_read_gbps", "peak_gops", "tuning", "results"}
    assert list(report["peak_gops"]) == numerics
    names = "tokens numerics isa threads ms gbps gops distinct_experts share_of_floor error"
    assert all(list(result) == names.split() for result in report["results"])
    assert all(type(value) in (int, float, str) for result in report["results"] for value in result.values())
    assert [(r["numerics"], r["tokens"]) for r in report["results"]] == list(product(numerics, (1, 3)))
    assert "round 1 of 1" in done.err


def test_a_table_without_notes(call: Call) -> None:
    done = call(*SMALL, "--tokens", "2", "--isa", "portable", "--quiet")
    assert done.code == 0, done.err
    assert done.err == ""
    assert "of the floor" in done.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--hidden", "65"), "multiple of 32"),
        (("--tokens", "1,x"), "1,x"),
        (("--tokens", "0"), "1..65536"),
        (("--numerics", "exakt"), "exakt"),
        (("--top-k", "5"), "at most the 4 experts"),
        (("--threads", "0"), "equal to 1"),
        (("--threads", "4097"), "equal to 4096"),
        (("--tokens", "1" * 5000), "1..65536"),
        (("--experts", "9" * 40), "equal to 4096"),
        (("--rounds", "0"), "equal to 1"),
    ],
)
def test_wrong_usage(call: Call, arguments: tuple[str, ...], expected: str) -> None:
    done = call(*SMALL, *arguments)
    assert done.code == 2
    assert expected in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--experts", "4096", "--hidden", "65536", "--intermediate", "65536"), "available"),
        (("--isa", "sse9"), "got 'sse9'"),
        (("--isa", ""), "got ''"),
    ],
)
def test_what_the_machine_cannot_do(call: Call, arguments: tuple[str, ...], expected: str) -> None:
    done = call(*SMALL, *arguments)
    assert done.code == 1, done.err
    assert done.err.count("error: ") == 1
    assert expected in done.err
    assert "Traceback" not in done.err


def test_threads_that_cannot_be_measured_are_refused_before_any_work(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_k2.experts.read_probe.host_memory", lambda: (1 << 34, 1 << 30))
    done = call(*SMALL, "--threads", "64")
    assert done.code == 1
    assert "with 64 threads" in done.err
    assert "fewer threads" in done.err


def test_memory_that_runs_out_is_one_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise MemoryError("memory: expected 5 bytes")

    monkeypatch.setattr("hybrid_k2.bench.experts.measure_experts", full)
    done = call(*SMALL)
    assert done.code == 1
    assert "got none left" in done.err
    assert "fewer --experts" in done.err


def test_overlap_on_the_twin(call: Call) -> None:
    small = ("--scale", "8", "--layers", "2", "--experts", "8", "--context", "5", "--steps", "1")
    done = call("bench", "overlap", "--sequences", "2", *small, "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert 0 < json.loads(done.out)["overlap_share"] <= 1


def test_a_trace_that_cannot_be_written_is_refused_before_any_work(call: Call, tmp_path: Path) -> None:
    done = call("bench", "overlap", "--trace", tmp_path / "nowhere" / "trace.json")
    assert (done.code, done.out) == (1, "")
    assert "error: " in done.err
    assert "expected a trace file that can be written, got No such file or directory" in done.err
    assert "step 1" not in done.err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--device", "tpu"), ("--scale", "3"), ("--sequences", "0"), ("--sequences", "1024"), ("--context", "200000")],
)
def test_wrong_usage_of_overlap(call: Call, option: str, value: str) -> None:
    done = call("bench", "overlap", option, value)
    assert (done.code, done.out) == (2, "")
    assert option in done.err


MODEL = ("bench", "model", *ONE_THREAD)
FEW = ("--prompt", "3", "--sequences", "1,2", "--depth", "4", "--tokens", "2", "--repeat", "1")


def test_a_model_as_json(call: Call, babbler: Path) -> None:
    done = call("bench", "model", babbler, *ONE_THREAD, *FEW, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    names = "model rules experts_backend threads raw_read_gbps peak_gops results"
    assert list(report) == names.split()
    names = "phase sequences depth tokens tokens_per_s ms experts read_bytes floor_ms share_of_floor"
    assert all(list(result) == names.split() for result in report["results"])
    assert [result["phase"] for result in report["results"]] == ["prompt", "decode", "decode"]
    assert (report["model"], report["threads"]) == (str(babbler), 1)
    for said in ("one_thread.yaml (as asked)", "weights read per decoded token", "ready after", "round 1 of 1"):
        assert said in done.err


def test_the_demo_model_as_a_table(call: Call) -> None:
    done = call(*MODEL, *FEW, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("demo, by ")
    assert [line.split()[0] for line in done.out.splitlines()[3:]] == ["prompt", "decode", "decode"]


def test_a_model_on_the_twin(call: Call) -> None:
    done = call("bench", "model", "--rules", "twin", *FEW, "--quiet", "--json")
    assert (done.code, done.err) == (0, "")
    assert [list(result["read_bytes"]) for result in json.loads(done.out)["results"]] == [["host"]] * 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--prompt", "0"),
        ("--prompt", "1,x"),
        ("--sequences", "65537"),
        ("--depth", "0"),
        ("--tokens", "0"),
        ("--repeat", "0"),
        ("--rules", " "),
        ("--seed", "x"),
    ],
)
def test_wrong_usage_of_model(call: Call, option: str, value: str) -> None:
    done = call("bench", "model", option, value)
    assert (done.code, done.out) == (2, "")
    assert option in done.err


def test_a_model_that_is_not_there(call: Call, tmp_path: Path) -> None:
    done = call("bench", "model", tmp_path / "nothing")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("error: ") == 1
    assert str(tmp_path / "nothing") in done.err


def test_more_than_the_cache_holds_is_refused_before_weights_are_read(call: Call) -> None:
    done = call(*MODEL, "--prompt", "100000")
    assert (done.code, done.out) == (1, "")
    assert "error: bench model: --prompt: expected at most 65536 tokens" in done.err
    assert "ready after" not in done.err


def test_ctrl_c_ends_a_measurement(start: Callable[..., Pipes], babbler: Path) -> None:
    process = start("bench", "model", babbler, *ONE_THREAD, *FEW, "--repeat", "10000")
    said = b""
    while b"round 3 of" not in said:
        said = process.stderr.readline()
        assert said, "it ended by itself"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in err
