"""The hand-over from export to runtime as data: configuration, graph contract, manifest, engines, sizes."""
