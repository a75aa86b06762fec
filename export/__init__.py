"""Export of a PyTorch student to other runtimes: checkpoints, ONNX, TensorRT. Installed as `cfpp_rt.export`."""
