"""The weight file: what it holds, and the one pass over a checkpoint that writes it."""
