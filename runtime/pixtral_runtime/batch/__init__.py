"""Many requests through one model, and the files that keep their answers."""
