"""Two sides of one model compared tensor by tensor: bundle and bundle, graph and reference."""
