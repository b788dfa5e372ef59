"""The entry point of `hybrid-k2`, and of `python -m hybrid_k2`."""

from __future__ import annotations

from hybrid_k2.cli.interrupts import leaving_at_once


def main() -> None:
    """Run the command line, and leave Python with its exit code."""
    with leaving_at_once():
        from hybrid_k2.cli.main import run
    run()


if __name__ == "__main__":
    main()
