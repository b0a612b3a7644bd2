"""Published checkpoints: one file for each repository that publishes them."""

from discrete_lit.pretrained import llamagen, mar, maskbit, maskgit, seed_voken, taming, titok, var  # noqa: F401
from discrete_lit.pretrained.loading import load_pretrained
from discrete_lit.pretrained.registry import FAMILIES

__all__ = ["FAMILIES", "load_pretrained"]
