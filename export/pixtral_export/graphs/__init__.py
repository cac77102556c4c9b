"""From torch modules to the three ONNX graphs of a bundle."""
