"""Benchmarks of forward passes, rollouts, decoding and training."""
