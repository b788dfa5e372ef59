"""The rule file form: what is read, what is refused, and where each refusal points."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import HybridK2Error, RulesError, shown
from hybrid_k2.placement import default_rules, load_rules, make_plan, parse_rules, shipped_names, shipped_rules
from hybrid_k2.placement.form import format_layers
from hybrid_k2.placement.groups import GROUPS
from hybrid_k2.placement.sizes import format_bytes, try_parse_bytes
from hybrid_k2.placement.yaml_tree import MAX_FILE_BYTES
from tests.conftest import REPO
from tests.unit.placements import GIB, K2_6, machine, small_config

# Line numbers below count from the "version" line as 1.
VALID = """\
version: 1
devices: {gpu: cuda:0, host: {memory: 640GiB, threads: 12, numa: auto}}
place:
  - {what: embedding, on: host, dtype: bf16}
  - {what: attention, on: gpu, layers: 1..60}
  - {what: attention, on: gpu, layers: 0, dtype: fp32}
  - what: dense_mlp
    on: host
  - {what: shared_experts, on: gpu}
  - {what: routed_experts, on: host, dtype: int4, layers: [1, 3..60, 2]}
  - {what: lm_head, on: gpu}
kv_cache: {on: gpu, dtype: bf16, tokens: 65536}
numerics: exact
overlap: off
prefill: {stream: off, chunk_tokens: 256}
"""


def edited(old: str, new: str) -> str:
    assert VALID.count(old) == 1, old
    return VALID.replace(old, new)


def error_of(text: str) -> RulesError:
    with pytest.raises(RulesError) as caught:
        parse_rules(text, "x.yaml")
    return caught.value


def test_reads_every_part_of_the_form() -> None:
    rules = parse_rules(VALID, "x.yaml")
    assert (rules.version, rules.numerics, rules.overlap, rules.source) == (1, "exact", "off", "x.yaml")
    assert (rules.devices.gpu, rules.devices.host_memory_bytes, rules.devices.host_threads) == ("cuda:0", 640 * GIB, 12)
    assert [rule.what for rule in rules.place] == [
        "embedding", "attention", "attention", "dense_mlp", "shared_experts", "routed_experts", "lm_head",
    ]  # fmt: skip
    assert [rule.on for rule in rules.place] == ["host", "gpu", "gpu", "host", "gpu", "host", "gpu"]
    assert [rule.dtype for rule in rules.place] == ["bf16", None, "fp32", None, None, "int4", None]
    assert [rule.line for rule in rules.place] == [4, 5, 6, 7, 9, 10, 11]
    assert rules.place[5].layers == (range(1, 2), range(2, 3), range(3, 61))
    assert (rules.kv_cache.on, rules.kv_cache.dtype, rules.kv_cache.tokens) == ("gpu", "bf16", 65536)
    assert (rules.prefill.stream, rules.prefill.chunk_tokens) == ("off", 256)


def test_most_keys_may_be_left_out() -> None:
    rules = parse_rules("version: 1\nplace: [{what: attention, on: host}]")
    assert rules.devices.gpu is rules.devices.host_memory_bytes is rules.devices.host_threads is None
    assert (rules.kv_cache.on, rules.kv_cache.dtype, rules.kv_cache.tokens) == (None, "bf16", None)
    assert (rules.numerics, rules.overlap, rules.prefill.chunk_tokens) == ("exact", "auto", None)


def test_quotes_comments_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "quoted.yaml"
    quoted = edited("on: host, dtype: int4", "'on': \"host\", dtype: 'int4'  ").replace(
        "overlap: off", "overlap: 'off'"
    )
    path.write_bytes(b"\xef\xbb\xbf" + b"# a comment\r\n" + quoted.encode().replace(b"\n", b"\r\n"))
    rules, plain = load_rules(path), parse_rules(VALID)
    assert [(r.what, r.layers, r.on, r.dtype) for r in rules.place] == [
        (r.what, r.layers, r.on, r.dtype) for r in plain.place
    ]
    assert rules.overlap == "off"


@pytest.mark.parametrize(
    ("old", "new", "line", "words", "hint"),
    [
        ("version: 1", "version: 2", 1, ["version", "expected 1", "'2'"], None),
        ("version: 1\n", "", 1, ["no version"], None),
        ("numerics: exact", "numeric: exact", 13, ["unknown key 'numeric'"], "did you mean 'numerics'?"),
        ("what: attention, on: gpu, layers: 1", "what: atention, on: gpu, layers: 1", 5,
         ["place rule 2", "what", "'atention'", "attention"], "did you mean 'attention'?"),
        ("    on: host", "    wher: host", 8, ["place rule 4", "unknown key 'wher'"], None),
        ("    on: host", "    On: host", 8, ["unknown key 'On'"], "did you mean 'on'?"),
        ("  - what: dense_mlp\n    on: host", "  - what: dense_mlp", 7, ["the key on", "got none"], None),
        ("  - what: dense_mlp\n    on: host", "  - on: host", 7, ["the key what", "got none"], None),
        ("    on: host", "    on: cpu", 8, ["on: expected one of host, gpu", "'cpu'"], None),
        ("    on: host", "    on:", 8, ["on: expected", "got nothing"], None),
        ("    on: host", "    on: [host]", 8, ["on: expected", "got a list"], None),
        ("dtype: bf16, tokens", "dtype: fp16, tokens", 12, ["kv_cache: dtype", "'fp16'"], "did you mean 'bf16'?"),
        ("{what: lm_head, on: gpu}", "{what: lm_head, on: gpu, dtype: int4}", 11, ["place rule 7", "'int4'"], None),
        ("memory: 640GiB", "memory: 640", 2, ["devices.host", "memory", "'640'", "640GiB"], None),
        ("memory: 640GiB", "memory: 640 GiB", 2, ["'640 GiB'"], None),
        ("memory: 640GiB", "memory: 0GiB", 2, ["'0GiB'"], None),
        ("memory: 640GiB", "memory: -1GiB", 2, ["'-1GiB'"], None),
        ("memory: 640GiB", "memory: 640gib", 2, ["'640gib'"], None),
        ("threads: 12", "threads: 0", 2, ["threads", "from 1", "'0'"], None),
        ("threads: 12", "threads: 1_2", 2, ["'1_2'"], None),
        ("threads: 12", "threads: 012", 2, ["'012'"], None),
        ("threads: 12", "threads: \u0661", 2, ["threads"], None),
        ("threads: 12", "threads: " + "9" * 5000, 2, ["threads"], None),
        ("gpu: cuda:0", "gpu: cuda", 2, ["gpu: expected cuda:N or twin", "'cuda'"], "cuda:0 is the first GPU"),
        ("gpu: cuda:0, ", "", 5, ["devices names no gpu"], "add devices: {gpu: cuda:0}"),
        ("gpu: cuda:0", "gpu0: cuda:0", 2, ["unknown key 'gpu0'"], "did you mean 'gpu'?"),
        ("layers: 1..60", "layers: 60..1", 5, ["place rule 2", "ascends", "60..1"], "write 1..60"),
        ("layers: 1..60", "layers: 1-60", 5, ["'1-60'"], None),
        ("layers: 1..60", "layers: 1...60", 5, ["layers"], None),
        ("layers: 1..60", "layers: -1", 5, ["'-1'"], None),
        ("layers: 1..60", "layers: 01", 5, ["'01'"], None),
        ("layers: 1..60", "layers: []", 5, ["at least one layer"], None),
        ("layers: 1..60", "layers: {a: 1}", 5, ["a mapping"], None),
        ("layers: 1..60", "layers: [[1]]", 5, ["a list"], None),
        ("[1, 3..60, 2]", "[1, 3..60, 40]", 10, ["each layer once", "layer 40 again"], None),
        ("embedding, on: host", "embedding, layers: 0, on: host", 4, ["no layers for embedding"], None),
        ("tokens: 65536", "tokens: 0", 12, ["kv_cache: tokens", "'0'"], None),
        ("tokens: 65536", "tokens: 64k", 12, ["'64k'"], None),
        ("stream: off", "stream: on", 15, ["prefill: stream: expected one of auto, off", "'on'"], None),
        ("dtype: int4", "hottest: 4, dtype: int4", 10,
         ["hottest: expected it with routed_experts on: gpu, got routed_experts on: host"], None),
        ("what: attention, on: gpu, layers: 1", "what: attention, hottest: 3, on: gpu, layers: 1", 5,
         ["hottest: expected it with routed_experts on: gpu, got attention on: gpu"], None),
        ("on: host, dtype: int4", "on: gpu, hottest: 0, dtype: int4", 10, ["hottest: expected auto or", "'0'"], None),
        ("on: host, dtype: int4", "on: gpu, hottest: 3, dtype: bf16", 10, ["dtype: expected int4", "'bf16'"], None),
        ("on: host, dtype: int4", "on: gpu, hottest: 3, also_on_host: yes", 10,
         ["also_on_host: expected one of true, false", "'yes'"], None),
        ("dtype: int4", "also_on_host: true", 10, ["also_on_host: expected it with routed_experts on: gpu"], None),
        ("chunk_tokens: 256", "chunk_tokens: -1", 15, ["prefill: chunk_tokens", "'-1'"], None),
        ("numerics: exact", "numerics: precise", 13, ["numerics: expected one of exact, fast, bf16, reference"], None),
        ("overlap: off", "overlap: {defered: 2}", 14, ["unknown key 'defered'"], "did you mean 'deferred'?"),
        ("overlap: off", "overlap: on", 14, ["overlap: expected one of auto, off, ping_pong", "'on'"], None),
        ("kv_cache: {on: gpu, dtype: bf16, tokens: 65536}", "kv_cache: gpu", 12, ["kv_cache: expected the keys"], None),
        ("  - {what: lm_head, on: gpu}", "  - lm_head", 11, ["place rule 7: expected the keys", "'lm_head'"], None),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, words: list[str], hint: str | None) -> None:
    error = error_of(edited(old, new))
    assert error.message.startswith(f"x.yaml:{line}: ")
    assert not [word for word in words if word not in error.message], error.message
    assert "not available" not in error.message
    if hint is not None:
        assert error.hint == hint


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("off", "off"), ("1", 1), ("12", 12)])
def test_numa(text: str, value: str | int) -> None:
    assert parse_rules(edited("numa: auto", f"numa: {text}"), "x.yaml").devices.host_numa == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on", "numa: expected auto, off, or a number of virtual nodes from 1 to 64, got 'on'"),
        ("0", "numa: expected auto, off, or a number of virtual nodes from 1 to 64, got '0'"),
        ("65", "numa: expected auto, off, or a number of virtual nodes from 1 to 64, got '65'"),
        ("[1]", "numa: expected auto, off, or a number of virtual nodes from 1 to 64, got a list"),
        ("13", "numa: expected at most as many nodes as threads (12), got 13"),
    ],
)
def test_numa_that_is_none(text: str, message: str) -> None:
    assert error_of(edited("numa: auto", f"numa: {text}")).message == f"x.yaml:2: devices.host: {message}"


@pytest.mark.parametrize("what", ["attention", "dense_mlp", "shared_experts", "lm_head"])
def test_dense_groups_may_be_int8_anywhere_and_fp8_on_a_gpu(what: str) -> None:
    text = "version: 1\ndevices: {gpu: %s}\nplace:\n  - {what: %s, on: %s, dtype: %s}\n"
    for gpu, on, dtype in (
        ("cuda:0", "host", "int8"), ("cuda:0", "gpu", "int8"), ("cuda:0", "gpu", "fp8"), ("twin", "gpu", "int8"),
    ):  # fmt: skip
        assert parse_rules(text % (gpu, what, on, dtype)).place[0].dtype == dtype
    for gpu, on in (("cuda:0", "host"), ("twin", "gpu")):
        place = "twin" if on == "gpu" else "host"
        expected = f"dtype: expected one of bf16, fp32, int8 on the {place}, got 'fp8', which only a GPU computes"
        with pytest.raises(RulesError, match=f"4: place rule 1: {expected}"):
            parse_rules(text % (gpu, what, on, "fp8"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpu: cuda:0", "gpu: cuda:0, twin_threads: 2",
         "2: devices: twin_threads: expected gpu: twin beside it, got cuda:0"),
        ("gpu: cuda:0", "gpu: twin, twin_threads: 12",
         "2: devices: twin_threads: expected fewer than all threads of the host (12), got 12"),
        ("gpu: cuda:0", "gpu: twin, twin_threads: 0",
         "2: devices: twin_threads: expected auto or a whole number from 1 to 4096, got '0'"),
        ("gpu: cuda:0", "gpu: twin, gpu_memory: 24GiB",
         "2: devices: gpu_memory: expected gpu: cuda:N beside it, got twin"),
        ("gpu: cuda:0", "gpu: cuda:0, gpu_memory: 24",
         "2: devices: gpu_memory: expected auto or a size with its unit, as 640GiB or 24GB, got '24'"),
        ("gpu: cuda:0", "gpu: twin0", "2: devices: gpu: expected cuda:N or twin, got 'twin0'"),
    ],
)  # fmt: skip
def test_a_gpu_or_twin_that_is_none(old: str, new: str, message: str) -> None:
    assert error_of(edited(old, new)).message == f"x.yaml:{message}"


def test_the_twin_takes_dense_groups_as_the_host_does_and_some_routed_experts() -> None:
    text = edited("gpu: cuda:0", "gpu: twin, twin_threads: 3").replace("layers: 1..60}", "layers: 1..60, dtype: int8}")
    rules = parse_rules(text)
    assert (rules.devices.gpu, rules.devices.twin_threads, rules.place[1].dtype) == ("twin", 3, "int8")
    hot = parse_rules(text.replace("on: host, dtype: int4", "on: gpu, hottest: 3, dtype: int4"))
    assert hot.place[5].hottest == 3
    error = error_of(text.replace("on: host, dtype: int4", "on: gpu, hottest: auto, dtype: int4"))
    assert error.message == (
        "x.yaml:10: place rule 6: hottest: expected a number (the twin's memory is the host's), got auto"
    )


@pytest.mark.parametrize("what", ["embedding", "router", "vision", "routed_experts"])
def test_other_groups_are_not_int8(what: str) -> None:
    with pytest.raises(RulesError, match="dtype: int8 is not available in this version"):
        parse_rules(f"version: 1\nplace:\n  - {{what: {what}, on: host, dtype: int8}}\n")


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("embedding, on: host, dtype: bf16", "embedding, on: gpu, dtype: fp8", 4, "dtype: fp8"),
        ("on: host, dtype: int4", "on: gpu, dtype: int4", 10, "routed_experts on: gpu"),
        ("layers: 1..60", "layers: hottest", 5, "layers: hottest"),
        ("layers: 1..60", "layers: hottest 12", 5, "layers: hottest"),
        ("layers: 1..60", "layers: {hottest: 12}", 5, "layers: hottest"),
        ("dtype: bf16, tokens", "dtype: fp8, tokens", 12, "dtype: fp8"),
    ],
)
def test_what_the_form_knows_and_this_version_lacks_is_told_apart(old: str, new: str, line: int, what: str) -> None:
    error = error_of(edited(old, new))
    assert error.message.startswith(f"x.yaml:{line}: ")
    assert error.message.endswith(f"{what} is not available in this version")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "an empty file"),
        ("# only a comment\n", None, "an empty file"),
        ("---\n", 2, "got nothing"),
        ("version", 1, "expected the keys version"),
        ("- version: 1", 1, "got a list"),
        ("version: 1\nplace: []", 2, "expected a list of rules, got an empty list"),
        ("version: 1\nplace:", 2, "expected a list of rules, got nothing"),
        ("version: 1\nplace: {what: attention, on: host}", 2, "place: expected a list of rules, got a mapping"),
        ("version: 1\nplace: host", 2, "place: expected a list of rules, got 'host'"),
        ("version: 1\n", 1, "the key place"),
        ("version: 1\nplace: [\n", 3, "expected YAML"),
        ("version: 1\nplace:\n\t- {}", 3, "expected YAML"),
        ("version: 1\nversion: 1", 2, "first on line 1"),
        ("a: &x 1\nb: *x", 1, "anchors are not accepted"),
        ("a: 1\nb: *x", 2, "aliases are not accepted"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tags are not accepted"),
        ("a: !!int 3", 1, "tags are not accepted"),
        ("version: 1\n---\nversion: 1", 2, "a second one"),
        ("? [a, b]\n: 1", 1, "expected a word as the key"),
        ("[" * 3000, 1, "levels of nesting"),
        ("version: 1\nplace: \x07", 2, "printable"),
        ('version: "\\UFFFFFFFF"', None, "expected YAML"),
    ],
)
def test_only_plain_yaml_is_read(text: str, line: int | None, words: str) -> None:
    message = error_of(text).message
    assert message.startswith("x.yaml: " if line is None else f"x.yaml:{line}: ")
    assert words in message


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor() -> None:
    bomb = "a: &a [x,x,x,x]\n" + "".join(
        f"{b}: &{b} [*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert error_of(bomb).message.startswith("x.yaml:1: ")


def test_files_that_cannot_be_rules(tmp_path: Path) -> None:
    def message(path: Path | str) -> str:
        with pytest.raises(RulesError) as caught:
            load_rules(path)
        assert caught.value.message.startswith(str(path))
        return caught.value.message

    large, latin, pipe = tmp_path / "large.yaml", tmp_path / "latin.yaml", tmp_path / "pipe.yaml"
    large.write_text(VALID + "#" * MAX_FILE_BYTES)
    latin.write_bytes(b"version: 1\n# caf\xe9\n")
    os.mkfifo(pipe)
    assert "a folder" in message(tmp_path)
    assert "no such file" in message(tmp_path / "missing.yaml")
    assert "no such file" in message(tmp_path / "no" / "folder.yaml")
    assert "a larger one" in message(large)
    assert message(latin) == f"{latin}:2: expected UTF-8 text, got byte 0xe9"
    assert "a device, pipe or socket" in message(pipe)
    long, loop = tmp_path / ("long" * 100 + ".yml"), tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    assert message(long) == f"{long}: expected a readable rule file, got: File name too long"
    assert message(loop) == f"{loop}: expected a readable rule file, got: Too many levels of symbolic links"


@pytest.mark.parametrize("path", ["", 3, b"host", [], {}, None, 1.5, 10**6000, ("host",)], ids=shown)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(RulesError, match=r"^rules: expected a rule file or the name of a shipped one, got ") as caught:
        load_rules(path)
    assert "rules/host.yaml" in (caught.value.hint or "")


_PIECES = st.sampled_from(
    [
        *VALID.split(),
        "\n",
        "\n  - ",
        "{",
        "}",
        "[",
        "]",
        ": ",
        ",",
        "&a",
        "*a",
        "!",
        "|",
        ">",
        "%",
        '"',
        "'",
        "\t",
        "?",
        "---",
    ]
)


@given(st.lists(_PIECES, max_size=30), st.integers(0, len(VALID)), st.integers(0, 12))
def test_a_damaged_file_never_ends_in_another_error(pieces: list[str], at: int, cut: int) -> None:
    text = VALID[:at] + " ".join(pieces) + VALID[at + cut :]
    message = "x.yaml"
    try:
        make_plan(parse_rules(text, "x.yaml"), K2_6, machine(900, 80))
    except HybridK2Error as error:
        message = error.message
    assert message.startswith("x.yaml")


@given(st.text(max_size=60))
def test_any_text_is_rules_or_a_rules_error(text: str) -> None:
    with pytest.raises(RulesError, match=r"\Ax\.yaml"):
        parse_rules(text, "x.yaml")


@given(st.integers(0, 4000), st.integers(0, 999), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "KB", "MB", "GB", "TB"]))
def test_sizes_are_exact(whole: int, thousandths: int, unit: str) -> None:
    base, power = (1024 if "i" in unit else 1000), "KMGT".index(unit[0]) + 1
    expected = int((whole + Fraction(thousandths, 1000)) * base**power)
    assert try_parse_bytes(f"{whole}.{thousandths:03}{unit}") == expected
    assert try_parse_bytes(f"{whole}{unit}") == whole * base**power


@given(st.integers(0, 1 << 50))
def test_shown_sizes_are_right_to_half_of_the_last_digit(count: int) -> None:
    number, unit = format_bytes(count).split(" ")
    size = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert abs(Fraction(number) * size - count) <= Fraction(size, 200)


@given(st.sets(st.integers(0, 60), min_size=1), st.randoms())
def test_layers_are_read_in_any_order_and_spelling(layers: set[int], random: Random) -> None:
    parts: list[str] = []
    left = sorted(layers)
    while left:
        run = 1
        while run < len(left) and left[run] == left[0] + run and random.random() < 0.8:
            run += 1
        parts.append(f"{left[0]}..{left[run - 1]}" if run > 1 else str(left[0]))
        left = left[run:]
    random.shuffle(parts)
    text = parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"
    rules = parse_rules(f"version: 1\nplace: [{{what: attention, on: host, layers: {text}}}]")
    read = rules.place[0].layers
    assert read is not None
    assert sorted(layer for part in read for layer in part) == sorted(layers)
    assert sum(part.count("..") + 1 for part in format_layers(read).split(",")) >= len(parts)


@pytest.mark.parametrize("name", ["host", "reference", "gpu", "twin"])
@pytest.mark.parametrize(
    "config", [K2_6, small_config(), small_config(first_k_dense_replace=0), small_config(n_shared_experts=0)]
)
def test_shipped_rules_place_every_k2_checkpoint(name: str, config: ModelConfig) -> None:
    plan = make_plan(shipped_rules(name), config, machine(900, 80))
    assert {row.what for row in plan.rows} <= set(GROUPS)
    assert plan.numerics == ("reference" if name == "reference" else "exact")
    assert plan.activation_dtype == ("bf16" if name == "gpu" else "fp32")
    assert plan.devices == (("cuda:0", "host") if name == "gpu" else ("host",))


def test_shipped_rules_are_the_files_of_the_rules_folder() -> None:
    assert shipped_names() == tuple(sorted(path.stem for path in (REPO / "rules").glob("*.yaml")))
    assert {"gpu", "host", "reference", "twin"} <= set(shipped_names())


def test_shipped_names_work_from_any_folder_and_files_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpu", "gpu.yaml", "rules/gpu.yaml", Path("rules/gpu.yaml")):
        assert load_rules(name) == shipped_rules("gpu")
    for name in ("./gpu", "./rules/gpu.yaml", str(tmp_path / "gpu"), "rules/./gpu.yaml", "rules//gpu"):
        with pytest.raises(RulesError, match=f"^{re.escape(name)}: expected a rule file, got no such file"):
            load_rules(name)
    (tmp_path / "gpu").mkdir()
    assert load_rules("gpu") == shipped_rules("gpu")
    (tmp_path / "gpu.yaml").write_text(VALID)
    assert load_rules("gpu.yaml").kv_cache.tokens == 65536
    with pytest.raises(RulesError) as caught:
        load_rules("rules/gpv.yaml")
    assert caught.value.message.startswith("rules/gpv.yaml: ")
    assert "rules/gpu.yaml" in (caught.value.hint or "")


def test_default_rules_follow_the_machine() -> None:
    without = default_rules(machine(768), K2_6)
    assert without.source == "rules/host.yaml"
    assert without.reason == "no GPU found (no NVIDIA driver): everything on the host (rules/host.yaml)"
    large = default_rules(machine(768, 80), K2_6)
    assert large.source == "rules/gpu.yaml"
    assert re.fullmatch(r"cuda:0 \(Test GPU\) takes the dense groups, .* \(rules/gpu.yaml\)", large.reason)
    small = default_rules(machine(768, 16), K2_6)
    assert small.source == "rules/host.yaml"
    assert "too small" in small.reason
    assert default_rules(machine(768, 16), small_config()).source == "rules/gpu.yaml"
    assert shipped_rules("gpu").reason == ""


def test_default_rules_want_a_useful_context_on_the_gpu() -> None:
    """The dense groups alone fit long before 4096 tokens of cache do in a quarter of the rest."""
    sizes = [size / 4 for size in range(80, 120)]
    chosen = [default_rules(machine(768, size), K2_6).source for size in sizes]
    first = chosen.index("rules/gpu.yaml")
    assert chosen == ["rules/host.yaml"] * first + ["rules/gpu.yaml"] * (len(sizes) - first)
    rules = shipped_rules("gpu")
    assert make_plan(rules, K2_6, machine(768, sizes[first])).kv_cache.tokens >= 4096
    assert make_plan(rules, K2_6, machine(768, sizes[first - 1])).kv_cache.tokens < 4096
