"""What our generators of ids in turn give for the golden cases that also train: SEED-Voken's and BAR's.

Losses and gradients are of eval mode, as the cases have them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from discrete_lit.samplers import OpenMAGVIT2Sampler, RasterSampler
from discrete_lit.samplers.raster import SubTokenSettings
from discrete_lit.tokenizers.quantizers import LookupFreeQuantizer
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_generators import greedy, guided, null, with_and_without_class
from helpers.golden_latents import gradients

TOLERANCE = 2e-5
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}

# Our parameter whose gradient is a published one's, and what makes theirs of it.
Of = tuple[str, Callable[[Tensor], Tensor]]


def as_it_is(grad: Tensor) -> Tensor:
    return grad


def chunks_of(*order: int) -> Callable[[Tensor], Tensor]:
    """Chunk i of the published tensor is chunk `order[i]` of ours."""
    return lambda grad: torch.cat([grad.chunk(len(order))[number] for number in order])


def grads(generator: Any, loss: Tensor, named: Mapping[str, str | Of]) -> Tensors:
    """The gradients of a loss by published names."""
    made: Tensors = {}
    with gradients(generator.backbone):
        loss.backward()
        parameters = dict(generator.backbone.named_parameters())
        for theirs, ours in named.items():
            name, make = (ours, as_it_is) if isinstance(ours, str) else ours
            made[f"grad.{theirs}"] = make(parameters[name].grad).clone()
    return made


def open_magvit2_ids(generator: Any, pre: Tensor, post: Tensor) -> Tensor:
    return generator.backbone.place_head.sub_tokens.join(torch.stack((pre, post), dim=-1))


def sub_token_logits(generator: Any, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Logits of every sub-token of every position, the sub-tokens before it given."""
    head, sub_tokens = generator.backbone.place_head, generator.backbone.place_head.sub_tokens.split(ids)
    hidden = generator.backbone(ids[:, :-1], labels)
    return [head.sub_token_logits(hidden, sub_tokens[..., :number]) for number in range(len(head.sub_tokens))]


PARTS = ("pre", "post")


def open_magvit2_passes(generator: Any, case: Case) -> Tensors:
    labels, ids = case.inputs["y"][:, 0], open_magvit2_ids(generator, case.inputs["pre"], case.inputs["post"])
    made: Tensors = {}
    for suffix, label in (("", labels), ("_null", null(generator, labels))):
        for part, logits in zip(PARTS, sub_token_logits(generator, ids, label), strict=True):
            made[f"logits_{part}{suffix}"] = logits
    return made


def open_magvit2_ar(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    labels, ids = inputs["y"][:, 0], open_magvit2_ids(generator, inputs["pre"], inputs["post"])
    made = open_magvit2_passes(generator, case)
    for part in PARTS:
        logits = made[f"logits_{part}"].flatten(0, 1)
        made[f"loss_{part}"] = torch.nn.functional.cross_entropy(logits, inputs[part].flatten())[None]
    with torch.enable_grad():
        loss, _ = generator.loss(generator.to_grid(ids), labels)
        made["loss"] = loss.detach()[None]
        query_key_value = "attention.query_key_value.weight"
        made |= grads(
            generator,
            loss,
            {
                "pre_emb.weight": "token_embedding.tables.0.weight",
                "post_emb.weight": "token_embedding.tables.1.weight",
                "factorized_blocks.0.attention.wqkv.weight": f"place_head.blocks.0.{query_key_value}",
                "spatial_blocks.0.attention.wqkv.weight": f"blocks.0.{query_key_value}",
            },
        )
    for name in ("greedy_cfg", "greedy_nocfg"):
        # The reference does not guide at 0.
        scales = [float(case.read(f"{name}_pre", r"cfg_scale=\[(\S+), (\S+)\]")[number]) or 1.0 for number in (1, 2)]
        sampler = OpenMAGVIT2Sampler([SubTokenSettings(guidance_scale=scale, top_k=1) for scale in scales])
        drawn = generator.sample(labels, sampler).flatten(1)
        parts = generator.backbone.place_head.sub_tokens.split(drawn).unbind(dim=-1)
        made |= {f"{name}_{part}": value for part, value in zip(PARTS, parts, strict=True)}
        if name == "greedy_cfg":
            with_class, without = (
                sub_token_logits(generator, drawn, label) for label in (labels, null(generator, labels))
            )
            for number, part in enumerate(PARTS):
                difference = with_class[number] - without[number]
                made[f"cfg_logits_{part}_on_greedy"] = without[number] + scales[number] * difference
    return made | lookup_free(generator, case)


def lookup_free(generator: Any, case: Case) -> Tensors:
    """The ids of the tokenizer, of which the sub-tokens are parts."""
    z, sub_tokens = case.inputs["z"], generator.backbone.place_head.sub_tokens
    quantizer = LookupFreeQuantizer(z.shape[1], bit_order="first_least_significant").eval()
    found = quantizer(z.movedim(1, -1))
    pre, post = sub_tokens.split(found.tokens.flatten(1)).unbind(dim=-1)
    given = open_magvit2_ids(generator, case.inputs["pre"], case.inputs["post"]).view(found.tokens.shape)
    return {
        "lfq_pre": pre,
        "lfq_post": post,
        "lfq_quant": found.z_q.movedim(-1, 1),
        "quant_from_tokens": quantizer.lookup(given).movedim(-1, 1),
    }


def ibq_passes(generator: Any, case: Case) -> Tensors:
    logits = with_and_without_class(generator, case.inputs["z"][:, :-1], case.inputs["y"][:, 0])
    return dict(zip(("logits", "logits_null"), logits, strict=True))


def ibq_ar(load: Load, case: Case) -> Tensors:
    generator, labels, tokens = load(), case.inputs["y"][:, 0], case.inputs["z"]
    made = ibq_passes(generator, case)
    with torch.enable_grad():
        loss, _ = generator.loss(generator.to_grid(tokens), labels)
        made["loss"] = loss.detach()[None]
        made |= grads(
            generator,
            loss,
            {
                "tok_emb.weight": "token_embedding.table.weight",
                "class_emb.embedding_table.weight": "class_embedding.weight",
                "blocks.0.attention.wqkv.weight": "blocks.0.attention.query_key_value.weight",
                # Theirs: gates, scales and shifts, each of the attention and of the MLP.
                "blocks.0.ada_lin.1.weight": ("blocks.0.modulation.project.weight", chunks_of(2, 5, 1, 4, 0, 3)),
            },
        )
    cache = generator.backbone.new_cache(labels)
    steps = [generator.backbone(tokens[:, max(step - 1, 0) : step], labels, cache) for step in range(tokens.shape[1])]
    made["sample_logits"] = torch.cat(steps, dim=1)
    for name in case.matching(r"greedy_\w+"):
        scale = case.number(name, "cfg_scale")
        made[name] = greedy(generator, labels, guidance_scale=scale)
        on_greedy = name.replace("greedy_", "") + "_logits_on_greedy"
        made[on_greedy] = guided(generator, made[name][:, :-1], labels, [scale] * generator.length)
    return made


PASSES: dict[str, Callable[[Any, Case], Tensors]] = {"open_magvit2_ar": open_magvit2_passes, "ibq_ar": ibq_passes}
OUTPUTS = {"open_magvit2_ar": open_magvit2_ar, "ibq_ar": ibq_ar}


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of given ids."""
    return PASSES[case.family](generator, case)


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    labels = case.inputs["y"].flatten()
    return {**network_outputs(generator, case), "drawn": generator.sample(labels, RasterSampler())}
