"""Latency benchmarks of a package: `edgeprompt bench`."""
