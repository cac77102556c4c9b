"""From a Pixtral checkpoint to a bundle: reads the weights, traces the graphs to ONNX, writes and checks the result.

The only package that uses torch. It needs the extra `export`: `pip install 'pixtral[cpu,export]'`.
"""
