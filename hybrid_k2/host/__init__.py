"""What this process may use of the machine's host: memory, cores and their NUMA nodes, within its control groups."""
