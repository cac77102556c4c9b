"""Run one graph: on ONNX Runtime or TensorRT, on a CPU or a GPU, behind one `Session` protocol."""
