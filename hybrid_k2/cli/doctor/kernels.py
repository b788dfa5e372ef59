"""Each native expert kernel that this CPU can run, really run, beside the readable reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from hybrid_k2.bench.experts import RandomExperts
from hybrid_k2.cli.doctor.finding import FAILED, OK, WARNING, Finding
from hybrid_k2.experts import ExpertsShape, IsaFact, isa_facts
from hybrid_k2.experts.cpu import NativeRuntime
from hybrid_k2.experts.isa import ENVIRONMENT
from hybrid_k2.model.rounding import FACTOR, NUMERICS
from hybrid_k2.native import NATIVE_ERROR

SHAPE = ExpertsShape(hidden_size=288, moe_intermediate_size=96, n_routed_experts=8, num_experts_per_tok=3)
TOKENS = 11
THREADS = 2
NAME = "kernels"


def check_kernels() -> Iterator[Finding]:
    """Compute a small layer by each instruction set and numerics: near the reference, and alike bit for bit.

    Raises: IsaError: the environment forces kernels that cannot be used.
    """
    facts = isa_facts()
    if not facts:
        yield Finding(
            NAME,
            WARNING,
            f"the native extension is missing ({NATIVE_ERROR}): numba computes the experts, about ten times slower",
            "install g++ 11 or newer and reinstall hybrid-k2",
        )
        return
    wrong = [text for numerics in ("exact", "fast", "bf16") for text in _wrong(facts, numerics)]
    if wrong:
        hint = f"do not trust replies of this machine; {ENVIRONMENT}=portable, and please report it"
        yield Finding(NAME, FAILED, "; ".join(wrong), hint)
        return
    ran = [f"{fact.name} ({', '.join(fact.numerics)})" for fact in facts if fact.built and fact.supported]
    chosen = next(fact.name for fact in facts if fact.chosen)
    rest = [f"{fact.name} needs {', '.join(fact.missing)}" for fact in facts if not fact.supported]
    rest += [f"{fact.name} is not built" for fact in facts if fact.supported and not fact.built]
    others = f"; not here: {', '.join(rest)}" if rest else ""
    yield Finding(NAME, OK, f"{chosen} is used; as the reference computes: {', '.join(ran)}{others}")


def _wrong(facts: list[IsaFact], numerics: str) -> Iterator[str]:
    """Say of each instruction set with these numerics what is wrong with it."""
    random = RandomExperts(SHAPE, TOKENS, seed=0)
    ids, weights = random.route(TOKENS)
    first: tuple[str, Tensor] | None = None
    bound = FACTOR * NUMERICS[numerics]
    for isa in [fact.name for fact in facts if fact.offers(numerics)]:
        out = _compute(isa, numerics, random, ids, weights)
        error = random.error(out, ids, weights)
        if not error <= bound:
            yield f"{isa}, {numerics}: expected an error of at most {bound:.0e} beside the reference, got {error:.1e}"
        elif first is None:
            first = isa, out
        elif not torch.equal(out, first[1]):
            yield f"{isa}, {numerics}: expected the bits of {first[0]}, got others"


def _compute(isa: str, numerics: str, random: RandomExperts, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the layer's output. Shapes: ids, weights [T, K] -> [T, H]."""
    with ExitStack() as stack:
        runtime = NativeRuntime(isa, THREADS, numerics)
        stack.callback(runtime.close)
        layer = runtime.make_layer(**vars(SHAPE))
        stack.callback(layer.close)
        random.load(layer)
        return layer.forward(random.hidden[: len(ids)], ids, weights)
