"""edgeprompt beside its peers, on the same work and the same machine: `python -m benchmarks`."""
