"""TensorRT engines from ONNX graphs: parse, check, build, bundle, run."""
