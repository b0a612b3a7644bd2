"""VQGAN and its GPT, of CompVis/taming-transformers, and the VQGANs of CompVis/latent-diffusion.

- tokenizers: `taming_vqgan`, and `taming_gumbelvq` (DALL-E's relaxation);
- `taming_net2net`: the GPT, of classes or of none, with its VQGAN in the same file.

Many later repositories began with taming's code: `LAYOUT`, `vqgan`, `vector_quantizer` and the names here serve them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import IN_TRAINING, ConvLayout, generator_conversion, head_count, in_blocks, square
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

LAYOUT = ConvLayout()
# Our name of the codebook, and the published one.
CODES = ("quantizer.codebook.codes", "quantize.embedding.weight")
# The losses with their networks; the random projection that shows segmentations as colours.
DROPPED = ("loss.*", "colorize")
WRAPPERS = ("state_dict",)
MARKS = ("encoder.down.0.block.0.conv1.weight", "quant_conv.weight")


@register(
    "taming_vqgan",
    marks=(*MARKS, "quantize.embedding.weight", "!model_ema.decay", "!quantize.ema_vocab_hit_SV"),
    wrappers=WRAPPERS,
)
def taming_vqgan(state: State, settings: Settings) -> Conversion:
    """Convert `last.ckpt` of taming's VQGANs, or `model.ckpt` of LDM's first stages."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    settings.class_name("VQModel", ("VQModel", "VQModelInterface"))
    settings.agree({"n_embed": codebook_size, "embed_dim": code_dim})
    trained_by(settings)
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("beta", 0.25),
        # The published models were trained with beta on the codebook term, not on the commitment.
        weighted_term="codebook",
    )
    return Conversion(
        config=vqgan(network(state, settings), quantizer),
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), [CODES]),
        dropped=DROPPED,
    )


@register(
    "taming_gumbelvq",
    marks=(*MARKS, "quantize.embed.weight", "quantize.proj.weight"),
    wrappers=WRAPPERS,
)
def taming_gumbelvq(state: State, settings: Settings) -> Conversion:
    """Convert `last.ckpt` of `vqgan_gumbel_f8`."""
    codebook_size, code_dim = state["quantize.embed.weight"].shape
    settings.class_name("GumbelVQ", ("GumbelVQ",))
    settings.agree({"n_embed": codebook_size, "embed_dim": code_dim})
    trained_by(settings)
    temperature = settings.section("temperature_scheduler_config")
    temperature.without_effect(
        "the temperature of training fell along it; ours goes on at one",
        *("target", "warm_up_steps", "max_decay_steps", "lr_max", "lr_min", "verbosity_interval"),
    )
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.GumbelQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "kl_weight": settings.take("kl_weight", 1e-8),
            "temperature": temperature.take("lr_start", 0.9),
            "hard": True,
        },
    }
    codes = [
        ("quantizer.codes", "quantize.embed.weight"),
        ("quantizer.to_logits.{rest}", "quantize.proj.{rest}"),
    ]
    config = vqgan(network(state, settings), quantizer)
    return Conversion(
        config=config,
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), codes),
        dropped=DROPPED,
        kept=("quantizer.steps",),
    )


def trained_by(settings: Settings) -> None:
    """Read what a VQGAN's configuration says of its training and of its data, and what no published one uses."""
    settings.without_effect(
        "it is about the loss and the data of the training, of which ours has settings of its own",
        *("lossconfig", "image_key", "colorize_nlabels", "batch_resize_range", "lr_g_factor"),
    )
    settings.without_effect("it says how ids are shaped; ours are grids", "sane_index_shape")
    settings.agree({"remap": None}, "every model that is read has")


def network(state: State, settings: Settings, **options: Any) -> dict[str, Any]:
    """Return the configuration of the network whose tensors have taming's layout, with options of the family."""
    config = LAYOUT.network(state, **options)
    arguments = settings.section("ddconfig")
    arguments.agree({"double_z": False}, "a model with a codebook has")
    same_network(config["init_args"], arguments)
    return config


def same_network(sizes: dict[str, Any], settings: Settings) -> None:
    """Compare the arguments of taming's encoder and decoder with the sizes of a network that was read.

    Raises:
        ValueError: they say something else.
    """
    names = {
        "ch": "channels",
        "ch_mult": "multipliers",
        "num_res_blocks": "blocks",
        "z_channels": "z_channels",
        "in_channels": "image_channels",
        "out_ch": "out_channels",
    }
    settings.agree({theirs: sizes[ours] for theirs, ours in names.items() if ours in sizes})
    settings.agree({"attn_type": "none" if sizes["attention"] is False else "vanilla"})
    settings.agree(
        {"resamp_with_conv": True, "use_linear_attn": False, "use_timestep": False}, "every model that is read has"
    )
    settings.agree({"give_pre_end": False, "tanh_out": False}, "every model that is read has")
    settings.without_effect(IN_TRAINING, "dropout")
    _check_attention(sizes, settings)


def _check_attention(sizes: dict[str, Any], settings: Settings) -> None:
    """Compare the levels that have attention with those that have a resolution named for it."""
    resolution, named = settings.optional("resolution", int), settings.take("attn_resolutions", [])
    settings.without_effect("it names the levels with attention, which the tensors show", "resolution")
    if resolution is None or "attn_resolutions" not in settings:
        return
    levels = [level for level in range(len(sizes["multipliers"])) if resolution // 2**level in named]
    found = sizes["attention"] or []
    settings.without_effect("a resolution that no level has is that of no attention", "attn_resolutions")
    if levels != found:
        have = [resolution // 2**level for level in found]
        raise ValueError(
            f"reference_config has ddconfig.attn_resolutions={named} at resolution={resolution}, but the tensors have "
            f"attention at {have}"
        )


def vqgan(network: dict[str, Any], quantizer: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a `VQGAN`."""
    return {"class_path": "discrete_lit.tokenizers.VQGAN", "init_args": {"network": network, "quantizer": quantizer}}


def vector_quantizer(codebook_size: int, code_dim: int, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a `VectorQuantizer` whose codes were trained by gradient, as taming's are."""
    trained = {"codebook_update": "gradient", "codebook_init": "uniform"}
    return {
        "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
        "init_args": {"codebook_size": codebook_size, "dim": code_dim, **trained, **settings},
    }


_FIRST_STAGE = "first_stage_model."
_NO_CLASSES = "__is_unconditional__"
_BLOCK = [
    ("attention.query_key_value.{rest}", "attn.{query|key|value}.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("attention_norm.{rest}", "ln1.{rest}"),
    ("mlp_norm.{rest}", "ln2.{rest}"),
    ("mlp.expand.{rest}", "mlp.0.{rest}"),
    ("mlp.contract.{rest}", "mlp.2.{rest}"),
]
_RULES = [
    ("token_embedding.table.weight", "transformer.tok_emb.weight"),
    ("class_embedding.weight", "transformer.tok_emb.classes"),
    ("positions.embedding", "transformer.pos_emb"),
    *in_blocks("transformer.blocks.{block}", _BLOCK),
    ("final_norm.{rest}", "transformer.ln_f.{rest}"),
    ("head.project.weight", "transformer.head.weight"),
]


@register(
    "taming_net2net",
    marks=("transformer.tok_emb.weight", "transformer.pos_emb", f"{_FIRST_STAGE}quantize.embedding.weight"),
    wrappers=WRAPPERS,
)
def taming_net2net(state: State, settings: Settings) -> Conversion:
    """Convert `last.ckpt` of `cin_transformer`, or of a model without classes, as of FFHQ and CelebA-HQ.

    Class k has the embedding of id k, and a model without classes begins with that of `sos_token`: ours has one class.
    No null label was trained: it has zeros, and guidance is refused. The number of classes must be given, as must that
    there are none.
    """
    vocab_size, width = state["transformer.tok_emb.weight"].shape
    length, depth = state["transformer.pos_emb"].shape[1], state.count("transformer.blocks.{}")
    settings.class_name("Net2NetTransformer", ("Net2NetTransformer",))
    settings.without_effect("it is about the data of the training", "first_stage_key", "cond_stage_key")
    settings.without_effect("random ids take the place of some only in training", "pkeep")
    settings.agree({"downsample_cond_size": -1}, "a model of classes has")
    arguments = settings.section("transformer_config")
    arguments.class_name("GPT", ("GPT",))
    arguments.agree({"vocab_size": vocab_size, "block_size": length, "n_layer": depth, "n_embd": width})
    arguments.without_effect(IN_TRAINING, "embd_pdrop", "resid_pdrop", "attn_pdrop")
    classes = _classes(settings, vocab_size)
    shape, order = _order(state, settings, length)
    backbone: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": head_count(arguments, "n_head", max(1, width // 64), width),
        "mlp_hidden": len(state["transformer.blocks.0.mlp.0.bias"]),
        "norm_epsilon": 1e-5,
        "head_bias": False,
    }
    visible_start = _visible_start(state, arguments, length)
    if visible_start:
        backbone["visible_start"] = visible_start

    def with_classes(table: Tensor) -> list[Tensor]:
        return [table, torch.cat([table[classes], torch.zeros_like(table[:1])])]

    embedding, positions = "transformer.tok_emb.weight", "transformer.pos_emb"
    arrangements = [Arrangement([embedding], [embedding, "transformer.tok_emb.classes"], with_classes)]
    options: dict[str, Any] = {}
    if order is not None:
        options["order"] = order
        places = torch.tensor(order)

        def along_the_order(table: Tensor) -> list[Tensor]:
            """Give each position of the grid the embedding of its place in the order; the last is never read."""
            in_grid = torch.zeros_like(table[0]).index_copy(0, places[:-1], table[0, 1:])
            return [torch.cat([table[:, :1], in_grid[None]], dim=1)]

        arrangements.append(Arrangement([positions], [positions], along_the_order))
    own = {name: value for name, value in state.items() if not name.startswith(_FIRST_STAGE)}
    first = {name.removeprefix(_FIRST_STAGE): state[name] for name in state if name not in own}
    return generator_conversion(
        "Autoregressive",
        State(own, state.source),
        tokens=Tokens(vocab_size, shape),
        num_classes=len(classes),
        backbone=backbone,
        rules=_RULES,
        arrangements=arrangements,
        dropped=("transformer.blocks.*.attn.mask", "permuter.*_shuffle_idx"),
        tokenizer=taming_vqgan(State(first, state.source), settings.section("first_stage_config")),
        label_dropout=0.0,
        **options,
    )


def _classes(settings: Settings, vocab_size: int) -> list[int]:
    """Return the ids whose embeddings are those of the classes: of one that stands for none, where there are none.

    Raises:
        ValueError: neither classes nor their absence are given, or an id that there is not.
    """
    nothing = settings.word("cond_stage_config", (_NO_CLASSES,))
    if settings.take("unconditional", False) or nothing is not None:
        settings.without_effect("a model without classes has no stage for them", "cond_stage_config")
        start = settings.take("sos_token", 0)
        if not 0 <= start < vocab_size:
            raise ValueError(f"sos_token={start} in reference_config must lie in [0, {vocab_size}): it is an id")
        return [start]
    settings.without_effect("it begins a model without classes", "sos_token")
    stage = settings.section("cond_stage_config")
    stage.class_name("Labelator", ("Labelator",))
    stage.without_effect("it is about the code of the reference", "quantize_interface")
    count = stage.optional("n_classes", int)
    if count is None:
        raise ValueError(
            "the tensors do not tell how many classes there are: give reference_config the published YAML, or "
            f"cond_stage_config: {{n_classes: ...}}, or cond_stage_config: {_NO_CLASSES}"
        )
    if not 0 < count <= vocab_size:
        raise ValueError(f"n_classes={count} in reference_config must lie in [1, {vocab_size}]: classes are ids")
    return list(range(count))


def _order(state: State, settings: Settings, length: int) -> tuple[tuple[int, int], list[int] | None]:
    """Return the grid and the order of its positions; None for the raster order.

    Raises:
        ValueError: no permuter of taming's, another grid than that of the tensors, or another order.
    """
    permuter = settings.section("permuter_config")
    name = permuter.class_name("Identity", ("Identity", *PERMUTERS))
    saved = state.get("permuter.forward_shuffle_idx")
    if name == "Identity":
        if saved is None:
            return square(state, length), None
        order = saved.tolist()
        if sorted(order) != list(range(length)):
            raise ValueError(f"{state.source!r} has a permuter that is no order of its {length} positions")
        return square(state, length), order
    side = square(state, length)[0] if "H" not in permuter or "W" not in permuter else 0
    height, width = permuter.take("H", side), permuter.take("W", side)
    if height * width != length:
        raise ValueError(
            f"reference_config has permuter_config.H={height}, W={width}, but the tensors have {length} tokens"
        )
    order = PERMUTERS[name](height, width).flatten().tolist()
    if saved is not None and saved.tolist() != order:
        raise ValueError(f"reference_config has the permuter {name}, but the tensors have another order")
    return (height, width), order


def _subsample(height: int, width: int) -> np.ndarray:
    """One of four neighbours first, at every scale: the four of a block of the coarsest scale begin."""
    places = np.arange(height * width).reshape(1, height, width)
    while min(height, width) > 1:
        if height % 2 or width % 2:
            raise ValueError(f"the permuter Subsample halves both sides of {height} x {width}, down to 1")
        height, width = height // 2, width // 2
        places = places.reshape(-1, height, 2, width, 2).transpose(0, 2, 4, 1, 3).reshape(-1, height, width)
    if height != width:
        raise ValueError("the permuter Subsample needs a square grid")
    return places


def _z_curve(height: int, width: int) -> np.ndarray:
    """By Morton's number: the bits of row and column in turn, the row's first."""
    bits = np.arange(max(height, width).bit_length())
    row, column = (((np.arange(side)[:, None] >> bits & 1) << 2 * bits).sum(axis=1) for side in (height, width))
    return (2 * row[:, None] + column).argsort(axis=None, kind="stable")


def _spiral_out(height: int, width: int) -> np.ndarray:
    """From the middle outwards: up, right, down, left, one step longer after every two."""
    if height != width or width % 2:
        raise ValueError(f"a spiral needs a square grid of even sides, got {height} x {width}")
    row, column, places = width // 2, width // 2 - 1, []
    steps = ((-1, 0), (0, 1), (1, 0), (0, -1))
    for turn in range(2 * width):
        for _ in range(turn // 2 + 1):
            places.append(row * width + column)
            row, column = row + steps[turn % 4][0], column + steps[turn % 4][1]
    return np.array(places[: width**2])


def _alternate(height: int, width: int) -> np.ndarray:
    """Rows in turn, every second one from right to left."""
    places = np.arange(height * width).reshape(height, width)
    places[1::2] = places[1::2, ::-1]
    return places


PERMUTERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "Subsample": _subsample,
    "ZCurve": _z_curve,
    "SpiralOut": _spiral_out,
    "SpiralIn": lambda height, width: _spiral_out(height, width)[::-1],
    "Random": lambda height, width: np.random.RandomState(1).permutation(height * width),
    "AlternateParsing": _alternate,
}
"""taming's orders, by the names of its classes: the position in the grid `(H, W)` of each token in turn."""


def _visible_start(state: State, arguments: Settings, length: int) -> int:
    """Return how many elements at the beginning see each other both ways, from the saved masks.

    Raises:
        ValueError: the configuration says another number than the masks, or they are of another kind.
    """
    masks = [value for name, value in state.items() if name.endswith(".attn.mask")]
    if not masks:
        return arguments.take("n_unmasked", 0)
    count = int(masks[0][0, 0, 0].sum())
    mask = torch.ones(length, length).tril()
    mask[:count, :count] = 1
    if any(not torch.equal(other[0, 0].float(), mask) for other in masks):
        raise ValueError(f"{state.source!r} has an 'attn.mask' that is not causal behind its first elements")
    # One element sees itself in any case.
    given = arguments.take("n_unmasked", count)
    if max(given, 1) != max(count, 1):
        raise ValueError(f"reference_config has n_unmasked={given}, but the tensors have {count if count > 1 else 0}")
    return 0 if count <= 1 else count
