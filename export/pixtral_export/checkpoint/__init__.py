"""From a checkpoint as it was published to named tensors and a configuration."""
