"""The transformer that SEDD and MDLM publish under one layout, "DDiT": what its tensors say, and its names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.arranging import Arrangement
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.transformers import Rules, in_blocks

LENGTH = 1024
"""Tokens of a sequence in every published model, which rotary positions do not tell."""
GPT2_VOCABULARY = 50257
BUFFERS = ("*rotary_emb.inv_freq",)
_CLASSES = "classes"
_HEAD_WIDTH = 64
_BLOCK: Rules = (
    ("attention_norm.{rest}", "norm1.{rest}"),
    ("attention.query_key_value.{rest}", "attn_qkv.{rest}"),
    ("attention.out.{rest}", "attn_out.{rest}"),
    ("mlp_norm.{rest}", "norm2.{rest}"),
    ("mlp.expand.{rest}", "mlp.0.{rest}"),
    ("mlp.contract.{rest}", "mlp.2.{rest}"),
    ("modulation.project.{rest}", "adaLN_modulation.{rest}"),
)


def rules(prefix: str) -> list[tuple[str, str]]:
    """From the names of a `Transformer` to published ones, which begin with `prefix`."""
    return [
        ("token_embedding.table.weight", f"{prefix}vocab_embed.embedding"),
        ("class_embedding.weight", _CLASSES),
        ("time_embedding.layers.{rest}", f"{prefix}sigma_map.mlp.{{rest}}"),
        *in_blocks(f"{prefix}blocks.{{block}}", _BLOCK),
        ("final_norm.{rest}", f"{prefix}output_layer.norm_final.{{rest}}"),
        ("final_modulation.project.{rest}", f"{prefix}output_layer.adaLN_modulation.{{rest}}"),
        ("head.project.{rest}", f"{prefix}output_layer.linear.{{rest}}"),
        ("head.bias", f"{prefix}output_layer.linear.bias"),
    ]


def switches(state: State, model: Reference, prefix: str) -> dict[str, Any]:
    """The switches of our `Transformer`.

    Args:
        state: published tensors.
        model: the part of the reference's configuration about the network.
        prefix: of the names.

    Raises:
        ValueError: a key that every such network has is missing, or a configuration that contradicts the tensors.
    """
    width = state[f"{prefix}vocab_embed.embedding"].shape[1]
    condition_width = len(state[f"{prefix}sigma_map.mlp.2.bias"])
    depth = state.count(f"{prefix}blocks.{{}}")
    agree(model, {"hidden_size": width, "cond_dim": condition_width, "n_blocks": depth})
    return {
        "width": width,
        "depth": depth,
        "heads": model.get("n_heads", max(1, width // _HEAD_WIDTH)),
        "mlp_hidden": len(state[f"{prefix}blocks.0.mlp.0.bias"]),
        "mlp": "gelu_tanh",
        "norm_epsilon": 1e-5,
        "norm_affine": True,
        "norm_bias": False,
        "positions": "rope_1d",
        "conditioning": "adaln",
        "condition_width": condition_width,
        "attention_bias": "none",
        "out_bias": False,
        "dropout": model.get("dropout", 0.1),
    }


def neighbouring_pairs(prefix: str, heads: int) -> Arrangement:
    """Rotary positions turn channels i and i + d / 2 of a head there, neighbouring ones here."""

    def make(weight: Tensor) -> list[Tensor]:
        rows = weight.unflatten(0, (3, heads, 2, -1))  # (3, heads, 2, d / 2, D)
        queries_keys = rows[:2].transpose(2, 3)
        return [torch.cat((queries_keys.flatten(0, 3), rows[2].flatten(0, 2)))]

    name = f"{prefix}blocks.{{block}}.attn_qkv.weight"
    return Arrangement([name], [name], make)


def without_classes(prefix: str) -> Arrangement:
    """One class and no class have an embedding of zeros: there are none, and the time alone modulates."""
    name = f"{prefix}sigma_map.mlp.2.bias"
    return Arrangement([name], [name, _CLASSES], lambda bias: [bias, bias.new_zeros(2, len(bias))])


def without_time(prefix: str) -> Arrangement:
    """The embedding of sigma = 0, which such a model was always told, as that of one class and of no class."""

    def make(inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> list[Tensor]:
        waves = inner.shape[1] // 2
        cosines_and_sines = torch.cat((inner.new_ones(waves), inner.new_zeros(waves)))
        hidden = torch.nn.functional.silu(inner @ cosines_and_sines + inner_bias)
        return [(outer @ hidden + outer_bias).expand(2, -1).clone()]

    names = [f"{prefix}sigma_map.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    return Arrangement(names, [_CLASSES], make)


def schedule(noise: Reference, default: str, known: Sequence[str]) -> dict[str, Any]:
    """The configuration of the schedule that the reference calls `noise`.

    Raises:
        ValueError: one that the published models do not have.
    """
    kind = noise.get("type", default)
    if kind not in known:
        raise ValueError(f"reference_config has noise.type={kind!r}; {' and '.join(known)} are read")
    settings: Mapping[str, Any] = {"epsilon": noise.get("eps", 1e-3)}
    if kind == "geometric":
        settings = {"sigma_min": noise.get("sigma_min", 1e-4), "sigma_max": noise.get("sigma_max", 20.0)}
    name = {"loglinear": "LogLinearSchedule", "geometric": "GeometricSchedule"}[kind]
    return {"class_path": f"discrete_lit.processes.{name}", "init_args": dict(settings)}
