"""The transformer that all generators share, and heads that predict an id in sub-tokens. Plain PyTorch."""

from discrete_lit.backbones.backbone import Backbone, SequenceLayout, SubTokenHead
from discrete_lit.backbones.blocks import BlockSettings
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.sub_token_heads import FactorisedHead, MaskedBitHead
from discrete_lit.backbones.transformer import Transformer

__all__ = [
    "Backbone",
    "BlockSettings",
    "Cache",
    "FactorisedHead",
    "MaskedBitHead",
    "SequenceLayout",
    "SubTokenHead",
    "Transformer",
]
