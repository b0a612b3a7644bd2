"""The logits of our generators for the inputs of the golden files, by the names of their outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Inputs = Mapping[str, Tensor]
Outputs = Callable[[Any, Inputs], Tensors]

NO_PLACE: dict[str, dict[str, str]] = {
    "halton_maskgit": {"sequence_root": "a schedule that no published model has"},
    "rar": {"condition_ids": "classes have a table of their own, and ids of their own"},
    "maskbit_lfqbert": {"bits": "made and projected in one"},
}
# What of an output is compared: the reference's last row after all tokens predicts nothing, and no sampled image keeps
# the mask id that Halton-MaskGIT's last logit is of.
COMPARED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llamagen_gpt_c2i": {name: (slice(None), slice(-1)) for name in ("logits", "logits_null")},
    "rar": {name: (slice(None), slice(-1)) for name in ("logits_raster", "logits_orders", "logits_orders_null")},
    "halton_maskgit": {name: (..., slice(-1)) for name in ("logits", "logits_null")},
}


def null(generator: Any, labels: Tensor) -> Tensor:
    return torch.full_like(labels, generator.num_classes)


def with_and_without_class(generator: Any, tokens: Tensor, labels: Tensor, order: Tensor | None = None) -> list[Tensor]:
    return [generator.backbone(tokens, label, order=order) for label in (labels, null(generator, labels))]


def taming_net2net(generator: Any, inputs: Inputs) -> Tensors:
    tokenizer, backbone, labels = generator.tokenizer, generator.backbone, inputs["c"]
    tokens = tokenizer.encode(inputs["x"]).flatten(1)
    prefix = int(inputs["seq_len"])
    return {
        "z_indices": tokens,
        "target": tokens,
        "logits": backbone(tokens[:, :-1], labels),
        "raw_logits_prefix": backbone(tokens[:, : prefix - 1], labels),
    }


def llamagen_gpt_c2i(generator: Any, inputs: Inputs) -> Tensors:
    labels = inputs["y"]
    logits, logits_null = with_and_without_class(generator, inputs["z"][:, :-1], labels)
    return {
        "logits": logits,
        "logits_null": logits_null,
    }


def rar(generator: Any, inputs: Inputs) -> Tensors:
    tokens, labels, orders = inputs["z"], inputs["y"], inputs["orders"]
    ordered = tokens.gather(1, orders)
    logits, logits_null = with_and_without_class(generator, ordered[:, :-1], labels, orders)
    return {
        "logits_raster": generator.backbone(tokens[:, :-1], labels),
        "labels_raster": generator.to_sequence(generator.to_grid(tokens)),
        "logits_orders": logits,
        "logits_orders_null": logits_null,
        "labels_orders": ordered,
    }


def masked(tokens: str, generator: Any, inputs: Inputs) -> Tensors:
    logits = with_and_without_class(generator, inputs[tokens].flatten(1), inputs["y"])
    return dict(zip(("logits", "logits_null"), logits, strict=True))


def halton_maskgit(generator: Any, inputs: Inputs) -> Tensors:
    return masked("x", generator, inputs)


def titok(generator: Any, inputs: Inputs) -> Tensors:
    return masked("ids", generator, inputs)


def maskbit(generator: Any, inputs: Inputs) -> Tensors:
    groups = inputs["split"].shape[-1]
    combined = generator.to_grid(inputs["split"].flatten(1))
    by_group = {name: logits.unflatten(1, (-1, groups)) for name, logits in masked("tokens", generator, inputs).items()}
    again = generator.to_sequence(combined).unflatten(1, (-1, groups))
    return by_group | {"combined": combined.flatten(1), "split_again": again}


def var_transformer(generator: Any, inputs: Inputs) -> Tensors:
    vectors = generator.tokenizer.quantizer.teacher_forcing(inputs["codes"])
    logits, logits_null = with_and_without_class(generator, vectors, inputs["y"])
    return {"var_input": vectors, "logits": logits, "logits_null": logits_null}


OUTPUTS: dict[str, Outputs] = {
    "taming_net2net": taming_net2net,
    "llamagen_gpt_c2i": llamagen_gpt_c2i,
    "rar": rar,
    "halton_maskgit": halton_maskgit,
    "maskbit_bert": maskbit,
    "maskbit_lfqbert": maskbit,
    "titok_imagebert": titok,
    "titok_uvitbert": titok,
    "var_transformer": var_transformer,
}
