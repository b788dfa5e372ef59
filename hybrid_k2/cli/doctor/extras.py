"""The optional packages: which are installed, what for, and how to get the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from hybrid_k2.cli.doctor.finding import OK, WARNING, Finding
from hybrid_k2.placement import Machine

# The extras of pyproject.toml that a user may want: what for, and the packages by their modules.
EXTRAS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "serve": (
        "hybrid-k2 serve, and replies that fit a JSON schema or a tool",
        {
            "fastapi": "fastapi",
            "uvicorn": "uvicorn",
            "prometheus_client": "prometheus_client",
            "llguidance": "llguidance",
        },
    ),
    "images": ("images in messages", {"PIL": "pillow"}),
    "gpu": ("kernels on a GPU", {"triton": "triton"}),
}


def check_extras(machine: Machine) -> Iterator[Finding]:
    """Yield a line for each extra; that for a GPU is missed only where there is one."""
    for extra, (purpose, packages) in EXTRAS.items():
        name = f"[{extra}]"
        missing = [package for module, package in packages.items() if find_spec(module) is None]
        if not missing:
            versions = ", ".join(f"{package} {_version(package)}" for package in packages.values())
            yield Finding(name, OK, f"{purpose}: {versions}")
            continue
        text = f"{purpose}: {', '.join(missing)} not installed"
        if extra == "gpu" and not machine.gpus:
            yield Finding(name, OK, f"{text}, and no GPU that would want it")
        else:
            yield Finding(name, WARNING, text, f"for that: pip install 'hybrid-k2[{extra}]'")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
