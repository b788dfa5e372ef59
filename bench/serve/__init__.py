"""Load and throughput of a server process: see `python -m bench.serve --help`."""
