"""Kernels for the GPU in Triton, one file each; see docs/gpu-kernels.md.

Importing one of the files needs triton, which torch brings along where it is built for CUDA; this package itself does
not. With TRITON_INTERPRET=1 in the environment, set before the import, the kernels run on the host.
"""

from __future__ import annotations

from importlib.util import find_spec


def have_triton() -> bool:
    """Say whether triton is installed."""
    return find_spec("triton") is not None
