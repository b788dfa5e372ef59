"""Let `python -m hybrid_k2` be the same as `hybrid-k2`."""

from hybrid_k2.cli.main import run

if __name__ == "__main__":
    run()
