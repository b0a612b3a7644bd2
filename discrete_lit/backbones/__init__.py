"""The shared transformer, and heads that predict an id in parts. Plain PyTorch."""

from discrete_lit.backbones.backbone import Backbone, SequenceLayout
from discrete_lit.backbones.blocks import BlockSettings
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.factorised_head import FactorisedHead
from discrete_lit.backbones.masked_bit_head import MaskedBitHead
from discrete_lit.backbones.place_head import PlaceHead
from discrete_lit.backbones.transformer import Transformer

__all__ = [
    "Backbone",
    "BlockSettings",
    "Cache",
    "FactorisedHead",
    "MaskedBitHead",
    "PlaceHead",
    "SequenceLayout",
    "Transformer",
]
