"""The shared transformer. Plain PyTorch."""

from discrete_lit.backbones.backbone import Backbone, KeyValueCache, SequenceLayout
from discrete_lit.backbones.transformer import Transformer

__all__ = ["Backbone", "KeyValueCache", "SequenceLayout", "Transformer"]
