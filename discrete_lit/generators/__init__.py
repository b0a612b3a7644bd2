"""Generators: objectives over token sequences, or over whole latents, around one backbone."""

from discrete_lit.generators.autoregressive import Autoregressive
from discrete_lit.generators.bitwise_next_scale import BitwiseNextScale
from discrete_lit.generators.continuous_autoregressive import ContinuousAutoregressive
from discrete_lit.generators.continuous_masked import ContinuousMasked
from discrete_lit.generators.delayed_autoregressive import DelayedAutoregressive
from discrete_lit.generators.dimensionwise_masked import DimensionwiseMasked
from discrete_lit.generators.discon import DisCon
from discrete_lit.generators.discrete_diffusion import DiscreteDiffusion
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, generator_from_checkpoint
from discrete_lit.generators.graphed_draw import GraphedDraw
from discrete_lit.generators.hybrid_next_scale import ContinuousNextScale, HybridNextScale, VectorPyramid
from discrete_lit.generators.latent_diffusion import LatentDiffusion
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.generators.masked import Masked
from discrete_lit.generators.next_cell import NextCell
from discrete_lit.generators.next_scale import NextScale
from discrete_lit.generators.segment_generator import SegmentGenerator
from discrete_lit.generators.super_resolution import SuperResolution
from discrete_lit.generators.text_and_image import CaptionIds
from discrete_lit.generators.text_video_audio import TextVideoAudio, VideoAndAudio
from discrete_lit.generators.token_diffusion_decoder import TokenDiffusionDecoder
from discrete_lit.generators.unified import Unified

__all__ = [
    "Autoregressive",
    "BitwiseNextScale",
    "CaptionIds",
    "ContinuousAutoregressive",
    "ContinuousMasked",
    "ContinuousNextScale",
    "DelayedAutoregressive",
    "DimensionwiseMasked",
    "DisCon",
    "DiscreteDiffusion",
    "Generator",
    "GraphedDraw",
    "HybridNextScale",
    "LatentDiffusion",
    "LatentGenerator",
    "LatentLosses",
    "Likelihood",
    "Masked",
    "NextCell",
    "NextScale",
    "SegmentGenerator",
    "SuperResolution",
    "TextVideoAudio",
    "TokenDiffusionDecoder",
    "TokenLosses",
    "Unified",
    "VectorPyramid",
    "VideoAndAudio",
    "generator_from_checkpoint",
]
