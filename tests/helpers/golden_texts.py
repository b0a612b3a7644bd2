"""What our generators of images from the features of a text give for the golden cases."""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_autoregressive import grads

TOLERANCE = 1e-4
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}


def _condition(case: Case) -> Condition:
    caption, mask = case.inputs["caption"], case.inputs["emb_masks"].bool()
    return Condition(labels=torch.zeros(len(caption), dtype=torch.int64), context=caption, context_mask=mask)


def _null(given: Condition) -> Condition:
    return given.null(null_label=1, null_id=None)


def _guided(generator: Any, tokens: Tensor, given: Condition, scale: float) -> Tensor:
    full, nothing = (generator.backbone(tokens[:, :-1], each) for each in (given, _null(given)))
    return nothing + scale * (full - nothing)


def _passes(generator: Any, case: Case) -> Tensors:
    given, codes = _condition(case), case.inputs["z"]
    prefix = generator.backbone.context_prefix
    unmasked = Condition(labels=given.labels, context=given.context)
    return {
        "train_logits": generator.backbone(codes[:, :-1], given),
        "logits_uncond": generator.backbone(codes[:, :-1], _null(given)),
        "logits_nomask": generator.backbone(codes[:, :-1], unmasked),
        "cap_emb": prefix(given),
        "uncond_emb": prefix(_null(given))[0],
    }


def llamagen_t2i(load: Load, case: Case) -> Tensors:
    generator, given = load(), _condition(case)
    made = _passes(generator, case)
    for name in ("greedy_cfg", "greedy_nocfg"):
        scale = case.number(name, "cfg_scale")
        drawn = generator.sample(given, RasterSampler(top_k=1, guidance_scale=scale)).flatten(1)
        made |= {name: drawn, f"{name}_logits": _guided(generator, drawn, given, scale)}
    # Only valid samples count.
    valid = case.inputs["valid"].bool()
    kept = Condition(
        labels=given.labels[valid], context=case.inputs["caption"][valid], context_mask=given.valid()[valid]
    )
    with torch.enable_grad():
        loss, _ = generator.loss(generator.to_grid(case.inputs["z"][valid]), kept)
        made["train_loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                "cls_embedding.cap_proj.fc1.weight": "context_prefix.expand.weight",
                "cls_embedding.cap_proj.fc2.weight": "context_prefix.contract.weight",
                "tok_embeddings.weight": "token_embedding.table.weight",
            },
        )
    return made


# Infinity.


def _texts(case: Case) -> Condition:
    """The captions, which the case has one behind the other."""
    lengths = case.inputs["lens"].tolist()
    rows = pad_sequence(list(case.inputs["text"].split(lengths)), batch_first=True)
    mask = torch.arange(rows.shape[1]) < case.inputs["lens"][:, None]
    return Condition(labels=torch.zeros(len(lengths), dtype=torch.int64), context=rows, context_mask=mask)


def _flips(bits: Any, case: Case) -> Tensor:
    """The bits that self-correction flips: the case has uniform numbers scale by scale, and a share of each."""
    count, uniforms = len(case.inputs["lens"]), case.inputs["flip_uniform"]
    parts = uniforms.split([count * length * bits.dim for length in bits.lengths])
    shares = case.inputs["flip_strength"] * 0.01
    flipped = [part.view(count, -1, bits.dim) < share for part, share in zip(parts, shares, strict=True)]
    return torch.cat(flipped, dim=1)


def _infinity_passes(generator: Any, case: Case) -> Tensors:
    given, read = _texts(case), case.expected["bsc_input"]
    return {
        "logits": generator.backbone(read, given).unflatten(1, (-1, generator.bits.dim)).flatten(2),
        "logits_uncond": generator.backbone(read, _null(given)).unflatten(1, (-1, generator.bits.dim)).flatten(2),
    }


def infinity(load: Load, case: Case) -> Tensors:
    generator, given = load(), _texts(case)
    bits, backbone = generator.bits, generator.backbone
    latents = case.inputs["f"][:, :, 0].movedim(1, -1)
    quantized = bits(latents)
    sums = bits.cumulative(quantized.tokens)[:-1]
    averaged = [bits.averaged(number, f_hat).flatten(2).transpose(1, 2) for number, f_hat in enumerate(sums, start=1)]
    flips = _flips(bits, case)
    targets, read = bits.self_corrected(latents, flips)
    clean_targets, clean = bits.self_corrected(latents, torch.zeros_like(flips))
    assert torch.equal(clean_targets, quantized.tokens) and torch.equal(bits.teacher_forcing(clean_targets), clean)
    made = {
        "bsq_quant": quantized.z_q.movedim(-1, 1),
        "bsq_bits": bits.bits_of(quantized.tokens),
        "bsq_var_input": torch.cat(averaged, dim=1),
        "bsc_input": read,
        "bsc_target_bits": bits.bits_of(targets),
        "clean_input": clean,
        **_infinity_passes(generator, case),
    }
    with torch.enable_grad():
        losses = generator._losses(generator.to_sequence(targets), read, given)
        loss = losses.values.mean()
        made["loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                "text_proj_for_sos.ca.mat_q": "context_pool.query",
                "lvl_embed.weight": "positions.level_embedding.weight",
                "word_embed.weight": "token_embedding.project.weight",
                "block_chunks.0.module.0.ada_gss": "blocks.0.modulation_offset",
                "block_chunks.0.module.0.sa.mat_qkv.weight": "blocks.0.attention.query_key_value.weight",
            },
        )
    levels = made["grad.lvl_embed.weight"]
    made |= {
        "grad.text_proj_for_sos.ca.mat_q": made["grad.text_proj_for_sos.ca.mat_q"][:, None],
        # The file has vectors for more scales than there are.
        "grad.lvl_embed.weight": F.pad(levels, (0, 0, 0, len(case.expected["grad.lvl_embed.weight"]) - len(levels))),
        # Published: gates, scales, shifts. Ours: shift, scale and gate of the attention, then of the MLP.
        "grad.block_chunks.0.module.0.ada_gss": made["grad.block_chunks.0.module.0.ada_gss"][
            None, None, [2, 5, 1, 4, 0, 3]
        ],
    }
    sampling = case.constructor["sampling"]
    sampler = copy(generator.sampler)
    assert sampler.guidance_scale == sampling["cfg"] and sampler.temperature == sampling["tau"]
    sampler.top_k = 1
    # The case was trained without a dropped text.
    random = CounterRandom(0, torch.arange(len(given)))
    drawn = generator.to_grid(sampler(backbone, given, random, quantizer=generator.scale_quantizer()).tokens)
    f_hat = bits.lookup(drawn)
    sequences = generator.to_sequence(drawn)
    read = generator._read(sequences)
    full, nothing = (backbone(read, each) for each in (given, _null(given)))
    guided = (nothing + sampling["cfg"] * (full - nothing)) / sampling["tau"]
    return made | {
        "greedy_logits": guided.unflatten(1, (-1, bits.dim)),
        "greedy_bits": bits.bits_of(drawn),
        "greedy_codes_sum": f_hat.movedim(-1, 1),
    }


OUTPUTS = {"infinity": infinity, "llamagen_t2i": llamagen_t2i}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the network alone gives."""
    return _infinity_passes(module, case) if case.family == "infinity" else _passes(module, case)


again = network_outputs
