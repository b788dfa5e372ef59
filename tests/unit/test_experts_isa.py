"""Instruction sets: what is built, what the CPU has, what is chosen; and the choice of a backend."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import pytest

from hybrid_k2.errors import IsaError
from hybrid_k2.experts import IsaFact, cpu, isa_facts, open_experts
from hybrid_k2.experts import open as open_module
from hybrid_k2.experts.isa import choose_isa
from tests.unit.experts_common import native_runtime, usable_isas

FACTS = [
    IsaFact("amx", built=False, supported=True),
    IsaFact("avx512_vnni", True, supported=False, missing=("avx512vl", "avx512_vnni"), numerics=("exact", "fast")),
    IsaFact("avx512_bf16", built=True, supported=True, numerics=("bf16",)),
    IsaFact("avx2", built=True, supported=True, numerics=("exact", "fast")),
    IsaFact("portable", built=True, supported=True, numerics=("exact", "fast")),
]
# CPUID leaf 1 ecx, leaf 7 ebx, ecx and edx, leaf 7.1 eax, XCR0, as these CPUs report them.
ZEN_4 = (0x7EFA320B, 0xF1BF97A9, 0x00405FCE, 0x10000010, 0x00000020)
AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}
# Zen 4's registers with AMX's bits as the manual numbers them.
WITH_AMX = (*ZEN_4[:3], ZEN_4[3] | 1 << 22 | 1 << 24, ZEN_4[4])
RECORDED = {
    "Zen 4": ((*ZEN_4, 0x2E7), AVX512 | {"avx512_vnni", "avx512_bf16"}),
    "Zen 3": ((0x7EFA320B, 0x219C97A9, 0x0040069C, 0x0, 0x0, 0x207), {"avx2", "fma"}),
    "Skylake-SP": ((0x7FFEFBFF, 0xD39FFFFB, 0x00000008, 0x0, 0x0, 0x2E7), AVX512),
    "Zen 4 whose system does not save the 512-bit registers": ((*ZEN_4, 0x7), {"avx2", "fma"}),
    "Zen 4 whose system saves no wide registers": ((*ZEN_4, 0x0), set()),
    "a CPU with AMX": ((*WITH_AMX, 0x602E7), AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"}),
    "a CPU with AMX whose system saves no tiles": ((*WITH_AMX, 0x2E7), AVX512 | {"avx512_vnni", "avx512_bf16"}),
    "Nehalem": ((0x0098E3FD, 0x0, 0x0, 0x0, 0x0, 0x0), set()),
}


def test_the_best_built_and_supported_one_is_chosen() -> None:
    assert choose_isa(FACTS, None, "exact") == "avx2"
    assert choose_isa(FACTS, None, "bf16") == "avx512_bf16"
    with pytest.raises(IsaError, match="numerics fp4: expected kernels that this build contains, got none"):
        choose_isa(FACTS, None, "fp4")


def test_one_can_be_forced() -> None:
    assert choose_isa(FACTS, "portable") == "portable"


def test_forcing_names_what_is_wrong() -> None:
    with pytest.raises(IsaError, match=r"HYBRID_K2_ISA: expected one of amx, .*, avx2, portable, got 'avx3'"):
        choose_isa(FACTS, "avx3")
    with pytest.raises(IsaError, match=r"--isa: expected one of amx, .*, got ''"):
        choose_isa(FACTS, "", forced_by="--isa")
    with pytest.raises(IsaError, match="HYBRID_K2_ISA=amx: expected kernels that this build contains"):
        choose_isa(FACTS, "amx")
    with pytest.raises(IsaError, match="HYBRID_K2_ISA=avx512_vnni: expected a CPU with avx512vl, avx512_vnni"):
        choose_isa(FACTS, "avx512_vnni")
    with pytest.raises(IsaError, match=r"HYBRID_K2_ISA=avx2: expected .* numerics bf16, got exact and fast only") as e:
        choose_isa(FACTS, "avx2", "bf16")
    assert e.value.hint == "leave HYBRID_K2_ISA out, or set it to avx512_bf16"
    with pytest.raises(IsaError, match="HYBRID_K2_ISA=avx512_bf16: expected kernels for numerics exact, got bf16 only"):
        choose_isa(FACTS, "avx512_bf16", "exact")


@pytest.mark.parametrize("name", RECORDED)
def test_features_are_read_from_recorded_registers(name: str) -> None:
    native_runtime().close()
    registers, expected = RECORDED[name]
    assert set(cpu.features_of(*registers)) == expected


def test_this_machine_is_read_as_the_kernel_reads_it() -> None:
    native_runtime().close()
    if platform.machine() != "x86_64":
        pytest.skip("/proc/cpuinfo has these flags on x86-64")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    needs: dict[str, set[str]] = {"portable": set(), "avx2": {"avx2", "fma"}}
    needs["avx512_vnni"] = needs["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
    needs["avx512_bf16"] = needs["avx512_vnni"] | {"avx512_bf16"}
    needs["amx_bf16"] = needs["avx512_bf16"] | {"amx_tile", "amx_bf16"}
    for fact in isa_facts():
        missing = needs[fact.name] - flags
        assert set(fact.missing) == missing
        assert fact.supported == (not missing)


def test_the_facts_name_what_the_runtime_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    native_runtime().close()
    assert [fact.name for fact in isa_facts()] == ["amx_bf16", "avx512_bf16", "avx512_vnni", "avx2", "portable"]
    for isa in usable_isas():
        monkeypatch.setenv("HYBRID_K2_ISA", isa)
        assert [fact.name for fact in isa_facts() if fact.chosen] == [isa]
        runtime = open_experts("exact", 1)
        assert runtime.name == f"native {isa}, exact (A16)"
        runtime.close()


def test_a_forced_isa_that_cannot_be_used_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    native_runtime().close()
    monkeypatch.setenv("HYBRID_K2_ISA", "avx1024")
    with pytest.raises(IsaError, match="got 'avx1024'"):
        open_experts("exact", 1)
    with pytest.raises(IsaError, match="got 'avx1024'"):
        isa_facts()


def test_numerics_and_plain_weights_choose_the_reference() -> None:
    for runtime in (open_experts("reference", 1), open_experts("exact", 1, packed=False)):
        assert runtime.name == "reference, fp32"
        runtime.close()
    with pytest.raises(ValueError, match="numerics: expected one of exact, fast, bf16, reference, got 'int8'"):
        open_experts("int8", 1)


def test_without_the_extension_numba_computes_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HYBRID_K2_ISA", raising=False)
    monkeypatch.setattr(cpu, "native_isas", list)
    monkeypatch.setattr("hybrid_k2.native.NATIVE_ERROR", "no module named that")
    monkeypatch.setattr(open_module, "_warned", False)
    assert isa_facts() == []
    with caplog.at_level(logging.WARNING, logger="hybrid_k2"):
        for _ in range(2):
            runtime = open_experts("exact", 1)
            assert runtime.name == "numba, fp32"
            runtime.close()
    assert len(caplog.records) == 1
    assert "no module named that" in caplog.text
    monkeypatch.setenv("HYBRID_K2_ISA", "avx2")
    with pytest.raises(IsaError, match="expected the native kernels, got none: no module named that"):
        open_experts("exact", 1)


@pytest.mark.parametrize("isa", usable_isas())
def test_the_peak_of_the_instructions_is_measured(isa: str) -> None:
    runtime = native_runtime(isa, threads=1)
    assert isinstance(runtime, cpu.NativeRuntime)
    # Some instructions per nanosecond, of at least two and at most 1024 operations each, at 0.1 to 10 GHz.
    assert 0.2 < runtime.measure_peak_gops(0.005) < 20480
    runtime.close()


def test_the_number_of_threads_is_checked() -> None:
    with pytest.raises(ValueError, match=r"threads: expected 1\.\.4096, got 0"):
        native_runtime(threads=0)
