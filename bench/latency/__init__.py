"""Latency of a student beside its baselines: `cfpp bench`."""
