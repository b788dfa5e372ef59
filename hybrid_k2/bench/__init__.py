"""Measurements that a user can repeat: each against the machine's limits, taken in the same run."""
