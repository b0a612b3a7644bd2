"""Autoencoder networks around the quantizers. Plain PyTorch.

network.py         the contract
convolutional.py   VQGAN's, and those of MAGVIT-v2, MaskGIT, LlamaGen, VAR and others
dall_e.py          that of DALL-E's dVAE
emu3.py            that of Emu3, also for clips
low_resolution.py  a fast one, which halves the grid before it computes anything
seanet.py          EnCodec's, of waveforms
vit.py             ViT-VQGAN's
"""

from discrete_lit.tokenizers.networks.convolutional import ConvAutoencoder
from discrete_lit.tokenizers.networks.dall_e import DALLEAutoencoder
from discrete_lit.tokenizers.networks.emu3 import Emu3Autoencoder
from discrete_lit.tokenizers.networks.low_resolution import LowResolutionAutoencoder
from discrete_lit.tokenizers.networks.network import Autoencoder
from discrete_lit.tokenizers.networks.seanet import SEANet
from discrete_lit.tokenizers.networks.vit import TransformerSize, ViTAutoencoder

__all__ = [
    "Autoencoder",
    "ConvAutoencoder",
    "DALLEAutoencoder",
    "Emu3Autoencoder",
    "LowResolutionAutoencoder",
    "SEANet",
    "TransformerSize",
    "ViTAutoencoder",
]
