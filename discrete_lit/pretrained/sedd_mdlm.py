"""SEDD (louaaron/Score-Entropy-Discrete-Diffusion) and MDLM (kuleshov-group/mdlm): text diffusion models.

Both publish the same transformer, "DDiT", under one layout of names. First stands what they share, its switches, its
names and its tensors that are rearranged; then the families `sedd_absorb` and `sedd_uniform`; then `mdlm`.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import Rules, generator_conversion, head_count, in_blocks, sampled_by
from discrete_lit.pretrained.reading import Averages, State
from discrete_lit.pretrained.settings import Settings

# Tokens of a sequence in every published model; rotary positions do not tell it.
LENGTH = 1024

GPT2_VOCABULARY = 50257

# Names of tensors that are no parameters.
BUFFERS = ("*rotary_emb.inv_freq",)

# The name given to the embedding of classes, which the published files do not have.
_CLASSES = "classes"

# Channels of an attention head.
HEAD_WIDTH = 64
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


def switches(state: State, model: Settings, prefix: str) -> dict[str, Any]:
    """Return the switches of our `Transformer`.

    Args:
        state: the published tensors.
        model: the part of the reference's configuration that describes the network.
        prefix: beginning of every published name.

    Raises:
        ValueError: a key that every such network has is missing, or the configuration contradicts the tensors.
    """
    width, depth, condition_width = sizes(state, prefix)
    model.agree({"hidden_size": width, "cond_dim": condition_width, "n_blocks": depth})
    model.agree({"type": "ddit"}, "every model that is read has")
    model.without_effect("the tensors tell all of it", "name")
    heads = head_count(model, "n_heads", max(1, width // HEAD_WIDTH), width)
    return {**ddit(state, prefix, heads), "dropout": model.take("dropout", 0.1)}


def sizes(state: State, prefix: str) -> tuple[int, int, int]:
    """Return width, depth and condition width of a DDiT whose published names begin with `prefix`."""
    width, condition = state[f"{prefix}vocab_embed.embedding"].shape[1], state[f"{prefix}sigma_map.mlp.2.bias"]
    return width, state.count(f"{prefix}blocks.{{}}"), len(condition)


def ddit(state: State, prefix: str, heads: int) -> dict[str, Any]:
    """Return the switches that every DDiT has, and its sizes."""
    width, depth, condition_width = sizes(state, prefix)
    return {
        "width": width,
        "depth": depth,
        "heads": heads,
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
    }


def usual_rotation(prefix: str) -> Arrangement:
    """Drop the frequencies of the rotary positions, after a check that they are those of base 10000."""

    def check(frequencies: Tensor) -> list[Tensor]:
        usual = 10000.0 ** -(torch.arange(len(frequencies)) / len(frequencies))
        if not torch.allclose(frequencies.float(), usual, rtol=1e-2):
            raise ValueError("rotary_emb.inv_freq is not that of base 10000, which ours has")
        return []

    return Arrangement([f"{prefix}rotary_emb.inv_freq"], [], check)


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


# Our schedules by the reference's names.
SCHEDULES = {
    "loglinear": "LogLinearSchedule",
    "geometric": "GeometricSchedule",
    "cosine": "MDLMCosineSchedule",
    "cosinesqr": "CosineSquaredSchedule",
}


def schedule(noise: Settings, default: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration of the schedule that the reference calls `noise`.

    Raises:
        ValueError: the family does not have this schedule.
    """
    kind = noise.take("type", default, known)
    limits = ("sigma_min", "sigma_max")
    if kind == "geometric":
        arguments = {"sigma_min": noise.take("sigma_min", 1e-4), "sigma_max": noise.take("sigma_max", 20.0)}
        noise.without_effect("this schedule has none", "eps")
    else:
        arguments = {"epsilon": noise.take("eps", 1e-3)}
        noise.without_effect("they are those of the geometric schedule", *limits)
    return {"class_path": f"discrete_lit.diffusion.{SCHEDULES[kind]}", "init_args": arguments}


def sampler(sampling: Settings, predictors: dict[str, str], default: str, steps: int, clean_up: str) -> dict[str, Any]:
    """Return the configuration of the sampler that the reference's `sampling` describes.

    Raises:
        ValueError: another predictor, or one that leaves masks.
    """
    kind = predictors[sampling.take("predictor", default, predictors)]
    if len(set(predictors.values())) == 1:
        sampling.without_effect("all of them draw the same law", "predictor")
    sampling.agree({"noise_removal": True}, "a sampler that leaves no masks has")
    sampling.without_effect(
        "it is about how many texts are sampled, and how long", "num_sample_batches", "num_sample_log", "semi_ar"
    )
    sampling.without_effect("it is about texts longer than the model's", "stride_length", "num_strides")
    settings = {} if clean_up == "sample" else {"clean_up": clean_up}
    steps = sampling.take("steps", steps)
    published = sampling.take("sampler", "mdlm", REMASKING) if clean_up == "argmax" else "mdlm"
    corrected = clean_up == "argmax" and sampling.take("dfm", False)
    nucleus = sampling.take("nucleus_p", 1.0) if clean_up == "argmax" else 1.0
    if published == "mdlm" and not corrected and nucleus == 1:
        sampling.without_effect("this sampler has none", *_OF_REMASKING)
        return sampled_by(kind, steps=steps, **settings)
    return sampled_by(
        "RemaskingSampler", steps=steps, **settings, **_remasking(sampling, published, corrected, nucleus)
    )


REMASKING = {
    "mdlm": "rescale",  # with an eta of 0
    "forward-backward": "forward_backward",
    "remdm-cap": "cap",
    "remdm-rescale": "rescale",
    "remdm-conf": "conf",
    "remdm-loop": "loop",
}
"""Our strategies by the names that ReMDM (kuleshov-group/remdm) gives its samplers, which run on models of MDLM."""
_OF_REMASKING = ("eta", "t_on", "t_off", "alpha_on", "generated_seqs_path")


def _remasking(sampling: Settings, published: str, corrected: bool, nucleus: float) -> dict[str, Any]:
    """Return the settings of ReMDM's samplers."""
    strategy = "flow_matching" if corrected else REMASKING[published]
    settings: dict[str, Any] = {"strategy": strategy, **({"nucleus": nucleus} if nucleus < 1 else {})}
    if published == "mdlm" and not corrected:
        settings["eta"] = 0.0
    elif strategy in ("cap", "rescale", "loop"):
        settings["eta"] = sampling.take("eta", 0.0)
    if strategy == "loop":
        settings["loop"] = [1 - sampling.take("t_on", 0.0), 1 - sampling.take("t_off", 0.0)]
        settings["loop_alpha"] = sampling.take("alpha_on", 0.0)
    sampling.without_effect("this sampler has none", *_OF_REMASKING)
    return settings


_MARKS = (
    *("vocab_embed.embedding", "sigma_map.mlp.0.weight", "output_layer.norm_final.weight"),
    "!rotary_emb.cos_cached",  # GIDD has it
)
# `checkpoint.pth` of a run has the weights under `model`.
_WRAPPERS = ("model",)
_AVERAGES = Averages("ema.shadow_params", BUFFERS)


@register("sedd_absorb", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_absorb(state: State, settings: Settings) -> Conversion:
    """Convert `louaaron/sedd-{small,medium}`, or the averages in `checkpoint.pth` of a run with the graph `absorb`.

    The ids are those of GPT-2's vocabulary, and the mask.
    """
    return _sedd(state, settings, "absorb")


@register("sedd_uniform", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_uniform(state: State, settings: Settings) -> Conversion:
    """Convert the averages in `checkpoint.pth` of a run with the graph `uniform`."""
    return _sedd(state, settings, "uniform")


def _sedd(state: State, settings: Settings, graph: str) -> Conversion:
    absorbing = graph == "absorb"
    model, noise_graph = settings.section("model", ()), settings.section("graph")
    noise_graph.agree({"type": graph}, f"family='sedd_{graph}' has")
    noise_graph.without_effect("it is about the run that trained the model", "file", "report_all")
    rows = len(state["vocab_embed.embedding"])
    vocab_size = settings.take("tokens", GPT2_VOCABULARY if rows == GPT2_VOCABULARY else rows - absorbing)
    if rows != vocab_size + absorbing:
        other = "uniform" if absorbing else "absorb"
        raise ValueError(
            f"{state.source!r} has {rows} embeddings for {vocab_size} tokens{' and a mask' * absorbing}: "
            f"is its family 'sedd_{other}'?"
        )
    scaled = model.take("scale_by_sigma", absorbing)
    if scaled and not absorbing:
        raise ValueError("reference_config has model.scale_by_sigma=true, which the reference refuses with 'uniform'")
    backbone = switches(state, model, "")
    noise = schedule(settings.section("noise"), "loglinear" if absorbing else "geometric", ("loglinear", "geometric"))
    predictors = {"analytic": "AncestralSampler", "euler": "EulerSampler"}
    # The reference's script: as many steps as the models have tokens.
    sampling = sampler(settings.section("sampling"), predictors, "analytic", 1024, "sample")
    sampling["init_args"]["guidance_law"] = "score"
    head: dict[str, Any] = {"scale_by_noise": scaled, "mask_output": absorbing}
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(vocab_size, (model.take("length", LENGTH),)),
        num_classes=1,
        backbone=backbone,
        rules=rules(""),
        arrangements=[usual_rotation(""), neighbouring_pairs("", backbone["heads"]), without_classes("")],
        process={"class_path": f"discrete_lit.diffusion.{'Absorbing' if absorbing else 'Uniform'}Process"},
        schedule=noise,
        head={"class_path": "discrete_lit.diffusion.ScoreHead", "init_args": head},
        loss={"class_path": "discrete_lit.diffusion.losses.ScoreEntropy"},
        time_input="total_noise",
        label_dropout=0.0,
        sampler=sampling,
    )


# `bert-base-uncased`, the text tokenizer of MDLM's LM1B models, has a mask among its ids.
_ROWS_OF_BERT, _MASK_OF_BERT = 30522, 103
# The logit that the reference gives an id that is never predicted.
_NEVER = -1e6
_PREFIX = "backbone."
_OUTPUT = f"{_PREFIX}output_layer.linear"


@register(
    "mdlm",
    marks=(f"{_PREFIX}vocab_embed.embedding", f"{_PREFIX}sigma_map.mlp.0.weight", f"{_OUTPUT}.weight"),
    wrappers=("state_dict",),
    section=None,
    averages=Averages("ema.shadow_params", BUFFERS),
)
def mdlm(state: State, settings: Settings) -> Conversion:
    """Convert the averages in `mdlm.ckpt`, or `kuleshov-group/mdlm-owt`; the ids are those of its text tokenizer.

    The published models were told sigma = 0 at all times (`time_conditioning: false`). Ours are not told the time: the
    embedding of sigma = 0 becomes that of their class.

    A text tokenizer without a mask, as GPT-2's, has the mask behind its ids, and the reference's logit of it, which it
    gives no probability, is left out. One that has a mask among its ids, as BERT's, keeps all of them, so that ids stay
    what they are; the logit of that id is as low as the reference makes it.
    """
    rows = len(state[f"{_PREFIX}vocab_embed.embedding"])
    mask = settings.take("mask_index", _MASK_OF_BERT if rows == _ROWS_OF_BERT else rows - 1)
    settings.agree({"vocab_size": rows})
    if not 0 <= mask < rows:
        raise ValueError(f"reference_config has mask_index={mask}, but the tensors have {rows} ids")
    within = mask < rows - 1
    every = "every model that is read has"
    settings.agree({"parameterization": "subs", "backbone": "dit", "diffusion": "absorbing_state", "T": 0}, every)
    settings.agree({"subs_masking": False}, every)
    settings.without_effect("it is about the command that was run", "mode")
    model = settings.section("model", ())
    model.agree({"tie_word_embeddings": False}, every)
    model.without_effect("the reference's network does not read it", "scale_by_sigma")
    timed = settings.take("time_conditioning", False)
    backbone = switches(state, model, _PREFIX)
    names = [f"{_OUTPUT}.weight", f"{_OUTPUT}.bias"]
    embedding = f"{_PREFIX}vocab_embed.embedding"

    def never_mask(weight: Tensor, bias: Tensor) -> list[Tensor]:
        if not within:
            return [weight[:mask], bias[:mask]]
        place = torch.tensor([mask])
        return [weight.index_fill(0, place, 0.0), bias.index_fill(0, place, _NEVER)]

    # Our own mask follows all ids; it has the embedding of theirs.
    mask_behind = Arrangement([embedding], [embedding], lambda table: [torch.cat([table, table[mask : mask + 1]])])
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(rows if within else mask, (model.take("length", LENGTH),)),
        num_classes=1,
        backbone=backbone,
        rules=rules(_PREFIX),
        arrangements=[
            usual_rotation(_PREFIX),
            neighbouring_pairs(_PREFIX, backbone["heads"]),
            (without_classes if timed else without_time)(_PREFIX),
            Arrangement(names, names, never_mask),
            *([mask_behind] if within else []),
        ],
        process={"class_path": "discrete_lit.diffusion.AbsorbingProcess"},
        schedule=schedule(settings.section("noise"), "loglinear", tuple(SCHEDULES)),
        head={"class_path": "discrete_lit.diffusion.LeaveOneOutHead"},
        loss={"class_path": "discrete_lit.diffusion.losses.MaskedCrossEntropy"},
        time_input="total_noise" if timed else "none",
        label_dropout=0.0,
        # All three draw the same law where only masks are noise; the reference's default, and its argmax at the end.
        # ReMDM's samplers are another repository's, for these models.
        sampler=sampler(
            settings.section("sampling"),
            dict.fromkeys(("ddpm_cache", "ddpm", "analytic"), "AncestralSampler"),
            "ddpm_cache",
            128,
            "argmax",
        ),
    )
