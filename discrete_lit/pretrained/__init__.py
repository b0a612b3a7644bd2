"""Published checkpoints: one file for each repository that publishes them."""

# Importing a repository's file registers its families.
from discrete_lit.pretrained import (  # noqa: F401
    amazon_bar,
    baai_emu3,
    bitdance,
    compvis_ldm,
    deepseek_janus,
    dit_sit,
    gidd_ddit,
    halton_maskgit,
    hart,
    infinity,
    lightning_dit,
    llamagen,
    mar,
    maskbit,
    maskgit_flax,
    md4,
    meta_audio,
    meta_chameleon,
    openai_dall_e,
    randar,
    rq_vae_transformer,
    sedd_mdlm,
    seed_voken,
    showlab_showo,
    taming,
    titok_rar,
    tokenbridge,
    var,
    vq_diffusion,
    xar,
)
from discrete_lit.pretrained.conversion import FAMILIES
from discrete_lit.pretrained.loading import load_pretrained

__all__ = ["FAMILIES", "load_pretrained"]
