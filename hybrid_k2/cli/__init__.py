"""The command `hybrid-k2`: `main` holds the entry point, each command has a module or package of its name."""
