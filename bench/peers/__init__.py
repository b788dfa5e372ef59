"""Our expert layer beside those that pip can install: `python -m bench.peers`, from the root of the repository."""
