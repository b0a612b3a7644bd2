"""Published checkpoints: one file for each repository that publishes them and kind of model."""

from discrete_lit.pretrained import (  # noqa: F401
    halton,
    llamagen,
    mar,
    maskbit,
    maskbit_generators,
    maskgit,
    mdlm,
    rar,
    sedd,
    seed_voken,
    taming,
    taming_net2net,
    titok,
    titok_generators,
    var,
    var_transformer,
)
from discrete_lit.pretrained.loading import load_pretrained
from discrete_lit.pretrained.registry import FAMILIES

__all__ = ["FAMILIES", "load_pretrained"]
