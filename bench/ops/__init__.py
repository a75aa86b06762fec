"""Benchmarks of the ops of `cfpp_rt.ops`: time, achieved rate and share of the peak rate measured in the same run."""
