"""The routed experts: the contract, and the backends that compute them."""

from hybrid_k2.experts.base import ExpertsBackend, ExpertsRuntime, ExpertsShape
from hybrid_k2.experts.isa import IsaFact, isa_facts
from hybrid_k2.experts.open import open_experts

__all__ = ["ExpertsBackend", "ExpertsRuntime", "ExpertsShape", "IsaFact", "isa_facts", "open_experts"]
