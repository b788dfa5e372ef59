"""The command `doctor`: what this machine can do, and whether it really works; one module for each field of checks."""
