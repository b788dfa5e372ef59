"""Measure attention of one layer over the latent cache at the widths of K2.6: native, torch, and the floor of both.

    python bench/attention.py [--contexts 1024,8192,32768] [--queries 1] [--sequences 1] [--threads N] [--seconds 2]

The floor is max(bytes / read bandwidth, operations / FMA rate), both measured in the same run: bytes of kv_b and of the
cached latents in bf16, operations of the absorbed form. Native and torch take turns of several calls, the first
not timed: torch's threads spin for a while when they are done, on the CPUs of what comes next. Times are the best
and the median of all calls. On a shared machine the best measures the program and the median the neighbours.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_k2.experts import open_experts
from hybrid_k2.model import mla
from hybrid_k2.model.batch import Batch, Chunk
from hybrid_k2.model.mla import MlaShape
from hybrid_k2.model.native_attention import NativeAttention

K2_6 = MlaShape(heads=64, nope=128, rope=64, value=128, kv_lora=512, scale=0.1)
PAGE_TOKENS = 64
BF16_BYTES = 2
TURN_CALLS = 4
SETTLE_SECONDS = 0.01


@dataclass(frozen=True)
class Work:
    """One call: so many new tokens behind each of some sequences."""

    batch: Batch
    q: Tensor
    kv_b: Tensor
    pages: Tensor

    @classmethod
    def draw(cls, context: int, queries: int, sequences: int) -> Work:
        """Draw random numbers; `context` counts the new tokens too."""
        count = -(-context // PAGE_TOKENS)
        chunks = [Chunk([0] * queries, context - queries, range(i * count, (i + 1) * count)) for i in range(sequences)]
        latent = K2_6.kv_lora + K2_6.rope
        return cls(
            Batch.build(chunks),
            torch.randn(queries * sequences, K2_6.heads, K2_6.nope + K2_6.rope),
            (torch.randn(K2_6.heads * (K2_6.nope + K2_6.value), K2_6.kv_lora) * 0.04).bfloat16(),
            torch.randn(count * sequences, PAGE_TOKENS, latent).bfloat16(),
        )

    @property
    def nbytes(self) -> int:
        """What has to be read once."""
        latents = sum(sequence.length for sequence in self.batch.sequences) * self.pages.shape[-1]
        return BF16_BYTES * (self.kv_b.numel() + latents)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the absorbed form."""
        per_key = 2 * K2_6.heads * (2 * K2_6.kv_lora + K2_6.rope)
        keys = int((self.batch.positions + 1).sum())
        return 2 * len(self.q) * self.kv_b.numel() + per_key * keys

    def by_native(self, native: NativeAttention) -> Tensor:
        """Attend as the model does."""
        out = torch.empty(len(self.q), K2_6.heads, K2_6.value)
        native.attend(self.q, self.kv_b, self.pages, self.batch.page_table, self.batch.spans, out)
        return out

    def by_torch(self) -> Tensor:
        """Attend as the model does without native kernels."""
        kv_b = self.kv_b.view(K2_6.heads, -1, K2_6.kv_lora)
        q = mla.absorb_queries(self.q, kv_b, K2_6)
        contexts = []
        for sequence, part in zip(
            self.batch.sequences, torch.split(q, len(self.q) // len(self.batch.sequences), dim=1), strict=True
        ):
            latent = self.pages[sequence.pages[0] : sequence.pages[-1] + 1].flatten(0, 1)[: sequence.length]
            contexts.append(mla.latent_attention(part, latent, K2_6))
        return mla.expand_values(torch.cat(contexts, dim=1), kv_b, K2_6)


def interleaved(calls: list[Callable[[], Tensor]], seconds: float) -> list[list[float]]:
    """Time the calls in turns; each gets about `seconds`, and at least three turns."""
    times: list[list[float]] = [[] for _ in calls]
    while min(map(sum, times)) < seconds or len(times[0]) < 3 * TURN_CALLS:
        for call, took in zip(calls, times, strict=True):
            settled = time.perf_counter() + SETTLE_SECONDS
            while time.perf_counter() < settled:
                call()
            for _ in range(TURN_CALLS):
                start = time.perf_counter()
                call()
                took.append(time.perf_counter() - start)
    return times


def milliseconds(times: list[float]) -> str:
    """Return best and median."""
    return f"{min(times) * 1e3:8.2f} {sorted(times)[len(times) // 2] * 1e3:8.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--queries", type=int, default=1, help="new tokens of each sequence")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="per context and form")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    runtime = open_experts("exact", args.threads)
    native = NativeAttention.open(runtime, K2_6)
    if native is None:
        raise SystemExit("this machine has no vector kernels for attention: torch attends")
    print(
        f"{runtime.name}, {args.threads} threads, {args.sequences} x {args.queries} new tokens; ms per layer and call"
    )
    print("context | native: best   median | torch: best   median | floor    share | raw GB/s GFLOP/s")
    with torch.inference_mode():
        for context in map(int, args.contexts.split(",")):
            work = Work.draw(context, args.queries, args.sequences)
            raw, peak = runtime.measure_read_gbps(), native.measure_peak_gflops()
            times = interleaved([lambda w=work: w.by_native(native), work.by_torch], args.seconds)  # type: ignore[misc]
            raw, peak = max(raw, runtime.measure_read_gbps()), max(peak, native.measure_peak_gflops())
            floor = max(work.nbytes / raw / 1e9, work.operations / peak / 1e9)
            print(
                f"{context:7d} |      {milliseconds(times[0])} |     {milliseconds(times[1])} "
                f"| {floor * 1e3:6.2f} {floor / min(times[0]):7.0%} | {raw:8.1f} {peak:7.0f}"
            )
    runtime.close()


if __name__ == "__main__":
    main()
