"""Published checkpoints: one file for each repository that publishes them and kind of model."""

from discrete_lit.pretrained.conversion import FAMILIES
from discrete_lit.pretrained.loading import load_pretrained

__all__ = ["FAMILIES", "load_pretrained"]
