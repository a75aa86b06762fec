"""Every op once more in plain PyTorch: fallback where no kernel is built, and oracle in float64."""
