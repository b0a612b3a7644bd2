"""What our generators of images from the features of a text give for the golden cases."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition
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


OUTPUTS = {"llamagen_t2i": llamagen_t2i}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the network alone gives."""
    return _passes(module, case)


again = network_outputs
