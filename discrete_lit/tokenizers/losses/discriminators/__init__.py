"""Networks that tell images from reconstructions. Plain PyTorch."""

from discrete_lit.tokenizers.losses.discriminators.dino import DINODiscriminator
from discrete_lit.tokenizers.losses.discriminators.discriminator import Discriminator
from discrete_lit.tokenizers.losses.discriminators.patch import PatchGAN
from discrete_lit.tokenizers.losses.discriminators.stylegan import StyleGANDiscriminator

__all__ = ["DINODiscriminator", "Discriminator", "PatchGAN", "StyleGANDiscriminator"]
