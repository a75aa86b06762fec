"""Benchmarks of exported ONNX bundles and TensorRT engines."""
