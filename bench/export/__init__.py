"""Benchmarks of exported bundles and engines."""
