"""From ONNX graphs to TensorRT engines: parse (network), prove, build (compile, build), ship (bundle), run (engine)."""
