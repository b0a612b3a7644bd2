"""TiTok's part of what our modules give for the inputs of the golden files."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from discrete_lit.tokenizers.quantizers import DiagonalGaussian


def load_with_heads(load: Callable[..., Any], published: Mapping[str, Any], encoder: int, decoder: int) -> Any:
    """The module of a case whose networks have another number of heads than the published sizes."""
    config = deepcopy(published["config"])
    config["model"]["vq_model"] |= {"vit_enc_num_heads": encoder, "vit_dec_num_heads": decoder}
    return load(config=config)


def titok(load: Callable[..., Any], inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> dict[str, Tensor]:
    module = load_with_heads(load, published, encoder=4, decoder=4)
    images = inputs["x"] * 2 - 1
    z = module.network.encode(images)
    quantized = module.quantizer(z.movedim(1, -1))
    codes = quantized.codes.movedim(-1, 1)
    indices = module.encode(images)
    return {
        "z": z[:, :, None],
        "z_quantized": codes[:, :, None],
        "indices": indices[:, None],
        "rec_from_indices": unit(module.network.decode(module.embed(indices))),
        "rec_forward": unit(module.reconstruct(images).outputs),
        "decoded_codes": unit(module.network.decode(module.embed(inputs["codes"]))),
        "proxy_logits": module.network.proxy_logits(codes),
    }


def titok_vae(
    load: Callable[..., Any], inputs: Mapping[str, Tensor], published: Mapping[str, Any]
) -> dict[str, Tensor]:
    module = load_with_heads(load, published, encoder=3, decoder=4)
    moments = module.network.encode(inputs["x"] * 2 - 1)
    posterior = module.bottleneck.posterior(moments.movedim(1, -1))
    mean, logvar = (values.movedim(-1, 1)[:, :, None] for values in (posterior.mean, posterior.logvar))
    tokens = zip(posterior.mean.unbind(1), posterior.logvar.unbind(1), strict=True)
    return {
        "moments": moments[:, :, None],
        "mean": mean,
        "logvar": logvar,
        "kl": torch.stack([DiagonalGaussian(*token).kl() for token in tokens], dim=1),
        "rec_from_mean": unit(module.network.decode(mean[:, :, 0])),
        "decoded_z": unit(module.network.decode(inputs["z"][:, :, 0])),
    }


def unit(outputs: Tensor) -> Tensor:
    """From [-1, 1] to the reference's [0, 1], not clamped."""
    return (outputs + 1) / 2
