"""A chat with a model that a server runs: `address` and `server` reach it, `reply` reads what it streams."""
