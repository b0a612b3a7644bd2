"""The transformer that all generators of tokens share, heads that predict an id, networks of latents. Plain PyTorch."""

from discrete_lit.backbones.backbone import Backbone, IdHead, SequenceLayout, SubTokenHead
from discrete_lit.backbones.blocks import BlockSettings
from discrete_lit.backbones.cache import Cache
from discrete_lit.backbones.cell_transformer import CellLayout, CellTransformer
from discrete_lit.backbones.channel_head import ChannelHead, ChannelLayout
from discrete_lit.backbones.denoising_network import DenoisingNetwork, LatentLayout
from discrete_lit.backbones.dit import DiT
from discrete_lit.backbones.masked_autoencoder import MaskedAutoencoder, VectorLayout
from discrete_lit.backbones.scale_transformer import ScaleLayout, ScaleTransformer
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment, SegmentLayout
from discrete_lit.backbones.sub_token_heads import FactorisedHead, MaskedBitHead
from discrete_lit.backbones.text_transformer import TextTransformer
from discrete_lit.backbones.token_diffusion import BinaryFlowHead, DenoisingMLP, TokenDiffusionHead, ids_of_signs
from discrete_lit.backbones.transformer import Transformer
from discrete_lit.backbones.unet import UNet
from discrete_lit.backbones.uvit import UViT
from discrete_lit.backbones.vision_encoder import VisionEncoder

__all__ = [
    "Backbone",
    "BinaryFlowHead",
    "BlockSettings",
    "Cache",
    "CellLayout",
    "CellTransformer",
    "ChannelHead",
    "ChannelLayout",
    "DenoisingMLP",
    "DenoisingNetwork",
    "DiT",
    "FactorisedHead",
    "IdHead",
    "LatentLayout",
    "MaskedAutoencoder",
    "MaskedBitHead",
    "ScaleLayout",
    "ScaleTransformer",
    "Segment",
    "SegmentLayout",
    "SegmentTransformer",
    "SequenceLayout",
    "SubTokenHead",
    "TextTransformer",
    "TokenDiffusionHead",
    "Transformer",
    "UNet",
    "UViT",
    "VectorLayout",
    "VisionEncoder",
    "ids_of_signs",
]
