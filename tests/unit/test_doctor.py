"""`hybrid-k2 doctor`: the good and the bad case of each line."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_k2.bench.slice import k26_config
from hybrid_k2.cli.doctor import disk, gpu, kernels
from hybrid_k2.cli.doctor import model as model_checks
from hybrid_k2.cli.doctor.extras import EXTRAS, check_extras
from hybrid_k2.cli.doctor.finding import Finding, look
from hybrid_k2.cli.doctor.host import check_bandwidth, check_cpu, check_memory
from hybrid_k2.engine import Engine
from hybrid_k2.errors import HardwareError
from hybrid_k2.experts import IsaFact
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.host.huge_pages import SETTING, transparent_huge_pages
from hybrid_k2.host.topology import HostNode
from hybrid_k2.native import NATIVE_ERROR
from hybrid_k2.placement import Gpu, Machine, make_plan, shipped_rules
from tests.conftest import REPO
from tests.generators import write_checkpoint
from tests.unit.placements import GIB, K2_6, machine

needs_native = pytest.mark.skipif(NATIVE_ERROR is not None, reason=f"no native extension: {NATIVE_ERROR}")
ONE_THREAD = str(REPO / "tests" / "cli" / "one_thread.yaml")


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_an_error_is_a_finding_and_what_came_before_it_stands() -> None:
    def check(error: Exception) -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise error

    first, second = look("probe", lambda: check(HardwareError("no such thing", hint="buy one")))
    assert first.status == "ok"
    assert second == Finding("probe", "failed", "no such thing", "buy one")
    *_, second = look("probe", lambda: check(ZeroDivisionError("oops")))
    assert (second.status, second.text) == ("failed", "ZeroDivisionError: oops")
    assert "report" in (second.hint or "")
    with pytest.raises(KeyboardInterrupt):
        list(look("probe", lambda: check(KeyboardInterrupt())))  # type: ignore[arg-type]


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_cpu(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor : 0\nmodel name\t: Made Up 9000\nflags : x\n")
    found = only(check_cpu(machine(cores=1), tmp_path))
    assert (found.status, found.text) == ("ok", "Made Up 9000, 1 core for this process, one NUMA node")
    limited = replace(machine(cores=2), cpu_quota=True)
    assert only(check_cpu(limited, tmp_path)).text.endswith("2 cores for this process, one NUMA node, "
                                                            "a control group limits its CPU time")  # fmt: skip
    nodes = tuple(HostNode(number, ((number,),), GIB) for number in range(2))
    assert only(check_cpu(replace(limited, nodes=nodes), tmp_path)).status == "ok"
    moving = only(check_cpu(replace(limited, nodes=nodes, numa_balancing=True), tmp_path))
    assert moving.status == "warning"
    assert "2 NUMA nodes" in moving.text
    assert "numa_balancing=0" in (moving.hint or "")
    assert only(check_cpu(machine(), tmp_path / "nothing")).text.startswith(platform.machine())


def test_memory_and_pages(tmp_path: Path) -> None:
    memory, pages = check_memory(machine(64), tmp_path)
    assert (memory.status, memory.text) == ("ok", "64.00 GiB of 64.00 GiB free")
    assert (pages.status, pages.text) == ("ok", "the system does not say")
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    write(tmp_path, SETTING, "always madvise [never]\n")
    memory, pages = check_memory(machine(64), tmp_path)
    assert memory.text.endswith("; a control group allows 2.00 GiB")
    assert pages.status == "warning"
    assert SETTING in (pages.hint or "")
    write(tmp_path, SETTING, "always [madvise] never\n")
    assert transparent_huge_pages(tmp_path) == "madvise"
    write(tmp_path, SETTING, "nonsense\n")
    assert transparent_huge_pages(tmp_path) is None


def test_bandwidth_and_k26(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        def measure_read_gbps(self, seconds: float) -> float:
            return 431.3

        def close(self) -> None:
            pass

    monkeypatch.setattr("hybrid_k2.cli.doctor.host.open_experts", lambda *a, **k: Runtime())
    found = by_name(check_bandwidth(machine(768)))
    plan = make_plan(shipped_rules("host"), K2_6, machine(768))
    same = make_plan(shipped_rules("host"), k26_config(), machine(768))
    assert (same.rows, same.overheads, same.bytes_per_token) == (plan.rows, plan.overheads, plan.bytes_per_token)
    assert "431.3 GB/s read by 16 threads" in found["bandwidth"].text
    alone = 431.3e9 / plan.bytes_per_token
    routed = 431.3e9 / (60 * 8 * 3 * 7168 * 2048 * 18 / 32)
    assert f"at most {alone:.2g} tokens/s on the host alone, {routed:.2g} tokens/s" in found["bandwidth"].text
    assert found["K2.6"].status == "ok"
    assert found["K2.6"].text.startswith("fits: ")
    small = by_name(check_bandwidth(machine(64)))
    assert small["bandwidth"].status == "ok"
    assert small["K2.6"].status == "warning"
    assert "does not fit: " in small["K2.6"].text
    assert small["K2.6"].hint


def test_the_bandwidth_is_measured() -> None:
    found = by_name(check_bandwidth(replace(Machine.probe(), cores=1, core_cpus=())))
    assert re.match(r"\d+\.\d GB/s read by 1 thread; ", found["bandwidth"].text)


def test_too_little_memory_to_measure_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_k2.experts.read_probe.host_memory", lambda: (1 << 34, 1 << 20))
    found = by_name(check_bandwidth(replace(machine(64), cores=1)))
    assert found["bandwidth"].status == "warning"
    assert found["bandwidth"].text.startswith("not measured: ")
    assert found["K2.6"].status == "warning"


@needs_native
def test_kernels() -> None:
    found = only(kernels.check_kernels())
    assert found.status == "ok", found.text
    assert "portable (exact, fast" in found.text


@needs_native
@pytest.mark.parametrize(
    ("numerics", "spoil", "expected"),
    [
        ("exact", lambda out: out + 1, r"portable, exact: expected an error of at most 4e-04 .*, got \d\.\de"),
        ("fast", lambda out: out * torch.nan, "portable, fast: expected an error of at most 8e-02 .*, got nan"),
        ("fast", lambda out: out * (1 + 2**-20), "portable, fast: expected the bits of "),
    ],
)
def test_kernels_that_return_something_else(
    monkeypatch: pytest.MonkeyPatch, numerics: str, spoil: Callable[[Tensor], Tensor], expected: str
) -> None:
    if "the bits of" in expected and sum(fact.offers(numerics) for fact in kernels.isa_facts()) < 2:
        pytest.skip("one instruction set cannot be compared with another")
    computed = kernels._compute

    def compute(isa: str, name: str, *rest: Any) -> Tensor:
        out = computed(isa, name, *rest)
        return spoil(out) if (isa, name) == ("portable", numerics) else out

    monkeypatch.setattr(kernels, "_compute", compute)
    found = only(kernels.check_kernels())
    assert found.status == "failed"
    assert re.search(expected, found.text)
    assert ";" not in found.text  # no other one is blamed
    assert "report" in (found.hint or "")


@needs_native
def test_a_wrong_kernel_is_no_measure_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [fact for fact in kernels.isa_facts() if fact.offers("exact")]
    computed = kernels._compute

    def compute(isa: str, name: str, *rest: Any) -> Tensor:
        return computed(isa, name, *rest) * (-1 if (isa, name) == (facts[0].name, "exact") else 1)

    monkeypatch.setattr(kernels, "_compute", compute)
    found = only(kernels.check_kernels())
    assert found.status == "failed"
    assert found.text.count("expected") == 1


@needs_native
def test_the_real_layer_is_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = NativeExperts.forward
    monkeypatch.setattr(NativeExperts, "forward", lambda self, *given: forward(self, *given).roll(1, 0))
    found = only(kernels.check_kernels())
    assert found.status == "failed"
    assert found.text.count("expected an error of at most") >= 2  # all of them, in all numerics


def test_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_k2.experts.cpu._native", None)
    found = only(kernels.check_kernels())
    assert found.status == "warning"
    assert "numba" in found.text
    assert "g++" in (found.hint or "")


@needs_native
def test_forced_kernels_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_K2_ISA", "avx9")
    found = only(look("kernels", kernels.check_kernels))
    assert found.status == "failed"
    assert "got 'avx9'" in found.text


@needs_native
def test_kernels_that_are_not_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [
        IsaFact("wide", built=True, supported=False, missing=("avx1024",), numerics=("exact",)),
        IsaFact("other", built=False, supported=True),
        IsaFact("portable", built=True, supported=True, chosen=True, numerics=("exact",)),
    ]
    monkeypatch.setattr(kernels, "isa_facts", lambda: facts)
    assert only(kernels.check_kernels()) == Finding(
        "kernels",
        "ok",
        "portable is used; as the reference computes: portable (exact); "
        "not here: wide needs avx1024, other is not built",
    )


def test_no_gpu() -> None:
    found = only(gpu.check_gpus(machine()))
    assert (found.status, found.text) == ("ok", "none (no NVIDIA driver): everything runs on the host")
    broken = only(gpu.check_gpus(machine(note="an NVIDIA driver is present, but torch 2.9 is built without CUDA")))
    assert broken.status == "warning"
    assert "without CUDA" in broken.text
    assert broken.hint


def test_a_gpu_is_named_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_kernel", lambda device: [Finding("gpu kernels", "ok", str(device))])
    card = Gpu(1, "card", 80 * GIB, 79 * GIB, (9, 0))
    first, second = gpu.check_gpus(replace(machine(), gpus=(card,)))
    assert first.text.startswith("cuda:1: card, 79.00 GiB of 80.00 GiB free, compute capability 9.0; torch for CUDA")
    assert second.text == "cuda:1"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "have_triton", lambda: False)
    found = only(gpu.check_kernel(torch.device("cuda:0")))
    assert found.status == "warning"
    assert "pip install 'hybrid-k2[gpu]'" in (found.hint or "")


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    here: set[str] = {"fastapi", "uvicorn", "prometheus_client", "llguidance"}
    monkeypatch.setattr("hybrid_k2.cli.doctor.extras.find_spec", lambda name: name if name in here else None)
    monkeypatch.setattr("hybrid_k2.cli.doctor.extras.version", lambda name: "1.2")
    found = by_name(check_extras(machine()))
    assert found.keys() == {"[serve]", "[images]", "[gpu]"}
    assert found["[serve]"].status == found["[gpu]"].status == "ok"
    assert "uvicorn 1.2" in found["[serve]"].text
    assert "no GPU that would want it" in found["[gpu]"].text
    assert (found["[images]"].status, "pillow not installed" in found["[images]"].text) == ("warning", True)
    here.remove("uvicorn")
    found = by_name(check_extras(machine(64, 24)))
    assert found["[serve]"].status == found["[gpu]"].status == "warning"
    assert found["[serve]"].text.endswith(": uvicorn not installed")
    assert found["[serve]"].hint == "for that: pip install 'hybrid-k2[serve]'"


def test_the_extras_are_those_of_the_package() -> None:
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    listed = dict(re.findall(r"^(\w+) = \[(.*?)\]", table, re.MULTILINE | re.DOTALL))
    assert {"serve", "gpu"} <= listed.keys()
    for extra in EXTRAS.keys() & listed.keys():
        declared = re.findall(r'"([A-Za-z0-9_-]+)[>=]', listed[extra])
        assert {name.lower() for name in declared} >= {name.lower() for name in EXTRAS[extra][1].values()}


def test_the_demo_model() -> None:
    found = only(model_checks.check_demo())
    assert found.status == "ok", found.text
    assert "it says 42" in found.text


def test_a_demo_model_that_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Engine.chat
    monkeypatch.setattr(Engine, "chat", lambda self, *a, **k: replace(chat(self, *a, **k), content="41, I think"))
    found = only(model_checks.check_demo())
    assert found.status == "failed"
    assert "expected 42 in the answer, got '41, I think'" in found.text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def test_a_checkpoint_that_would_load(folder: Path) -> None:
    found = by_name(model_checks.check_model(str(folder), ONE_THREAD))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found.keys() == {"checkpoint", "plan", "disk"}
    assert found["checkpoint"].text.startswith("complete: ")
    assert found["plan"].text.endswith("one_thread.yaml")


def test_a_file_that_is_cut_off(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    found = only(model_checks.check_model(str(folder), ONE_THREAD))
    assert (found.name, found.status) == ("checkpoint", "failed")
    assert file.name in found.text


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nothing"), "nothing"):
        found = only(model_checks.check_model(missing, None))
        assert (found.name, found.status) == ("checkpoint", "failed")


def test_rules_that_do_not_suit(folder: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    text = Path(ONE_THREAD).read_text(encoding="utf-8")
    rules.write_text(text.replace("host: {threads: 1}", "host: {threads: 1, memory: 1KiB}"))
    found = by_name(model_checks.check_model(str(folder), str(rules)))
    assert found["checkpoint"].status == "ok"
    assert found["plan"].status == "failed"
    assert "1.00 KiB" in found["plan"].text


def test_of_a_repository_only_the_configuration_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(shipped_rules("host"), K2_6, machine(768))
    monkeypatch.setattr(model_checks, "plan_checkpoint", lambda model, rules: plan)
    found = by_name(model_checks.check_model("moonshotai/Kimi-K2.6", None))
    assert found["checkpoint"].status == "warning"
    assert found["plan"].status == "ok"
    assert "on host, by rules/host.yaml" in found["plan"].text


def test_the_disk_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    large.write_bytes(b"\1" * (3 * disk.PIECE + 5))
    small.write_bytes(b"\2")
    monkeypatch.setattr(disk, "SLOW", 0)
    found = only(disk.measure_read([small, large]))
    assert found.status == "ok"
    assert re.match(r"[\d.]+ [KMG]iB/s (past|with) the page cache, one thread; at that speed 24\.00 MiB", found.text)
    monkeypatch.setattr(disk, "SLOW", 1e15)
    assert only(disk.measure_read([small, large])).status == "warning"
    assert "too small" in only(disk.measure_read([small])).text


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"\1" * (2 * disk.PIECE))

    def fail(*given: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.os, "preadv", fail)
    found = only(disk.measure_read([file]))
    assert found.status == "failed"
    assert "cannot be read: Input/output error" in found.text


def test_the_page_names_every_line() -> None:
    page = (REPO / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name in ("software", "cpu", "kernels", "memory", "huge pages", "bandwidth", "K2.6", "gpu", "gpu kernels",
                 "demo model", "checkpoint", "plan", "disk", *(f"[{extra}]" for extra in EXTRAS)):  # fmt: skip
        assert f"`{name}`" in page, name
