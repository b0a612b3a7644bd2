"""SEDD (louaaron/Score-Entropy-Discrete-Diffusion) and MDLM (kuleshov-group/mdlm): text diffusion models.

Both publish the same transformer, "DDiT", under one layout of names. First stands what they share, its switches, its
names and its tensors that are rearranged; then the families `sedd_absorb` and `sedd_uniform`; then `mdlm`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import Rules, generator_conversion, in_blocks, sampled_by
from discrete_lit.pretrained.reading import Averages, Reference, State, agree

# Tokens of a sequence in every published model; rotary positions do not tell it.
LENGTH = 1024

GPT2_VOCABULARY = 50257

# Names of tensors that are no parameters.
BUFFERS = ("*rotary_emb.inv_freq",)

# The name given to the embedding of classes, which the published files do not have.
_CLASSES = "classes"

# Channels of an attention head.
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
    """Return rules from the names of our `Transformer` to published ones, which begin with `prefix`."""
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
    """Return the switches of our `Transformer`.

    Args:
        state: the published tensors.
        model: the part of the reference's configuration that describes the network.
        prefix: beginning of every published name.

    Raises:
        ValueError: a key that every such network has is missing, or the configuration contradicts the tensors.
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
    """Reorder queries and keys: rotary positions turn channels i and i + d / 2 of a head there, neighbours here."""

    def make(weight: Tensor) -> list[Tensor]:
        queries_keys, values = weight.tensor_split([2 * len(weight) // 3])
        return [torch.cat((rearrange(queries_keys, "(qk h two c) d -> (qk h c two) d", qk=2, h=heads, two=2), values))]

    name = f"{prefix}blocks.{{block}}.attn_qkv.weight"
    return Arrangement([name], [name], make)


def without_classes(prefix: str) -> Arrangement:
    """Give one class and no class embeddings of zeros: the model has no classes, and the time alone modulates."""
    name = f"{prefix}sigma_map.mlp.2.bias"
    return Arrangement([name], [name, _CLASSES], lambda bias: [bias, bias.new_zeros(2, len(bias))])


def without_time(prefix: str) -> Arrangement:
    """Give one class and no class the embedding of sigma = 0, which such a model was told at all times."""

    def make(inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> list[Tensor]:
        waves = inner.shape[1] // 2
        cosines_and_sines = torch.cat((inner.new_ones(waves), inner.new_zeros(waves)))
        hidden = torch.nn.functional.silu(inner @ cosines_and_sines + inner_bias)
        return [(outer @ hidden + outer_bias).expand(2, -1).clone()]

    names = [f"{prefix}sigma_map.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]
    return Arrangement(names, [_CLASSES], make)


def schedule(noise: Reference, default: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of the schedule that the reference calls `noise`.

    Raises:
        ValueError: the published models do not have this schedule.
    """
    kind = noise.get("type", default)
    if kind not in known:
        raise ValueError(f"reference_config has noise.type={kind!r}; {' and '.join(known)} are read")
    settings: Mapping[str, Any] = {"epsilon": noise.get("eps", 1e-3)}
    if kind == "geometric":
        settings = {"sigma_min": noise.get("sigma_min", 1e-4), "sigma_max": noise.get("sigma_max", 20.0)}
    name = {"loglinear": "LogLinearSchedule", "geometric": "GeometricSchedule"}[kind]
    return {"class_path": f"discrete_lit.diffusion.{name}", "init_args": dict(settings)}


_MARKS = ("vocab_embed.embedding", "sigma_map.mlp.0.weight", "output_layer.norm_final.weight")
# `checkpoint.pth` of a run has the weights under `model`.
_WRAPPERS = ("model",)
_AVERAGES = Averages("ema.shadow_params", BUFFERS)


@register("sedd_absorb", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_absorb(state: State, reference: Reference) -> Conversion:
    """Convert `louaaron/sedd-{small,medium}`, or the averages in `checkpoint.pth` of a run with the graph `absorb`.

    The ids are those of GPT-2's vocabulary, and the mask.
    """
    return _sedd(state, reference, "absorb")


@register("sedd_uniform", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_uniform(state: State, reference: Reference) -> Conversion:
    """Convert the averages in `checkpoint.pth` of a run with the graph `uniform`."""
    return _sedd(state, reference, "uniform")


def _sedd(state: State, reference: Reference, graph: str) -> Conversion:
    absorbing = graph == "absorb"
    model = reference.get("model", {})
    agree(reference.get("graph", {}), {"type": graph}, f"family='sedd_{graph}' has")
    rows = len(state["vocab_embed.embedding"])
    vocab_size = reference.get("tokens", GPT2_VOCABULARY if rows == GPT2_VOCABULARY else rows - absorbing)
    if rows != vocab_size + absorbing:
        other = "uniform" if absorbing else "absorb"
        raise ValueError(
            f"{state.source!r} has {rows} embeddings for {vocab_size} tokens{' and a mask' * absorbing}: "
            f"is its family 'sedd_{other}'?"
        )
    scaled = model.get("scale_by_sigma", absorbing)
    if scaled and not absorbing:
        raise ValueError("reference_config has model.scale_by_sigma=true, which the reference refuses with 'uniform'")
    backbone = switches(state, model, "")
    noise = schedule(reference.get("noise", {}), "loglinear" if absorbing else "geometric", ("loglinear", "geometric"))
    head: dict[str, Any] = {"scale_by_noise": scaled, "mask_output": absorbing}
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(vocab_size, (model.get("length", LENGTH),)),
        num_classes=1,
        backbone=backbone,
        rules=rules(""),
        arrangements=[neighbouring_pairs("", backbone["heads"]), without_classes("")],
        dropped=BUFFERS,
        process={"class_path": f"discrete_lit.diffusion.{'Absorbing' if absorbing else 'Uniform'}Process"},
        schedule=noise,
        head={"class_path": "discrete_lit.diffusion.ScoreHead", "init_args": head},
        loss={"class_path": "discrete_lit.diffusion.losses.ScoreEntropy"},
        time_input="total_noise",
        label_dropout=0.0,
        # The reference's script: as many steps as the models have tokens.
        sampler=sampled_by("AncestralSampler", steps=1024, guidance_law="score"),
    )


_PREFIX = "backbone."
_OUTPUT = f"{_PREFIX}output_layer.linear"


@register(
    "mdlm",
    marks=(f"{_PREFIX}vocab_embed.embedding", f"{_PREFIX}sigma_map.mlp.0.weight", f"{_OUTPUT}.weight"),
    wrappers=("state_dict",),
    section=None,
    averages=Averages("ema.shadow_params", BUFFERS),
)
def mdlm(state: State, reference: Reference) -> Conversion:
    """Convert the averages in `mdlm.ckpt`, or `kuleshov-group/mdlm-owt`; the ids are those of GPT-2's vocabulary.

    The published models were told sigma = 0 at all times (`time_conditioning: false`). Ours are not told the time: the
    embedding of sigma = 0 becomes that of their class. The reference's logit of the mask id, which it gives no
    probability, is left out.
    """
    config: dict[str, Any] = {**reference.get("config", {}), **reference}
    model = config.get("model", {})
    vocab_size = len(state[f"{_PREFIX}vocab_embed.embedding"]) - 1
    # A tokenizer's own mask token would have its id among the others.
    agree(config, {"mask_index": vocab_size})
    every = "every model that is read has"
    agree(config, {"parameterization": "subs", "backbone": "dit"}, every)
    agree(model, {"tie_word_embeddings": False}, every)
    timed = config.get("time_conditioning", False)
    backbone = switches(state, model, _PREFIX)

    def without_mask(weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [weight[:vocab_size], bias[:vocab_size]]

    names = [f"{_OUTPUT}.weight", f"{_OUTPUT}.bias"]
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(vocab_size, (model.get("length", LENGTH),)),
        num_classes=1,
        backbone=backbone,
        rules=rules(_PREFIX),
        arrangements=[
            neighbouring_pairs(_PREFIX, backbone["heads"]),
            (without_classes if timed else without_time)(_PREFIX),
            Arrangement(names, names, without_mask),
        ],
        dropped=BUFFERS,
        process={"class_path": "discrete_lit.diffusion.AbsorbingProcess"},
        schedule=schedule(config.get("noise", {}), "loglinear", ("loglinear", "geometric")),
        head={"class_path": "discrete_lit.diffusion.LeaveOneOutHead"},
        loss={"class_path": "discrete_lit.diffusion.losses.MaskedCrossEntropy"},
        time_input="total_noise" if timed else "none",
        label_dropout=0.0,
        # The reference's default, and its argmax at the end.
        sampler=sampled_by("AncestralSampler", steps=128, clean_up="argmax"),
    )
