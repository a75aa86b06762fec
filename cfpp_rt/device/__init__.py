"""The device: CUDA graph capture, copies that do not wait, timings."""
