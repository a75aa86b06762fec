"""Benchmarks, one script per question. Installed as `cfpp_rt.bench`; run `python -m cfpp_rt.bench.bench_<question>`."""
