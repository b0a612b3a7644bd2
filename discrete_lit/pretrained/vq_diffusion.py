"""microsoft/VQ-Diffusion: discrete diffusion of a VQGAN's ids by masks and replacement, of classes or of none."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.diffusion.mask_and_replace import MaskAndReplaceProcess, MaskAndReplaceSchedule
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    Rules,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_EVERY = "every model that is read has"
_TRANSFORMER = "transformer."
_BLOCKS = f"{_TRANSFORMER}blocks"
_EMBEDDING = f"{_TRANSFORMER}content_emb"
# Channels of an attention head of the published model of ImageNet.
_HEAD_WIDTH = 32
_GELU = {"GELU2": "gelu_quick", "GELU": "gelu"}
# Rows of a table of ImageNet's classes with one of no class.
_WITH_NULL = 1001
# Waves of the reference's fixed embedding of the time go round so often.
_RESCALED = 4000.0
_BLOCK: Rules = (
    ("attention.query_key_value.{rest}", "attn.{query|key|value}.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
)
_TABLES: Rules = (
    ("step_table.weight", "ln1.emb.weight"),
    ("step_projection.{rest}", "ln1.linear.{rest}"),
    ("class_table.weight", "ln2.emb.weight"),
    ("class_projection.{rest}", "ln2.linear.{rest}"),
)


@register(
    "vq_diffusion",
    marks=("log_cumprod_ct", f"{_EMBEDDING}.emb.weight", f"{_BLOCKS}.0.ln1.linear.weight"),
    wrappers=("ema", "model"),
    section=None,
)
def vq_diffusion(state: State, settings: Settings) -> Conversion:
    """Convert `imagenet_pretrained.pth` or another model of classes, or one of none, as of FFHQ.

    Guidance needs the null class: a row of its own where the tables have one more than there are classes
    (`condition_emb_config.params.num_embed`; 1000 of 1001), else the mean of the rows, as in the published code. The
    embedding of positions may be larger than the grid of tokens, which must be given: `content_spatial_size`. Its rows
    and columns become one embedding for each position.
    """
    if f"{_BLOCKS}.0.attn1.query.weight" in state:
        raise ValueError(f"{state.source!r} is a model of texts: those of classes, or of none, are read")
    steps = len(state["log_at"])
    vocab_size, width = state[f"{_EMBEDDING}.emb.weight"].shape
    vocab_size -= 1  # the last is the mask
    whole, arguments = settings, _diffusion(settings)
    guidance = whole.section("model").take("guidance_scale", 1.0) if "model" in whole else 1.0
    arguments.class_name("DiffusionTransformer", ("DiffusionTransformer",))
    arguments.agree({"diffusion_step": steps, "alpha_init_type": "alpha1"})
    arguments.agree({"learnable_cf": False}, "a model of classes has")
    conditional = f"{_BLOCKS}.0.ln2.linear.weight" in state
    transformer = arguments.section("transformer_config")
    kind = "Condition2ImageTransformer" if conditional else "UnCondition2ImageTransformer"
    transformer.class_name(kind, (kind,))
    grid = _grid(state, transformer)
    arrangements = [_checked_tables(steps, vocab_size), _positions(state, arguments, vocab_size, width, grid)]
    classes = _classes(state, arguments, transformer) if conditional else 1
    arrangements += _class_tables(state, classes) if conditional else _without_classes()
    if f"{_BLOCKS}.0.ln1.emb.weight" not in state:
        arrangements.append(_sinusoids(steps, width))
    backbone, rules = _blocks(state, transformer, width, conditional)
    backbone["time_steps"] = steps
    loss = {
        "steps": steps,
        "auxiliary_weight": arguments.take("auxiliary_loss_weight", 1e-3),
        "adaptive": arguments.take("adaptive_auxiliary_loss", True),
        "mask_weights": [float(weight) for weight in arguments.take("mask_weight", [1.0, 1.0])],
    }
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(vocab_size, grid),
        num_classes=classes,
        backbone=backbone,
        rules=rules,
        arrangements=arrangements,
        dropped=("Lt_history", "Lt_count", "diffusion_acc_list", "diffusion_keep_list"),
        beside={"importance.squares": state["Lt_history"], "importance.counts": state["Lt_count"]},
        process={"class_path": "discrete_lit.diffusion.MaskAndReplaceProcess"},
        schedule={"class_path": "discrete_lit.diffusion.MaskAndReplaceSchedule", "init_args": {"steps": steps}},
        head={"class_path": "discrete_lit.diffusion.PosteriorHead"},
        loss={"class_path": "discrete_lit.diffusion.mask_and_replace.VQDiffusionLoss", "init_args": loss},
        time_input="time",
        label_dropout=0.1 if conditional else 0.0,
        # The published evaluation: all steps, and the ids within the first 0.86 of the probability.
        sampler=sampled_by("AncestralSampler", steps=steps, top_p=0.86, guidance_scale=guidance),
    )


def _diffusion(settings: Settings) -> Settings:
    """Return the arguments of the diffusion: all that is given, or a part of a published configuration."""
    settings.without_effect("it is about the training", "solver", "dataloader")
    if "model" not in settings:
        return settings
    model = settings.section("model")
    model.class_name("C_DALLE", ("C_DALLE", "UC_DALLE"))
    model.without_effect("the tokenizer is loaded by itself", "content_codec_config")
    model.without_effect("it names the columns of the data", "content_info", "condition_info")
    model.agree({"learnable_cf": False}, "a model of classes has")
    return model.section("diffusion_config")


def _grid(state: State, transformer: Settings) -> tuple[int, ...]:
    """Return the grid of the tokens, which no tensor tells.

    Raises:
        ValueError: it is not given, or contradicts itself or the convolutions, which take a square.
    """
    length = transformer.optional("content_seq_len", int)
    given = transformer.take("content_spatial_size", [])
    if not given and length is None:
        raise ValueError(
            f"nothing in {state.source!r} tells the grid of the tokens: give reference_config with "
            f"{transformer.where('content_spatial_size')}, [16, 16] of the published model of ImageNet"
        )
    grid = tuple(given) if given else square(state, length or 0)
    size = grid[0] * grid[1] if len(grid) == 2 else 0
    if size < 1 or (length is not None and length != size) or (_on_grid(state) and grid[0] != grid[1]):
        raise ValueError(
            f"reference_config has {transformer.where('content_spatial_size')}={given} and content_seq_len={length}: "
            "two sides are read, which make up the length, and are equal where mlp_type is conv_mlp"
        )
    return grid


def _on_grid(state: State) -> bool:
    return f"{_BLOCKS}.0.mlp.conv1.weight" in state


def _checked_tables(steps: int, vocab_size: int) -> Arrangement:
    """Drop the tables of the noise, after a check that they are ours."""
    names = ["at", "bt", "ct", "cumprod_at", "cumprod_bt", "cumprod_ct", "1_min_ct", "1_min_cumprod_ct"]

    def check(*tables: Tensor) -> list[Tensor]:
        process, schedule = MaskAndReplaceProcess(vocab_size), MaskAndReplaceSchedule(steps)
        alpha = schedule.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps)
        each = process.kernel(alpha[:-1], alpha[1:])
        # The last row of what is cumulative is that of clean data.
        up_to = [
            torch.cat((part, part.new_full((1,), clean)))
            for part, clean in zip(process.kernel(torch.ones_like(alpha[1:]), alpha[1:]), (1.0, 0.0, 0.0), strict=True)
        ]
        ours = [*each, *up_to, 1 - each[2], 1 - up_to[2]]
        for name, table, own in zip(names, tables, ours, strict=True):
            if table.shape != own.shape or not torch.allclose(table.double().exp(), own, rtol=1e-2, atol=1e-12):
                raise ValueError(f"log_{name} is not that of alpha_init_type='alpha1', which ours has")
        return []

    return Arrangement([f"log_{name}" for name in names], [], check)


def _positions(state: State, arguments: Settings, vocab_size: int, width: int, grid: tuple[int, ...]) -> Arrangement:
    """Add rows and columns up to an embedding of each position; the grid is read as a row of the reference's."""
    content = arguments.section("content_emb_config")
    content.class_name("DalleMaskImageEmbedding", ("DalleMaskImageEmbedding",))
    tables = f"{_EMBEDDING}.height_emb.weight" in state
    names = [f"{_EMBEDDING}.{axis}_emb{'.weight' if tables else ''}" for axis in ("height", "width")]
    sides = [state[name].shape[-2] for name in names]
    content.agree({"num_embed": vocab_size, "embed_dim": width, "spatial_size": sides})
    content.agree({"pos_emb_type": "embedding" if tables else "parameter"})
    content.without_effect(IN_TRAINING, "trainable")
    length = grid[0] * grid[1]

    def positions(rows: Tensor, columns: Tensor) -> list[Tensor]:
        rows, columns = rows.reshape(-1, width), columns.reshape(-1, width)
        added = rearrange(rows[:, None] + columns, "h w d -> 1 (h w) d")
        if added.shape[1] < length:
            raise ValueError(f"there are positions for {added.shape[1]} tokens, the grid {grid} has {length}")
        return [added[:, :length]]

    return Arrangement(names, ["positions"], positions)


def _classes(state: State, arguments: Settings, transformer: Settings) -> int:
    """Return the number of classes, of tables with or without a row of no class."""
    rows = len(state[f"{_BLOCKS}.0.ln2.emb.weight"])
    transformer.agree({"class_number": rows, "class_type": "adalayernorm"})
    condition = arguments.section("condition_emb_config")
    condition.class_name("ClassEmbedding", ("ClassEmbedding",))
    condition.agree({"identity": True}, _EVERY)
    condition.without_effect("the class has a table in each block", "embed_dim")
    condition.without_effect(IN_TRAINING, "trainable")
    classes = condition.take("num_embed", rows - 1 if rows == _WITH_NULL else rows)
    if rows not in (classes, classes + 1):
        raise ValueError(
            f"reference_config has {condition.where('num_embed')}={classes}, but the tensors have {rows} rows: one for "
            "each class, and perhaps one for none"
        )
    return classes


def _class_tables(state: State, classes: int) -> list[Arrangement]:
    """Give no class a row where it has none: the mean of the others."""
    name = f"{_BLOCKS}.{{block}}.ln2.emb.weight"

    def with_null(table: Tensor) -> list[Tensor]:
        return [table if len(table) > classes else torch.cat((table, table.mean(dim=0, keepdim=True)))]

    return [Arrangement([name], [name], with_null)]


def _without_classes() -> list[Arrangement]:
    """Turn gains and offsets of a norm into what modulates one without them, for the one class and for none."""
    names = [f"{_BLOCKS}.{{block}}.ln2.{part}" for part in ("weight", "bias")]
    made = [f"{_BLOCKS}.{{block}}.ln2.{part}" for part in ("emb.weight", "linear.weight", "linear.bias")]

    def tables(gain: Tensor, offset: Tensor) -> list[Tensor]:
        width = len(gain)
        return [gain.new_zeros(2, width), gain.new_zeros(2 * width, width), torch.cat((gain - 1, offset))]

    return [Arrangement(names, made, tables)]


def _sinusoids(steps: int, width: int) -> Arrangement:
    """Give every block a table of the fixed waves of the steps, which some models have in its place."""
    name = f"{_BLOCKS}.{{block}}.ln1.linear.weight"
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(half) / (half - 1))
    angles = torch.arange(steps)[:, None] / steps * _RESCALED * frequencies
    table = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return Arrangement(
        [name], [name, f"{_BLOCKS}.{{block}}.ln1.emb.weight"], lambda weight: [weight, table.to(weight.dtype)]
    )


def _blocks(
    state: State, transformer: Settings, width: int, conditional: bool
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the switches of our `Transformer`, and the rules of its names."""
    depth, on_grid = state.count(f"{_BLOCKS}.{{}}"), _on_grid(state)
    parts = ("conv1", "conv2") if on_grid else ("0", "2")
    hidden = len(state[f"{_BLOCKS}.0.mlp.{parts[0]}.bias"])
    transformer.agree({"n_layer": depth, "n_embd": width, "mlp_hidden_times": hidden // width})
    transformer.agree({"attn_type": "selfcondition" if conditional else "self"})
    transformer.agree({"mlp_type": "conv_mlp" if on_grid else "fc"})
    fixed = "" if f"{_BLOCKS}.0.ln1.emb.weight" in state else "_abs"
    transformer.agree({"timestep_type": f"adalayernorm{fixed}"})
    if not conditional:
        transformer.without_effect("the model has no classes", "class_type")
    transformer.without_effect(IN_TRAINING, "attn_pdrop", "resid_pdrop", "checkpoint")
    backbone = {
        "width": width,
        "depth": depth,
        "heads": head_count(transformer, "n_head", max(1, width // _HEAD_WIDTH), width),
        "mlp_hidden": hidden,
        "mlp": _GELU[transformer.take("block_activate", "GELU2", tuple(_GELU))],
        "mlp_on_grid": on_grid,
        "norm_epsilon": 1e-5,
        "conditioning": "adaln_tables",
        "initialization": "bert",
    }
    rules = [
        ("token_embedding.table.weight", f"{_EMBEDDING}.emb.weight"),
        ("positions.embedding", "positions"),
        *in_blocks(f"{_BLOCKS}.{{block}}", _BLOCK),
        ("blocks.{block}.mlp.expand.{rest}", f"{_BLOCKS}.{{block}}.mlp.{parts[0]}.{{rest}}"),
        ("blocks.{block}.mlp.contract.{rest}", f"{_BLOCKS}.{{block}}.mlp.{parts[1]}.{{rest}}"),
        *in_blocks(f"{_BLOCKS}.{{block}}", _TABLES, ours="norm_tables.{block}"),
        ("final_norm.{rest}", f"{_TRANSFORMER}to_logits.0.{{rest}}"),
        ("head.project.weight", f"{_TRANSFORMER}to_logits.1.weight"),
        ("head.bias", f"{_TRANSFORMER}to_logits.1.bias"),
    ]
    return backbone, rules
