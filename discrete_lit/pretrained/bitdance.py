"""shallowdream204/BitDance: its tokenizer, signs of many channels around Open-MAGVIT2's network, and its generators.

A generator's file holds the trained weights and their EMA, which is read, and a copy of the tokenizer.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.generators.autoregressive import block_order
from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register, reorder_chunks
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    class_count,
    generator_conversion,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.seed_voken import DROPPED, MAGVIT2
from discrete_lit.pretrained.settings import Settings


@register(
    "bitdance_ae",
    marks=("encoder.down.0.block.0.conv1.weight", "decoder.adaptive.0.gamma.weight", "!model_ema.decay"),
    wrappers=taming.WRAPPERS,
)
def bitdance_ae(state: State, settings: Settings) -> Conversion:
    """Convert `ae_d16c32.pt`, or the tokenizer within a BitDance checkpoint.

    An id has the bits of all codebooks, the first channel's the lowest; `num_codebooks` groups of consecutive channels
    only count in training, for the entropy of a batch.
    """
    bits = state["encoder.conv_out.weight"].shape[0]
    settings.class_name("VQModel", ("VQModel",))
    settings.agree({"gan_decoder": False}, "every model that is read has")
    if state["decoder.conv_in.weight"].shape[1] != bits:
        raise ValueError(
            f"{state.source!r} has a decoder of {state['decoder.conv_in.weight'].shape[1]} channels for {bits} bits: "
            "one that takes noise too (gan_decoder) is not read"
        )
    groups = settings.take("num_codebooks", 4)
    if groups < 1 or bits % groups:
        raise ValueError(f"reference_config has num_codebooks={groups}, which does not divide the {bits} bits")
    network = MAGVIT2.network(state, downsampling="symmetric", upsampling="depth_to_space", adaptive_norm=True)
    arguments = settings.section("ddconfig")
    arguments.agree({"double_z": False}, "a model of signs has")
    taming.same_network({**network["init_args"], "z_channels": bits}, arguments)
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.LookupFreeQuantizer",
        "init_args": {"bits": bits, "entropy_groups": groups, "bit_order": "first_least_significant"},
    }
    return Conversion(
        config=taming.vqgan(network, quantizer),
        tensors=state,
        renaming=MAGVIT2.renaming(MAGVIT2.levels(state)),
        dropped=DROPPED,
        kept=("quantizer.shifts",),
    )


# Guidance scale of the published evaluation: by width, and of B in blocks by their size.
_GUIDANCE = {768: 3.2, 1024: 4.0, 1280: 4.55}
_GUIDANCE_IN_BLOCKS = {4: 3.9, 16: 6.1}
_STEPS = 100
_TOKENIZER = "vae."
_HEAD_BLOCK = [
    ("expand.{rest}", "w1.{rest}"),
    ("contract.{rest}", "w2.{rest}"),
]
_HEAD_BLOCKS = {
    False: [*_HEAD_BLOCK, ("norm.{rest}", "norm.{rest}")],
    True: [
        *_HEAD_BLOCK,
        ("norm.{rest}", "norm2.{rest}"),
        ("attention.norm.{rest}", "norm1.{rest}"),
        ("attention.query_key_value.{rest}", "attn.wqkv.{rest}"),
        ("attention.out.{rest}", "attn.wo.{rest}"),
    ],
}
_BLOCK = [
    ("attention.query_key_value.weight", "attention.wqkv.weight"),
    ("attention.out.weight", "attention.wo.weight"),
    ("attention_norm.weight", "attention_norm.weight"),
    ("mlp_norm.weight", "ffn_norm.weight"),
    ("mlp.expand.weight", "feed_forward.w1.weight"),
    ("mlp.contract.weight", "feed_forward.w2.weight"),
]
_RULES = [
    ("token_embedding.expand.{rest}", "proj_in.w1.{rest}"),
    ("token_embedding.contract.{rest}", "proj_in.w2.{rest}"),
    ("class_embedding.weight", "cls_embedding.weight"),
    ("queries", "query_token"),
    ("embedding_norm.weight", "emb_norm.weight"),
    *in_blocks("layers.{block}", _BLOCK),
    ("final_norm.weight", "norm.weight"),
    ("hidden_positions", "pos_for_diff.weight"),
    ("place_head.flow.network.time_embedding.layers.{layer}.{rest}", "head.net.time_embed.mlp.{layer}.{rest}"),
    ("place_head.flow.network.condition_projection.{rest}", "head.net.cond_embed.{rest}"),
    ("place_head.flow.network.input_projection.{rest}", "head.net.input_proj.{rest}"),
    ("place_head.flow.network.modulations.{block}.{rest}", "head.net.ada_ln_blocks.{block}.{rest}"),
    ("place_head.flow.network.final_modulation.{rest}", "head.net.final_layer.ada_ln_modulation.{rest}"),
    ("place_head.flow.network.output.{rest}", "head.net.final_layer.linear.{rest}"),
]
_MARKS = ("proj_in.w1.weight", "pos_for_diff.weight", "head.net.ada_ln_blocks.0.weight")


@register("bitdance", marks=(*_MARKS, "!query_token"), wrappers=("ema", "model"))
def bitdance(state: State, settings: Settings) -> Conversion:
    """Convert `BitDance_{B,L,H}_1x.pt`: the EMA weights, and the tokenizer beside them."""
    return _generator(state, settings, block_size=1, order="raster")


@register("bitdance_parallel", marks=(*_MARKS, "query_token"), wrappers=("ema", "model"))
def bitdance_parallel(state: State, settings: Settings) -> Conversion:
    """Convert `BitDance_B_{4,16}x.pt`, which draw tokens in blocks.

    Blocks are squares, or in `parallel_mode: standard` runs of the raster order.
    """
    block_size = state["query_token"].shape[1] + 1
    settings.agree({"parallel_num": block_size})
    mode = settings.take("parallel_mode", "patch", ("patch", "standard"))
    return _generator(state, settings, block_size=block_size, order="blocks" if mode == "patch" else "raster")


def _generator(state: State, settings: Settings, *, block_size: int, order: str) -> Conversion:
    own = State({name: value for name, value in state.items() if not name.startswith(_TOKENIZER)}, state.source)
    bits, width = own["proj_in.w1.weight"].shape[1], len(own["proj_in.w2.weight"])
    grid = square(own, len(own["pos_for_diff.weight"]))
    classes = class_count(own, own["cls_embedding.weight"])
    slots = own["cls_embedding.weight"].shape[1] // width
    depth = own.count("layers.{}")
    head: dict[str, Any] = {
        "width": len(own["head.net.input_proj.weight"]),
        "depth": own.count("head.net.res_blocks.{}"),
        "modulations": own.count("head.net.ada_ln_blocks.{}"),
    }
    settings.agree(
        {
            "dim": width,
            "n_layer": depth,
            "latent_dim": bits,
            "num_classes": classes,
            "cls_token_num": slots,
            "diff_dim": head["width"],
            "diff_layers": head["depth"],
            "diff_adanln_layers": head["modulations"],
        }
    )
    settings.agree({"patch_size": 1, "perturb_schedule": "constant", "time_shift": 1.0}, "every model that is read has")
    stride, resolution = settings.take("down_size", 16), settings.optional("resolution", int)
    if resolution is not None and resolution != stride * grid[0]:
        raise ValueError(
            f"reference_config has resolution={resolution} and down_size={stride}, but the tensors have a grid of "
            f"{grid}"
        )
    heads = head_count(settings, "n_head", max(1, width // 64), width)
    if width // heads % 4:
        raise ValueError(
            f"reference_config has n_head={heads}: heads of {width // heads} channels do not turn on a grid"
        )
    settings.without_effect(IN_TRAINING, "drop_rate", "grad_checkpointing")
    settings.without_effect("the reference does not read it either", "perturb_rate_max")
    settings.without_effect("the tokenizer is that of the file, or given apart", "trained_vae")
    head |= _training_of_the_head(settings)
    if block_size > 1:
        head["block_size"] = block_size
    dropped = settings.take("class_dropout_prob", 0.1)
    published = _GUIDANCE.get(width, 1.0) if block_size == 1 else _GUIDANCE_IN_BLOCKS.get(block_size, 1.0)
    sampler = _sampler(settings, published if dropped else 1.0)
    backbone = {
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_hidden": own["layers.0.feed_forward.w2.weight"].shape[1],
        "mlp": "swiglu",
        "norm": "rms",
        "embedding_norm": "rms",
        "positions": "rope_2d",
        "rotary_offset": 1.5,
        "token_embedding": "bits_mlp",
        "class_slots": slots,
        "bias": False,
        "hidden_positions": True,
        "place_head": {"class_path": "discrete_lit.backbones.BinaryFlowHead", "init_args": head},
    }
    arrangements = [
        _axes_in_our_order("layers.{layer}.attention.wqkv.weight", heads),
        # Scale, shift, gate in theirs, of each branch.
        *(
            reorder_chunks(
                f"head.net.ada_ln_blocks.{{block}}.{part}", (1, 0, 2) if block_size == 1 else (1, 0, 2, 4, 3, 5)
            )
            for part in ("weight", "bias")
        ),
        *(reorder_chunks(f"head.net.final_layer.ada_ln_modulation.{part}", (1, 0)) for part in ("weight", "bias")),
    ]
    options: dict[str, Any] = {}
    if block_size > 1:
        options["block_size"] = block_size
    if order == "blocks":
        options["order"] = "blocks"
        places = torch.tensor(block_order(grid, block_size))
        arrangements.append(
            Arrangement(["pos_for_diff.weight"], ["pos_for_diff.weight"], lambda table: [table[places.argsort()]])
        )
    names = "head.net.res_blocks.{block}"
    of_head = in_blocks(names, _HEAD_BLOCKS[block_size > 1], ours="place_head.flow.network.blocks.{block}")
    return generator_conversion(
        "Autoregressive",
        own,
        tokens=Tokens(2**bits, grid),
        num_classes=classes,
        backbone=backbone,
        rules=[*_RULES, *of_head],
        arrangements=arrangements,
        tokenizer=_tokenizer(state),
        perturb_rate=settings.take("perturb_rate", 0.0),
        label_dropout=dropped,
        sampler=sampler,
        **options,
    )


def _tokenizer(state: State) -> Conversion | None:
    """The conversion of the tokenizer within a generator's file; None where there is none."""
    own = {name.removeprefix(_TOKENIZER): value for name, value in state.items() if name.startswith(_TOKENIZER)}
    return bitdance_ae(State(own, state.source), Settings()) if own else None


def _training_of_the_head(settings: Settings) -> dict[str, Any]:
    """The times of training: 1 is the noise here and the data in theirs, which turns the sign of the mean."""
    made: dict[str, Any] = {"repeats": settings.take("diff_batch_mul", 4)}
    if settings.take("time_schedule", "logit_normal", ("logit_normal", "uniform")) == "uniform":
        settings.without_effect("times are uniform", "P_mean", "P_std")
        made["times"] = {"class_path": "discrete_lit.diffusion.gaussian_losses.UniformTimes"}
        return made
    # The defaults of the reference's command, with which all was published; its class has others.
    mean, deviation = settings.take("P_mean", -0.8), settings.take("P_std", 0.8)
    if (mean, deviation) != (-0.8, 0.8):
        times = {"mean": -mean, "deviation": deviation}
        made["times"] = {"class_path": "discrete_lit.diffusion.gaussian_losses.LogitNormalTimes", "init_args": times}
    return made


def _sampler(settings: Settings, published: float) -> dict[str, Any]:
    sampling = settings.section("sampling")
    sampling.without_effect("images are decoded apart from it", "chunk_size")
    sampling.without_effect("it says where a test looks into the head", "position")
    steps = sampling.take("sample_steps", _STEPS)
    if steps < 1:
        raise ValueError(f"reference_config has sampling.sample_steps={steps}, but at least 1 is read")
    arguments: dict[str, Any] = {
        # Not guided below 1.
        "guidance_scale": max(1.0, sampling.take("cfg_scale", published)),
        "guidance_schedule": sampling.take("cfg_schedule", "linear", ("linear", "constant")),
        "null_rows": "own",
    }
    if steps != _STEPS:
        arguments["solver"] = {
            "class_path": "discrete_lit.diffusion.solvers.EulerMaruyama",
            # The last step, without noise, is not counted in theirs.
            "init_args": {"steps": steps + 1, "last_step": 0.05, "last_drift": "velocity"},
        }
    return sampled_by("BinaryFlowSampler", **arguments)


def _axes_in_our_order(name: str, heads: int) -> Arrangement:
    """Exchange the halves of each head's queries and keys: the columns of the grid turn the first half in theirs."""

    def make(weight: Tensor) -> list[Tensor]:
        parts = weight.unflatten(0, (3, heads, 2, -1))
        turned = torch.cat((parts[:2].flip(2), parts[2:]))
        return [turned.flatten(0, 3)]

    return Arrangement([name], [name], make)
