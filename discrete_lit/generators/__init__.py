"""Generators: objectives over token sequences, or over whole latents, around one backbone."""

from discrete_lit.generators.autoregressive import Autoregressive
from discrete_lit.generators.continuous_masked import ContinuousMasked
from discrete_lit.generators.discon import DisCon
from discrete_lit.generators.discrete_diffusion import DiscreteDiffusion
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses, generator_from_checkpoint
from discrete_lit.generators.graphed_draw import GraphedDraw
from discrete_lit.generators.latent_diffusion import LatentDiffusion
from discrete_lit.generators.latent_generator import LatentGenerator, LatentLosses
from discrete_lit.generators.masked import Masked
from discrete_lit.generators.next_scale import NextScale
from discrete_lit.generators.token_diffusion_decoder import TokenDiffusionDecoder

__all__ = [
    "Autoregressive",
    "ContinuousMasked",
    "DisCon",
    "DiscreteDiffusion",
    "Generator",
    "GraphedDraw",
    "LatentDiffusion",
    "LatentGenerator",
    "LatentLosses",
    "Likelihood",
    "Masked",
    "NextScale",
    "TokenDiffusionDecoder",
    "TokenLosses",
    "generator_from_checkpoint",
]
