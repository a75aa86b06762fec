"""The reference of every op in plain PyTorch: the fallback without a kernel, and in float64 the oracle of the tests."""
