"""From a bundle's ONNX graphs to TensorRT engines.

The only package that uses the TensorRT builder. It needs the extra `tensorrt` or `rtx`, and no torch.
"""
