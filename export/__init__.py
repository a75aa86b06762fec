"""From a PyTorch student to other runtimes: checkpoint conversion, ONNX and TensorRT. Installed as `cfpp_rt.export`."""
