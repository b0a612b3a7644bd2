"""Generators: objectives over token sequences around one backbone."""

from discrete_lit.generators.autoregressive import Autoregressive
from discrete_lit.generators.discrete_diffusion import DiscreteDiffusion
from discrete_lit.generators.generator import Generator, Likelihood, TokenLosses
from discrete_lit.generators.graphed_draw import GraphedDraw
from discrete_lit.generators.masked import Masked
from discrete_lit.generators.next_scale import NextScale

__all__ = [
    "Autoregressive",
    "DiscreteDiffusion",
    "Generator",
    "GraphedDraw",
    "Likelihood",
    "Masked",
    "NextScale",
    "TokenLosses",
]
