"""From an ONNX graph to TensorRT engines: parse and prove (network), build (compile, build), ship (bundle), run (runner)."""
