"""Benchmarks, one script per question, installed as `cfpp_rt.bench`: `python -m cfpp_rt.bench.<folder>.<script>`."""
