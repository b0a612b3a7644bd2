"""What our modules give for the inputs of the golden files, by the names of their outputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from discrete_lit.tokenizers.quantizers import VectorQuantizer
from helpers.golden_titok import titok, titok_vae

Tensors = dict[str, Tensor]
Load = Callable[..., Any]
"""`load(**reference)`: the module of the case, with some reference arguments in place of the published ones."""
Outputs = Callable[[Load, Mapping[str, Tensor], Mapping[str, Any]], Tensors]


def channels_first(vectors: Tensor) -> Tensor:
    return vectors.movedim(-1, 1)


def quantize(module: Any, prequant: Tensor) -> Any:
    return module.quantizer(prequant.movedim(1, -1))


def decode(module: Any, codes: Tensor) -> Tensor:
    """Without the clamp of `decode`, in the pixels of the network."""
    outputs = module.network.decode(codes)
    return (outputs + 1) / 2 if module.network.pixels == "unit" else outputs


def common(module: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensors, Any]:
    """Latents, ids, codes and reconstructions, and what the quantizer gave.

    Images in [0, 1] are rounded on their way through [-1, 1]; entropies at a temperature of 0.01 magnify that, so the
    quantizer is given the latents of the images as they were.
    """
    images = inputs["x"] * 2 - 1 if module.network.pixels == "unit" else inputs["x"]
    prequant = module.network.encode(images)
    quantized = quantize(module, module.network.encoder(inputs["x"]))
    indices = module.encode(images)
    assert torch.equal(indices, quantized.tokens)
    codes = inputs["codes"].reshape(-1, *indices.shape[1:])
    made = {
        "prequant": prequant,
        "indices": indices,
        "quant": channels_first(quantized.codes),
        "quant_from_indices": module.embed(indices),
        "xrec": decode(module, module.embed(indices)),
        "decoded_codes": decode(module, module.embed(codes)),
    }
    return made, quantized


def taming_vqgan(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    made, quantized = common(module, inputs)
    made["emb_loss"] = sum(quantized.losses.values())
    legacy = module.quantizer
    fixed = VectorQuantizer(legacy.vocab_size, legacy.dim, "gradient", codebook_init="uniform")
    fixed.load_state_dict(legacy.state_dict())
    for name, quantizer in {"legacy": legacy, "fixed": fixed}.items():
        latents = made["prequant"].detach().requires_grad_()
        loss = torch.stack(list(quantizer(latents.movedim(1, -1)).losses.values())).sum()
        of_latents, of_codes = torch.autograd.grad(loss, (latents, quantizer.codebook.codes))
        made |= {f"grad_prequant_{name}": of_latents, f"grad_codebook_{name}": of_codes}
    return made


def taming_gumbelvq(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load(kl_weight=1.0)
    prequant = module.network.encode(inputs["x"])
    indices = module.encode(inputs["x"])
    latents, noise = prequant.movedim(1, -1), inputs["gumbel_noise"].movedim(1, -1)
    sampled = {}
    for temperature in (0.5, 1.0):
        module.quantizer.temperature = temperature
        sampled[temperature] = module.quantizer(latents, noise=noise)
    codes = channels_first(sampled[1.0].codes)
    return {
        "prequant": prequant,
        "logits": channels_first(module.quantizer.to_logits(latents)),
        "indices_argmax": indices,
        "quant_argmax": module.embed(indices),
        "xrec_argmax": decode(module, module.embed(indices)),
        "indices_gumbel": sampled[1.0].tokens,
        "quant_gumbel": codes,
        "xrec_gumbel": decode(module, codes),
        "kl_diff": sampled[1.0].losses["kl"],
        "indices_gumbel_temp_half": sampled[0.5].tokens,
    }


def llamagen_vq(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    made, quantized = common(load(), inputs)
    losses = quantized.losses
    # The published weight of the entropy term is 0, which leaves it out.
    entropy = sum((value for name, value in losses.items() if "entropy" in name), start=torch.zeros(()))
    vector_losses = {"train_vq_loss": losses["codebook"], "train_commit_loss": losses["commitment"]}
    return made | vector_losses | {"train_entropy_loss": entropy}


def var_vqvae(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    f = module.network.encode(inputs["x"])
    indices = module.encode(inputs["x"])
    cumulative = module.quantizer.cumulative(indices)
    codes = module.embed(inputs["codes"])
    return {
        "f": f,
        "indices": indices,
        "fhat_per_scale": cumulative,
        "images_per_scale": torch.stack([decode(module, f_hat).clamp(-1, 1) for f_hat in cumulative]),
        "image": module.decode(indices),
        "reconstruction": module.reconstruct(inputs["x"]).outputs.clamp(-1, 1),
        "var_input": module.quantizer.teacher_forcing(indices),
        "decoded_codes": module.decode(inputs["codes"]),
        "fhat_codes": codes,
    }


def raw_and_ema(family: Outputs, load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    raw = family(partial(load, use_ema=False), inputs, published)
    ema = family(load, inputs, published)
    return {f"{name}_raw": value for name, value in raw.items()} | {f"{name}_ema": value for name, value in ema.items()}


def magvit2_lfq(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    made, quantized = common(module, inputs)
    bits = [part.ids for part in module.quantizer.parts(made["indices"]).values()]
    first, second = published["factorized_bits used for indices_pre/post"]
    halves = {"indices_pre": bits[:first], "indices_post": bits[first:]}
    assert len(halves["indices_post"]) == second
    made |= {name: sum(bit << place for place, bit in enumerate(half)) for name, half in halves.items()}
    losses, weight = quantized.losses, module.quantizer.entropy_weight
    sample, batch = losses["sample_entropy"] / weight, -losses["batch_entropy"] / weight
    made |= {"train_sample_entropy": sample, "train_codebook_entropy": batch, "train_entropy_loss": sample - batch}
    return made | {"train_commit": losses["commitment"] / module.quantizer.commitment_weight}


def ibq(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    made, quantized = common(module, inputs)
    losses, weight = quantized.losses, module.quantizer.entropy_weight
    sample, batch = losses["sample_entropy"] / weight, -losses["batch_entropy"] / weight
    made |= {"sample_entropy": sample, "avg_entropy": batch, "entropy_loss": sample - batch}
    return made | {"quant_loss": losses["quantization"] + losses["commitment"] + losses["codebook"]}


def maskgit_vqgan(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    made, quantized = common(load(), inputs)
    made["indices"] = made["indices"].flatten(1)
    made |= {"rec_unclamped": made["xrec"], "rec": made["xrec"].clamp(0, 1)}
    return made | {
        "decoded_codes": made["decoded_codes"].clamp(0, 1),
        "codebook_loss": sum(quantized.losses.values()),
    }


def vqgan_plus(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    made, quantized = common(load(), inputs)
    return made | {"commitment_loss": quantized.losses["commitment"]}


def maskbit_tokenizer(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    made, quantized = common(module, inputs)
    losses, weight = quantized.losses, module.quantizer.entropy_weight
    return made | {
        "commitment_loss": losses["commitment"],
        "train_entropy_loss": losses["sample_entropy"] + losses["batch_entropy"],
        "train_per_sample_entropy": losses["sample_entropy"] / weight,
        "train_avg_entropy": -losses["batch_entropy"] / weight,
    }


def mar_kl_vae(load: Load, inputs: Mapping[str, Tensor], published: Mapping[str, Any]) -> Tensors:
    module = load()
    posterior = module.posterior(inputs["x"])
    mean = channels_first(posterior.mean)
    torch.testing.assert_close(module.encode(inputs["x"]), mean * 0.2325)
    return {
        "mean": mean,
        "logvar": channels_first(posterior.logvar),
        "std": channels_first((posterior.logvar / 2).exp()),
        "kl": posterior.kl(),
        "rec_from_mean": decode(module, mean),
        "decoded_z": decode(module, inputs["z"]),
    }


OUTPUTS: dict[str, Outputs] = {
    "taming_vqgan": taming_vqgan,
    "taming_gumbelvq": taming_gumbelvq,
    "llamagen_vq": llamagen_vq,
    "var_vqvae": var_vqvae,
    "magvit2_lfq": partial(raw_and_ema, magvit2_lfq),
    "ibq": partial(raw_and_ema, ibq),
    "maskgit_vqgan": maskgit_vqgan,
    "vqgan_plus": vqgan_plus,
    "maskbit_tokenizer": maskbit_tokenizer,
    "mar_kl_vae": mar_kl_vae,
    "titok": titok,
    "titok_vae": titok_vae,
}
