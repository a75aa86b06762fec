"""The device: CUDA graph capture, reuse of device memory, asynchronous copies, CPU threads, timings."""
