"""Published checkpoints: one file for each repository that publishes them."""

from discrete_lit.pretrained import llamagen, maskbit, maskgit, seed_voken, taming, var  # noqa: F401 (register)
from discrete_lit.pretrained.loading import load_pretrained
from discrete_lit.pretrained.registry import FAMILIES

__all__ = ["FAMILIES", "load_pretrained"]
