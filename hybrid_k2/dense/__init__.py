"""Dense layers on the host: bf16 and int8 matrices on the experts' threads, and the definition of int8."""

from hybrid_k2.dense.host import HostMatrix, multiply_all
from hybrid_k2.dense.int8 import GROUP, Int8Weight, fits_blocks, quantize_int8

__all__ = ["GROUP", "HostMatrix", "Int8Weight", "fits_blocks", "multiply_all", "quantize_int8"]
