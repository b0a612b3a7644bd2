"""What our tokenizers give for the inputs of the golden cases, by the names of the reference's outputs."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from discrete_lit.metrics.latent_statistics import LatentStatistics
from discrete_lit.tokenizers.klvae import DiagonalGaussian
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective
from discrete_lit.tokenizers.losses.adversarial import AdaptiveWeight
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.losses.objective import map_pixels
from discrete_lit.tokenizers.quantizers import VectorQuantizer
from discrete_lit.tokenizers.quantizers.codebook import Codebook
from helpers.golden import Case, Compared, Load, Tensors

Outputs = Callable[[Load, Case], Tensors]

NO_PLACE = {
    "maskgit_vqgan": {"soft_code": "a softmax over codes that no training of ours distils"},
    "rq_vae": {"soft_codes": "a softmax over codes, which RQ-Transformer learns from"},
}
COMPARED: Compared = {}
TOLERANCE = 1e-4
# The reference decodes this one in channels-last memory, where torch's GroupNorm on a CPU loses half of float32's
# digits to channels with means far above their deviations: its own image is 2.6e-3 from the same network's in float64,
# ours 1e-6. Its "decoded_bits" come from plain memory and are held to TOLERANCE.
TOLERANCES = {("bitdance_ae", "reconstruction"): 4e-3}


def channels_first(vectors: Tensor) -> Tensor:
    return vectors.movedim(-1, 1)


def quantize(module: Any, prequant: Tensor) -> Any:
    return module.quantizer(prequant.movedim(1, -1))


def decode(module: Any, codes: Tensor) -> Tensor:
    """Without the clamp of `decode`, in the pixels of the network."""
    outputs = module.network.decode(codes)
    return (outputs + 1) / 2 if module.network.pixels == "unit" else outputs


def common(module: Any, case: Case) -> tuple[Tensors, Any]:
    """Latents, ids, codes and reconstructions, and what the quantizer gave.

    Entropies at a temperature of 0.01 magnify how an encoder rounds, which depends on the processor. So the quantizer
    is given the reference's latents, where the case has them; ours are compared with them on their own.
    """
    images = case.inputs["x"] * 2 - 1 if module.network.pixels == "unit" else case.inputs["x"]
    prequant = module.network.encode(images)
    quantized = quantize(module, case.expected.get("prequant", prequant))
    indices = module.encode(images)
    assert torch.equal(indices, quantized.tokens)
    codes = case.inputs["codes"].reshape(-1, *indices.shape[1:])
    made = {
        "prequant": prequant,
        "indices": indices,
        "quant": channels_first(quantized.z_q),
        "quant_from_indices": module.embed(indices),
        "xrec": decode(module, module.embed(indices)),
        "decoded_codes": decode(module, module.embed(codes)),
    }
    return made, quantized


def taming_vqgan(load: Load, case: Case) -> Tensors:
    module = load()
    made, quantized = common(module, case)
    made["emb_loss"] = sum(quantized.losses.values(), start=torch.zeros(()))
    legacy = module.quantizer
    beta = case.number("emb_loss", "beta", case.default("beta"))
    fixed = VectorQuantizer(
        legacy.vocab_size, legacy.dim, codebook_update="gradient", codebook_init="uniform", commitment_weight=beta
    )
    fixed.load_state_dict(legacy.state_dict())
    for name, quantizer in {"legacy": legacy, "fixed": fixed}.items():
        with torch.enable_grad():
            latents = made["prequant"].detach().requires_grad_()
            loss = torch.stack(list(quantizer(latents.movedim(1, -1)).losses.values())).sum()
            of_latents, of_codes = torch.autograd.grad(loss, (latents, quantizer.codebook.codes))
        made |= {f"grad_prequant_{name}": of_latents, f"grad_codebook_{name}": of_codes}
    return made


def taming_gumbelvq(load: Load, case: Case) -> Tensors:
    module = load(kl_weight=case.number("kl_diff", "kl_weight set to"))
    prequant = module.network.encode(case.inputs["x"])
    indices = module.encode(case.inputs["x"])
    latents, noise = prequant.movedim(1, -1), case.inputs["gumbel_noise"].movedim(1, -1)

    def sampled(temperature: float) -> Any:
        module.quantizer.temperature = temperature
        return module.quantizer(latents, noise=noise)

    first = sampled(case.number("indices_gumbel", "temp"))
    codes = channels_first(first.z_q)
    other = {name: sampled(case.number(name, "temperature")) for name in case.matching("indices_gumbel_temp_.*")}
    return {
        "prequant": prequant,
        "logits": channels_first(module.quantizer.to_logits(latents)),
        "indices_argmax": indices,
        "quant_argmax": module.embed(indices),
        "xrec_argmax": decode(module, module.embed(indices)),
        "indices_gumbel": first.tokens,
        "quant_gumbel": codes,
        "xrec_gumbel": decode(module, codes),
        "kl_diff": first.losses["kl"],
        **{name: quantized.tokens for name, quantized in other.items()},
    }


def llamagen_vq(load: Load, case: Case) -> Tensors:
    made, quantized = common(load(), case)
    losses = quantized.losses
    # The published weight of the entropy term is 0, which leaves it out.
    entropy = sum((value for name, value in losses.items() if "entropy" in name), start=torch.zeros(()))
    vector_losses = {"train_vq_loss": losses["codebook"], "train_commit_loss": losses["commitment"]}
    return made | vector_losses | {"train_entropy_loss": entropy}


def var_vqvae(load: Load, case: Case) -> Tensors:
    module = load()
    f = module.network.encode(case.inputs["x"])
    indices = module.encode(case.inputs["x"])
    cumulative = module.quantizer.cumulative(indices)
    codes = module.embed(case.inputs["codes"])
    return {
        "f": f,
        "indices": indices,
        "fhat_per_scale": cumulative,
        "images_per_scale": torch.stack([decode(module, f_hat).clamp(-1, 1) for f_hat in cumulative]),
        "image": module.decode(indices),
        "reconstruction": module.reconstruct(case.inputs["x"]).outputs.clamp(-1, 1),
        "var_input": module.quantizer.teacher_forcing(indices),
        "decoded_codes": module.decode(case.inputs["codes"]),
        "fhat_codes": codes,
    }


def raw_and_ema(family: Outputs, load: Load, case: Case) -> Tensors:
    made: Tensors = {}
    for suffix, loads in {"raw": partial(load, use_ema=False), "ema": load}.items():
        if case.matching(f".*_{suffix}"):
            made |= {f"{name}_{suffix}": value for name, value in family(loads, case).items()}
    return made


def magvit2_lfq(load: Load, case: Case) -> Tensors:
    module = load()
    made, quantized = common(module, case)
    if case.expects("indices_pre"):
        bits = [part.ids for part in module.quantizer.components(made["indices"]).values()]
        first, second = case.constructor["factorized_bits used for indices_pre/post"]
        halves = {"indices_pre": bits[:first], "indices_post": bits[first:]}
        assert len(halves["indices_post"]) == second
        for name, half in halves.items():
            made[name] = torch.stack([bit << place for place, bit in enumerate(half)]).sum(dim=0)
    sample, batch = entropies(module, quantized)
    of_sample = case.constructor.get("sample_minimization_weight", 1.0)
    of_batch = case.constructor.get("batch_maximization_weight", 1.0)
    made |= {"train_sample_entropy": sample, "train_codebook_entropy": batch}
    made |= {"train_entropy_loss": of_sample * sample - of_batch * batch}
    return made | {"train_commit": quantized.losses["commitment"] / module.quantizer.commitment_weight}


def entropies(module: Any, quantized: Any) -> tuple[Tensor, Tensor]:
    """The entropy of a place and that of the batch, without their weight."""
    losses, quantizer = quantized.losses, module.quantizer
    weight = quantizer.entropy_weight
    return losses["sample_entropy"] / weight, -losses["batch_entropy"] / (weight * quantizer.batch_entropy_weight)


def ibq(load: Load, case: Case) -> Tensors:
    module = load()
    made, quantized = common(module, case)
    losses = quantized.losses
    if case.expects("sample_entropy"):
        sample, batch = entropies(module, quantized)
        of_sample = case.constructor.get("sample_minimization_weight", 1.0)
        of_batch = case.constructor.get("batch_maximization_weight", 1.0)
        made |= {"sample_entropy": sample, "avg_entropy": batch, "entropy_loss": of_sample * sample - of_batch * batch}
    return made | {"quant_loss": losses["quantization"] + losses["commitment"] + losses["codebook"]}


def maskgit_vqgan(load: Load, case: Case) -> Tensors:
    made, quantized = common(load(), case)
    made["indices"] = made["indices"].flatten(1)
    made |= {"rec_unclamped": made["xrec"], "rec": made["xrec"].clamp(0, 1)}
    return made | {
        "decoded_codes": made["decoded_codes"].clamp(0, 1),
        "codebook_loss": sum(quantized.losses.values(), start=torch.zeros(())),
    }


def vqgan_plus(load: Load, case: Case) -> Tensors:
    made, quantized = common(load(), case)
    return made | {"commitment_loss": quantized.losses["commitment"]}


def maskbit_tokenizer(load: Load, case: Case) -> Tensors:
    module = load()
    made, quantized = common(module, case)
    sample, batch = entropies(module, quantized)
    losses = quantized.losses
    return made | {
        "commitment_loss": losses["commitment"],
        "train_entropy_loss": losses["sample_entropy"] + losses["batch_entropy"],
        "train_per_sample_entropy": sample,
        "train_avg_entropy": batch,
    }


def mar_kl_vae(load: Load, case: Case) -> Tensors:
    module = load()
    posterior = module.posterior(case.inputs["x"])
    mean = channels_first(posterior.mean)
    torch.testing.assert_close(module.encode(case.inputs["x"]), mean * case.default("scale_factor"))
    return {
        "mean": mean,
        "logvar": channels_first(posterior.logvar),
        "std": channels_first((posterior.logvar / 2).exp()),
        "kl": posterior.kl(),
        "rec_from_mean": decode(module, mean),
        "decoded_z": decode(module, case.inputs["z"]),
    }


def va_vae(load: Load, case: Case) -> Tensors:
    """Latents, their statistics, and the losses and gradients of a training step, with the case's noise and features.

    Pixel losses are means here and sums there: a loss of ours, times the numbers of an image, is the reference's.
    """
    statistics, latents = LatentStatistics(case.inputs["latents"].shape[1]), case.inputs["latents"]
    statistics.update(latents)
    mean_and_std = [values.float() for values in statistics.compute()]
    normalised, module = deepcopy(load()), deepcopy(load())
    normalised.latent_mean, normalised.latent_std = (values.tolist() for values in mean_and_std)
    assert module.scale_factor == case.constructor["latent_multiplier"]
    posterior = module.posterior(case.inputs["x"])
    mean = channels_first(posterior.mean)
    torch.testing.assert_close(module.encode(case.inputs["x"]), mean)
    made = {
        "mean": mean,
        "logvar": channels_first(posterior.logvar),
        "kl": posterior.kl(),
        "rec_from_mean": decode(module, mean),
        "decoded_z": decode(module, case.inputs["z"]),
        "latent_mean": mean_and_std[0][:, None, None][None],
        "latent_std": mean_and_std[1][:, None, None][None],
        "latents_normalised": normalised.scaled(latents),
        "latents_back": normalised.unscaled(case.inputs["z"]),
    }

    losses = case.constructor["lossconfig"]
    discriminator = {name: value for name, value in case.state.items() if name.startswith("loss.discriminator.")}
    patches = PatchGAN(
        width=discriminator["loss.discriminator.main.0.weight"].shape[0], layers=losses["disc_num_layers"], norm="batch"
    )
    patches.load_state_dict({name.removeprefix("loss.discriminator."): value for name, value in discriminator.items()})
    by_sums = AdaptiveWeight(reduction="sum")
    adversarial = AdversarialLoss(patches, losses["disc_weight"], adaptive=by_sums, start_step=losses["disc_start"])
    # The reference's likelihood has a variance that it never trains: a weight of the pixels, and a constant.
    logvar = case.state["loss.logvar"]
    module.objective = Objective({"l1": float((-logvar).exp())}, adversarial_loss=adversarial)
    module.alignment.features = lambda images: case.inputs["aux_feature"].movedim(1, -1)
    scale, noise = case.inputs["x"][0].numel(), case.inputs["noise"].movedim(1, -1)

    def step(number: int) -> tuple[Tensor, Tensors, Any]:
        with patch("torch.randn_like", lambda _: noise):
            loss, terms, reconstruction = module.train().loss(case.inputs["x"], step=number)
        return loss, terms, reconstruction

    with torch.enable_grad():
        early, _, _ = step(3)
        loss, terms, reconstruction = step(9)
        parameters = {
            "encoder.conv_out.weight": module.network.encoder.conv_out.weight,
            "encoder.conv_in.weight": module.network.encoder.conv_in.weight,
            "quant_conv.weight": module.network.encoder.to_latents.weight,
            "decoder.conv_out.weight": module.network.decoder.conv_out.weight,
            "post_quant_conv.weight": module.network.decoder.from_codes.weight,
            "linear_proj.weight": module.alignment.projection.weight,
        }
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        made[f"grad.{name}"] = (gradient * scale).reshape(case.expected[f"grad.{name}"].shape)
    figures = reconstruction.figures
    z, features = module.alignment.compared(reconstruction.latents, module.alignment.features(case.inputs["x"]))
    numbers = {
        "loss_early": (early + logvar) * scale,
        "log_early.disc_factor": torch.tensor(float(adversarial.trains(3))),
        "loss_late": (loss - terms["discriminator"] + logvar) * scale,
        "log.kl_loss": terms["kl"] / module.bottleneck.kl_weight,
        "log.nll_loss": (terms["reconstruction_l1"] + logvar) * scale,
        "log.rec_loss": terms["reconstruction_l1"] * logvar.exp(),
        "log.d_weight": figures["generator_weight"] * scale,
        "log.disc_factor": torch.tensor(adversarial.warmup(9)),
        "log.g_loss": terms["generator"] / figures["generator_weight"],
        "log.vf_loss": terms["alignment"] / figures["alignment_weight"],
        "log.vf_weight": figures["alignment_weight"] * scale,
        "vf_distmat": module.alignment.distance_term(z, features),
        "vf_cos": module.alignment.cosine_term(z, features),
        "disc_loss": terms["discriminator"],
    }
    return {
        **made,
        **{name: value.detach().reshape(1) for name, value in numbers.items()},
        "sample": channels_first(reconstruction.latents),
        "reconstruction": reconstruction.outputs,
        "z_vf": channels_first(z),
        "aux_vf": channels_first(features),
    }


def bitdance_ae(load: Load, case: Case) -> Tensors:
    """Ids, signs and images, decoded in plain memory, where GroupNorm is exact."""
    module = load()
    ids = module.encode(case.inputs["x"])
    groups = case.constructor["num_codebooks"]
    assert module.quantizer.entropy_groups == groups
    width = module.quantizer.dim // groups
    # An id of ours holds those of all codebooks, the first in its lowest bits.
    parts = torch.stack([ids.flatten(1) >> (width * group) & (2**width - 1) for group in range(groups)], dim=-1)
    whole = (case.expected["indices"] << width * torch.arange(groups)).sum(dim=-1)
    return {
        "h": module.network.encode(case.inputs["x"]),
        "quant": module.embed(ids),
        "indices": parts,
        "reconstruction": module.network.decoder(module.embed(ids).contiguous()),
        "decoded_bits": module.network.decoder(case.inputs["bits"].contiguous()),
        "indices_to_bits": module.quantizer.lookup(whole),
    }


def hart_tokenizer(load: Load, case: Case) -> Tensors:
    """Ids, residuals and the three sums of codes: of training, of VAR's decoding, and of a draw with its residual."""
    module = load()
    images, given, quantizer = case.inputs["x"], case.inputs["idx"], module.quantizer
    encoded = module.encode_with_residual(images)
    last = quantizer.split(encoded.tokens)[-1]
    before_last = encoded.residual + quantizer.raw_codes(last)
    f_hats, made = quantizer.cumulative(given), {}
    for number in range(len(quantizer.scales) - 1):
        at_next = quantizer.at_scale(number + 1, f_hats[number])
        height, _ = quantizer.sizes[number + 1]
        made[f"next_input_{number}"] = at_next.unflatten(1, (height, -1)).movedim(-1, 1)
    made |= {
        "f": module.network.encode(images),
        "idx": encoded.tokens,
        "idx_plain": module.encode(images),
        "frest": before_last.flatten(2).movedim(1, -1),
        "var_input": quantizer.teacher_forcing(encoded.tokens),
        "fhat_embed": module.embed(given),
        "fhat_ar": module.join(given, before_last),
        "img_ar": module.decode_with_residual(given, before_last),
    }
    # The case's gradients are those of a tokenizer that is trained as a whole.
    whole = load(freeze_codebook_for_hybrid=False).train()
    whole.skip_residual = 0.0
    with torch.enable_grad():
        loss, terms, reconstruction = whole.loss(images)
        parameters = {
            "encoder.conv_in.weight": whole.network.encoder.conv_in.weight,
            "quantize.embedding.weight": quantizer_codes(whole),
            "quantize.quant_resi.qresi_ls.0.weight": whole.quantizer.phi[0].weight,
            "post_quant_conv.weight": whole.network.decoder.from_codes.weight,
        }
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    made |= {f"grad.{name}": gradient for name, gradient in zip(parameters, gradients, strict=True)}
    whole.skip_residual = 1.0
    return made | {
        "recon_discrete": whole.reconstruct(images).outputs,
        "recon_continuous": reconstruction.outputs.detach(),
        "vq_loss": (terms["commitment"] + terms["codebook"]).detach(),
        "loss_recon": terms["reconstruction"].detach(),
        "loss_total": loss.detach(),
    }


def rq_vae(load: Load, case: Case) -> Tensors:
    """Codes, images, a training step's losses and gradients, and what training makes of the codebook."""
    module, images, given = deepcopy(load()), case.inputs["x"], case.inputs["codes"]
    quantizer, encoded = module.quantizer, module.encode(images)

    def by_depth(tokens: Tensor) -> Tensor:
        looked_up = [quantizer.codebook(number).lookup(ids) for number, ids in enumerate(tokens.unbind(-1))]
        return torch.stack(looked_up)

    # Through the first code and the second.
    partly = by_depth(given)[:2].sum(dim=0)
    with torch.enable_grad():
        loss, terms, reconstruction = module.loss(images)
        parameters = {
            "encoder.conv_in.weight": module.network.encoder.conv_in.weight,
            "quant_conv.weight": module.network.encoder.to_latents.weight,
            "decoder.conv_out.weight": module.network.decoder.conv_out.weight,
        }
        gradients = torch.autograd.grad(loss, list(parameters.values()))
    commitment = terms["commitment"] / quantizer.commitment_weight
    made = {
        "recon": reconstruction.outputs,
        "codes": encoded,
        "prequant": module.latents(images),
        "quant_partial": by_depth(encoded).cumsum(dim=0),
        "decoded_codes": module.outputs(quantizer.lookup(given)),
        "code_emb": by_depth(given).movedim(0, -2),
        "decoded_partial_add": module.outputs(partly),
        "quant_loss": commitment.reshape(1),
        "loss_recon": terms["reconstruction"].reshape(1),
        "loss_total": loss.reshape(1),
    }
    for name, gradient in zip(parameters, gradients, strict=True):
        made[f"grad.{name}"] = gradient.reshape(case.expected[f"grad.{name}"].shape)
    latents = case.expected["prequant"]
    with patch.object(Codebook, "_revive", drawn_by(case.inputs["restart_perm"])):
        made["ema_codes"] = quantizer.train()(latents).tokens
    for number, codebook in enumerate(quantizer.codebooks):
        no_code = case.state[f"quantizer.codebooks.{number}.weight"][-1:]
        made |= {
            f"ema_weight_{number}": torch.cat((codebook.codes, no_code)),
            f"ema_cluster_size_{number}": codebook.cluster_size,
            f"ema_embed_{number}": codebook.embedding_sum,
        }
    return {name: value.detach() for name, value in made.items()}


def drawn_by(permutations: Tensor) -> Callable[..., None]:
    """A `Codebook._revive` that draws as RQ-VAE does, by a permutation of the latents at each depth."""
    rest = iter(permutations)

    def revive(codebook: Codebook, rows: Tensor, finite: Tensor) -> None:
        drawn, dead = rows[next(rest)], codebook.cluster_size < 1
        latents = drawn[: codebook.size][dead]
        codebook.codes[dead] = codebook.embedding_sum[dead] = latents
        codebook.cluster_size[dead] = 1

    return revive


def dalle_dvae(load: Load, case: Case) -> Tensors:
    """Logits, pixels of given ids, and the relaxed path with its gradients, without noise at a temperature of 1."""
    module = deepcopy(load())
    images = case.inputs["image"] * 2 - 1
    encoded, stats = module.encode(images), module.outputs(module.quantizer.lookup(case.inputs["codes"]))
    with torch.enable_grad():
        latents = module.latents(images)
        logits = module.quantizer.to_logits(latents)
        relaxed = module.quantizer(latents, noise=torch.zeros_like(logits), temperature=1.0)
        soft = module.outputs(relaxed.z_q)
        network = module.network
        parameters = {
            "encoder.blocks.input.w": network.conv_in.weight,
            "encoder.blocks.group_2.block_1.id_path.w": network.encoder.group_2.block_1.shortcut.weight,
            "decoder.blocks.input.w": module.quantizer.codes,
            "decoder.blocks.output.conv.b": network.conv_out.bias,
        }
        gradients = dict(
            zip(parameters, torch.autograd.grad(soft.square().mean(), list(parameters.values())), strict=True)
        )
    gradients["decoder.blocks.input.w"] = gradients["decoder.blocks.input.w"].T[..., None, None]
    made = {
        "mapped": map_pixels(images),
        "logits": channels_first(logits),
        "codes": encoded,
        "stats": stats,
        "decoded_codes": unit(module.decode(case.inputs["codes"])),
        "stats_soft": soft,
        "recon": unit(module.decode(encoded)),
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }
    return {name: value.detach() for name, value in made.items()}


def quantizer_codes(module: Any) -> Tensor:
    """The codes themselves, a parameter where gradients move them."""
    return module.quantizer.codebook.codes


def titok(load: Load, case: Case) -> Tensors:
    module = load()
    images = case.inputs["x"] * 2 - 1
    z = module.network.encode(images)
    quantized = module.quantizer(z.movedim(1, -1))
    codes = quantized.z_q.movedim(-1, 1)
    indices = module.encode(images)
    made = {
        "z": z[:, :, None],
        "z_quantized": codes[:, :, None],
        "indices": indices[:, None],
        "rec_from_indices": unit(module.network.decode(module.embed(indices))),
        "rec_forward": unit(module.reconstruct(images).outputs),
        "decoded_codes": unit(module.network.decode(module.embed(case.inputs["codes"]))),
    }
    if case.expects("proxy_logits"):
        made["proxy_logits"] = module.network.proxy_logits(codes)
    return made


def titok_vae(load: Load, case: Case) -> Tensors:
    module = load()
    moments = module.network.encode(case.inputs["x"] * 2 - 1)
    posterior = module.bottleneck.posterior(moments.movedim(1, -1))
    mean, logvar = (values.movedim(-1, 1)[:, :, None] for values in (posterior.mean, posterior.logvar))
    tokens = zip(posterior.mean.unbind(1), posterior.logvar.unbind(1), strict=True)
    return {
        "moments": moments[:, :, None],
        "mean": mean,
        "logvar": logvar,
        "kl": torch.stack([DiagonalGaussian(*token).kl() for token in tokens], dim=1),
        "rec_from_mean": unit(module.network.decode(mean[:, :, 0])),
        "decoded_z": unit(module.network.decode(case.inputs["z"][:, :, 0])),
    }


def unit(outputs: Tensor) -> Tensor:
    """From [-1, 1] to the reference's [0, 1], not clamped."""
    return (outputs + 1) / 2


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the encoder makes of the images, and the decoder of given ids or latents."""
    network = module.network
    if case.family == "dalle_dvae":
        logits = module.quantizer.to_logits(module.latents(case.inputs["image"] * 2 - 1))
        return {
            "logits": channels_first(logits),
            "stats": module.outputs(module.embed(case.inputs["codes"]).movedim(1, -1)),
        }
    if case.family == "rq_vae":
        decoded = module.outputs(module.quantizer.lookup(case.inputs["codes"]))
        return {"prequant": module.latents(case.inputs["x"]), "decoded_codes": decoded}
    unit_range = case.family.startswith("titok") or network.pixels == "unit"
    images = case.inputs["x"] * 2 - 1 if unit_range else case.inputs["x"]
    encoded = network.encode(images)
    if case.family in ("mar_kl_vae", "va_vae"):
        return {"mean": encoded.chunk(2, dim=1)[0], "decoded_z": decode(module, case.inputs["z"])}
    if case.family == "hart_tokenizer":
        return {"f": encoded, "fhat_embed": module.embed(case.inputs["idx"])}
    if case.family == "bitdance_ae":
        return {"h": encoded, "decoded_bits": network.decoder(case.inputs["bits"].contiguous())}
    if case.family == "titok_vae":
        return {"moments": encoded[:, :, None], "decoded_z": unit(network.decode(case.inputs["z"][:, :, 0]))}
    if case.family == "taming_gumbelvq":
        chosen = module.embed(case.expected["indices_argmax"])
        return {"prequant": encoded, "xrec_argmax": decode(module, chosen)}
    codes = module.embed(case.inputs["codes"].reshape(-1, *module.token_shape(images.shape[-1])))
    if case.family == "titok":
        return {"z": encoded[:, :, None], "decoded_codes": unit(network.decode(codes))}
    images = decode(module, codes)
    if case.family == "var_vqvae":
        return {"f": encoded, "decoded_codes": images.clamp(-1, 1)}
    suffix = "_ema" if case.expects("prequant_ema") else ""
    unclamped = case.family != "maskgit_vqgan"
    return {f"prequant{suffix}": encoded, f"decoded_codes{suffix}": images if unclamped else images.clamp(0, 1)}


def again(module: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    images = case.inputs["image" if case.family == "dalle_dvae" else "x"]
    return {"encoded": module.encode(images * 2 - 1)}


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
    "va_vae": va_vae,
    "bitdance_ae": bitdance_ae,
    "hart_tokenizer": hart_tokenizer,
    "rq_vae": rq_vae,
    "dalle_dvae": dalle_dvae,
    "titok": titok,
    "titok_vae": titok_vae,
}
