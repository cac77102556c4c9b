"""The whole model in torch, every parameter under its name in Mistral's checkpoint.

The eager reference that `pixtral check` compares graphs with, and the model that `scripts/train_tiny.py` trains. Export
itself never builds it: it traces one block of a kind at a time.
"""

from __future__ import annotations

from torch import Tensor

from pixtral_export.model.decoder import Decoder, Embedding
from pixtral_export.model.vision import Adapter, VisionEncoder
from pixtral_runtime.bundle.config import ModelConfig


class Pixtral(Decoder):
    """`positions` is the longest sequence the rotary tables cover."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__(config.decoder, positions)
        self.config = config
        self.tok_embeddings = Embedding(config.decoder)
        self.vision_encoder = VisionEncoder(config.vision)
        self.vision_language_adapter = Adapter(config)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) -> features (B, P, D)."""
        features: Tensor = self.vision_language_adapter(self.vision_encoder.encode(pixels))
        return features
