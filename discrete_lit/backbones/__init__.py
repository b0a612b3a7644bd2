"""The shared transformer. Plain PyTorch."""

from discrete_lit.backbones.backbone import Backbone, SequenceLayout
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.transformer import Transformer

__all__ = ["Backbone", "Cache", "SequenceLayout", "Transformer"]
