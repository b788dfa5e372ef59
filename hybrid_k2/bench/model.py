"""A whole checkpoint as a user meets it: prompts, and decode steps of several sequences, beside the host's limits.

Steps are those of the engine, sampling included. Before each measurement the limits are probed, so that a busy
neighbour or a falling clock meets the limit as well as the model; figures are medians over rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from random import Random
from statistics import fmean, median
from typing import Any

from hybrid_k2.bench.step_work import DENSE_DTYPES, EXPERTS, Limits, StepWork, step_work
from hybrid_k2.engine import Engine, SamplingParams
from hybrid_k2.engine.sequence import TokenSequence
from hybrid_k2.errors import ConfigError, MemoryBudgetError
from hybrid_k2.experts.cpu import NativeRuntime
from hybrid_k2.native import native
from hybrid_k2.placement import Plan
from hybrid_k2.placement.memories import HOST, memory_of

PROMPTS = (512, 4096)
SEQUENCES = (1, 4, 16)
DEPTH = 512
TOKENS = 32
ROUNDS = 3
PROBE_SECONDS = 0.05


@dataclass(frozen=True)
class ModelCases:
    """What is measured: prompts of these sizes; then so many sequences at once, each `tokens` behind `depth`."""

    prompts: tuple[int, ...]
    sequences: tuple[int, ...]
    depth: int
    tokens: int


@dataclass(frozen=True)
class ModelResult:
    """What a prompt, or a decode step, took. Units: ms; bytes by memory; shares of 1. None: not known.

    `sequences` together, each behind `depth` tokens, each with `tokens` in its prompt or its reply. `tokens_per_s`: of
    all of them. `experts`: distinct ones of a layer that a step touches, the mean. `floor_ms`: what the host needs at
    least.
    """

    phase: str
    sequences: int
    depth: int
    tokens: int
    tokens_per_s: float
    ms: float
    experts: float
    read_bytes: dict[str, int]
    floor_ms: float | None
    share_of_floor: float | None


@dataclass(frozen=True)
class ModelReport:
    """All results of a run, with the limits measured in it. Units: 10^9 bytes or operations per second."""

    model: str
    rules: str
    experts_backend: str
    threads: int
    raw_read_gbps: float | None
    peak_gops: dict[str, float]
    results: tuple[ModelResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `--json`."""
        return asdict(self)

    def table(self) -> str:
        """Write the report as aligned text."""
        memories = list(dict.fromkeys(chain.from_iterable(result.read_bytes for result in self.results)))
        read = "not known" if self.raw_read_gbps is None else f"{self.raw_read_gbps:.1f} GB/s"
        peaks = ", ".join(f"{kind} {gops:.0f} GOPS" for kind, gops in self.peak_gops.items()) or "not known"
        columns = "".join(f"{f'GB {memory}':>12}" for memory in memories)
        lines = [
            f"{self.model}, by {self.rules}; experts: {self.experts_backend}, threads: {self.threads}",
            f"host: raw read {read}; peaks: {peaks}",
            *(f"{m}: its bandwidth is not measured, so the floor is the host's alone" for m in memories if m != HOST),
            f"phase   sequences  depth  tokens  tokens/s         ms  experts{columns}  of the floor",
        ]
        for r in self.results:
            sizes = "".join(f"{r.read_bytes[memory] / 1e9:>12.3f}" for memory in memories)
            share = "-" if r.share_of_floor is None else f"{r.share_of_floor:.0%}"
            lines.append(
                f"{r.phase:<7}{r.sequences:>10}{r.depth:>7}{r.tokens:>8}{r.tokens_per_s:>10.1f}{r.ms:>11.2f}"
                f"{r.experts:>9.1f}{sizes}{share:>14}"
            )
        return "\n".join(lines)


def choose_cases(
    plan: Plan,
    prompts: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    depth: int | None = None,
    tokens: int = TOKENS,
) -> ModelCases:
    """Return what to measure; what is left out (None) is chosen, as far as the KV cache holds it.

    Raises: ConfigError for more than the plan's KV cache or one step holds.
    """
    context = min(plan.config.max_position_embeddings, plan.kv_cache.tokens)
    if depth is None:
        depth = max(1, min(DEPTH, context - tokens - 1))
    of_each = depth + tokens + 1  # the first token of a reply comes with the prompt
    _check("--depth, --tokens", of_each, context, "tokens of a sequence")
    pages = -(-of_each // plan.kv_cache.page_tokens)
    most = min(plan.kv_cache.pages // pages, plan.batch_tokens)
    if prompts is None:
        prompts = [size for size in PROMPTS if size < context] or [context - 1]
    if sequences is None:
        sequences = [count for count in SEQUENCES if count <= most]
    _check("--prompt", max(prompts) + 1, context, "tokens and the first one of the reply")
    _check("--sequences", max(sequences), most, f"sequences of {of_each} tokens")
    return ModelCases(tuple(prompts), tuple(sequences), depth, tokens)


def _check(option: str, got: int, most: int, what: str) -> None:
    if got > most:
        raise ConfigError(
            f"bench model: {option}: expected at most {most} {what}, which the KV cache holds, got {got}",
            hint="ask for less, or give kv_cache more tokens in the placement rules",
        )


def measure_model(
    engine: Engine,
    model: str,
    cases: ModelCases,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> ModelReport:
    """Measure prompts of random tokens, then decode steps, greedy and to the last token.

    Memory: what the engine has, and that of the read probe.
    Raises: EngineError where the engine fails; RequestError if it is busy.
    """
    bench = _Bench(engine, Random(seed), progress)
    measured = [_Case("prompt", 1, 0, size) for size in cases.prompts]
    bench.prompt(min(cases.prompts))  # threads, pages and clocks are not awake yet
    for number in range(1, rounds + 1):
        for case in measured:
            progress(f"prompt of {case.tokens} tokens, round {number} of {rounds}")
            case.add(bench.probe(), bench.prompt(case.tokens))
    prompts = [bench.random_ids(cases.depth) for _ in range(max(cases.sequences))]
    decoded = [_Case("decode", count, cases.depth, cases.tokens) for count in cases.sequences]
    for number in range(rounds + 1):  # the first one computes the prompts, and does not count
        for case in decoded:
            progress(f"{case.sequences} decoding, {f'round {number} of {rounds}' if number else 'warming up'}")
            limits, steps = bench.probe(), bench.decode(prompts[: case.sequences], cases.tokens)
            if number:
                case.add(limits, steps)
    plan, limits = engine.plan, bench.limits()
    return ModelReport(
        model=model,
        rules=plan.rules.source,
        experts_backend=engine.experts_name,
        threads=plan.threads,
        raw_read_gbps=limits.read_gbps,
        peak_gops=dict(limits.peak_gops),
        results=tuple(case.result() for case in (*measured, *decoded)),
    )


@dataclass(frozen=True)
class _Step:
    seconds: float
    work: StepWork


class _Case:
    """One row of the table, and what its rounds took."""

    def __init__(self, phase: str, sequences: int, depth: int, tokens: int) -> None:
        self.phase = phase
        self.sequences = sequences
        self.depth = depth
        self.tokens = tokens
        self.seconds: list[float] = []
        self.floors: list[float | None] = []
        self.steps: list[_Step] = []

    def add(self, limits: Limits, steps: list[_Step]) -> None:
        """Take a round."""
        floors = [step.work.floor_s(limits) for step in steps]
        self.seconds.append(sum(step.seconds for step in steps))
        self.floors.append(None if None in floors else sum(floor or 0.0 for floor in floors))
        self.steps += steps

    def result(self) -> ModelResult:
        """Sum up the rounds; a prompt is one piece, replies are pieces of one token each."""
        pieces = 1 if self.phase == "prompt" else self.tokens
        seconds, known = median(self.seconds), [floor for floor in self.floors if floor is not None]
        shares = [f / s for f, s in zip(self.floors, self.seconds, strict=True) if f is not None]
        memories = dict.fromkeys(chain.from_iterable(step.work.read_bytes for step in self.steps))
        total = len(self.seconds) * pieces
        return ModelResult(
            phase=self.phase,
            sequences=self.sequences,
            depth=self.depth,
            tokens=self.tokens,
            tokens_per_s=self.sequences * self.tokens / seconds,
            ms=seconds / pieces * 1e3,
            experts=fmean([*chain.from_iterable(step.work.distinct for step in self.steps)] or [0]),
            read_bytes={m: sum(step.work.read_bytes.get(m, 0) for step in self.steps) // total for m in memories},
            floor_ms=median(known) / pieces * 1e3 if known else None,
            share_of_floor=median(shares) if shares else None,
        )


class _Bench:
    """Run the engine's steps, one after the other, with a clock at each."""

    def __init__(self, engine: Engine, random: Random, progress: Callable[[str], None]) -> None:
        self._engine = engine
        self._runner = engine.runner
        self._random = random
        self._probes: list[Limits] = []
        dense = {row.dtype for row in engine.plan.rows if memory_of(row.device) == HOST}
        self._dense = [dtype for dtype in DENSE_DTYPES if dtype in dense]

    def random_ids(self, count: int) -> list[int]:
        """Draw a prompt."""
        return self._random.choices(range(self._engine.config.vocab_size), k=count)

    def probe(self) -> Limits:
        """Measure the host's limits of this moment; none for the reference, which reads more than is stored."""
        if self._engine.plan.numerics == "reference":
            return Limits(None, {})
        runtime = self._engine.loaded.text.experts_runtime
        peaks = {}
        if isinstance(runtime, NativeRuntime):
            peaks[EXPERTS] = runtime.measure_peak_gops(PROBE_SECONDS)
            for dtype in self._dense:
                peaks[dtype] = float(native.measure_dense_peak_gops(runtime.native, dtype == "int8", PROBE_SECONDS))
        try:
            limits = Limits(runtime.measure_read_gbps(PROBE_SECONDS), peaks)
        except (MemoryBudgetError, MemoryError):  # the weights take all of it; what was measured stands
            limits = Limits(None, peaks)
        self._probes.append(limits)
        return limits

    def limits(self) -> Limits:
        """Return the medians of the probes."""
        reads = [probe.read_gbps for probe in self._probes if probe.read_gbps is not None]
        kinds = self._probes[0].peak_gops if self._probes else {}
        peaks = {kind: median(probe.peak_gops[kind] for probe in self._probes) for kind in kinds}
        return Limits(median(reads) if reads else None, peaks)

    def prompt(self, size: int) -> list[_Step]:
        """Compute a prompt that no cache knows, to the first token of its reply."""
        sequence = self._sequence(self.random_ids(size), 1)
        with self._runner.enter():
            try:
                return self._to_first_token(sequence)
            finally:
                self._runner.prefix.take_back(sequence)

    def decode(self, prompts: Sequence[list[int]], tokens: int) -> list[_Step]:
        """Continue prompts together, by so many tokens each; the latents of known prompts are not computed again."""
        sequences = [self._sequence(ids, tokens + 1) for ids in prompts]
        with self._runner.enter():
            try:
                for sequence in sequences:
                    self._runner.prefix.lend(sequence)
                    self._to_first_token(sequence)
                return [self._step(sequences) for _ in range(tokens)]
            finally:
                for sequence in sequences:
                    self._runner.prefix.keep(sequence)

    def _sequence(self, ids: list[int], tokens: int) -> TokenSequence:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
        (sequence,) = self._engine.sequences(
            ids, messages=None, tools=None, thinking=False, preserve_thinking=False, params=params
        )
        return sequence

    def _to_first_token(self, sequence: TokenSequence) -> list[_Step]:
        steps = []
        while not sequence.decoding:
            steps.append(self._step([sequence]))
        return steps

    def _step(self, sequences: Iterable[TokenSequence]) -> _Step:
        before = self._engine.expert_use()
        start = time.perf_counter()
        work = [(sequence, sequence.next_chunks(self._runner.chunk_tokens)) for sequence in sequences]
        logits = self._runner.forward(work)
        for (sequence, chunks), row in zip(work, logits, strict=True):
            sequence.chunks_done(chunks)
            if row is not None:
                sequence.sample(row)
        seconds = time.perf_counter() - start
        chunks = [chunk for _, part in work for chunk in part]
        return _Step(
            seconds,
            step_work(
                self._engine.plan,
                tokens=sum(len(chunk.token_ids) for chunk in chunks),
                cached=sum(chunk.cached for chunk in chunks),
                logits=sum(chunk.logit_rows for chunk in chunks),
                before=before,
                after=self._engine.expert_use(),
            ),
        )
