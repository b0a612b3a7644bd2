"""TencentARC/SEED-Voken: Open-MAGVIT2's lookup-free tokenizers of images and of video, IBQ, and their generators.

The tokenizers' files hold the trained weights and their EMA, under `model_ema.` and the name without its dots. The
published numbers are those of the EMA; `use_ema: false` in the reference configuration takes the trained weights.

The generators' files hold the tokenizer beside the generator, which alone is read: load the tokenizer by itself.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Conversion, Tokens, register, reorder_chunks
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    ConvLayout,
    class_count,
    generator_conversion,
    given_length,
    head_count,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.llamagen import LLAMA_BLOCK, check_hidden
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_MEAN = "model_ema."
DROPPED = (*taming.DROPPED, "model_ema.decay", "model_ema.num_updates", "model_ema.loss*")
MAGVIT2 = ConvLayout(middle="mid_block.{index}", downsample="downsample", upsample="upsample.conv1")
_MAGVIT2_NETWORK = {"downsampling": "symmetric", "upsampling": "depth_to_space", "adaptive_norm": True}


@register(
    "magvit2_lfq",
    marks=("encoder.down.0.block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    wrappers=taming.WRAPPERS,
)
def magvit2_lfq(state: State, settings: Settings) -> Conversion:
    """Convert `imagenet_256_L.ckpt`, `imagenet_128_L.ckpt`, or one of the pretrained tokenizers."""
    settings.without_effect(
        "it says how ids are split for a generator; ours are whole", "token_factorization", "factorized_bits"
    )
    network = MAGVIT2.network(state, **_MAGVIT2_NETWORK)
    return _lookup_free(chosen_weights(state, settings), settings, network, levels=MAGVIT2.levels(state))


_CONVOLUTION = ".conv_1"


@register(
    "magvit2_video",
    marks=("encoder.down.0.block.0.conv1.conv_1.weight", "decoder.adaptive.0.gamma.weight"),
    wrappers=taming.WRAPPERS,
)
def magvit2_video(state: State, settings: Settings) -> Conversion:
    """Convert `video_128_262144.ckpt`, which tokenizes clips of 1 + 4k frames, and images.

    Its convolutions look back only, but its norms see all frames of a clip: the ids of a frame depend on later ones.
    `causal: true` in the reference configuration lets them see a frame each. Then they do not, and the ids are others
    than the published model's: the weights are a start for a training of it.
    """
    # Named as those of images; every convolution has one more part in its name.
    chosen = {name.replace(_CONVOLUTION, ""): value for name, value in chosen_weights(state, settings).items()}
    named = State({name.replace(_CONVOLUTION, ""): value for name, value in state.items()}, state.source)
    network = MAGVIT2.network(named, **_MAGVIT2_NETWORK, dims=3, clip_start="zeros")
    sizes = network["init_args"]
    # A level whose width is the first one's is halved in space alone.
    sizes["time_levels"] = [level for level, times in enumerate(sizes["multipliers"][:-1]) if times != 1]
    sizes["causal"] = True if settings.take("causal", False) else "convolutions"
    settings.without_effect("it is about the training", "image_pretrain_path", "resume_lr", "monitor")
    return _lookup_free(chosen, settings, network, levels=MAGVIT2.levels(named))


def _lookup_free(
    tensors: Mapping[str, Tensor], settings: Settings, network: dict[str, Any], *, levels: int
) -> Conversion:
    """Return the conversion of an LFQ tokenizer in the layout of images."""
    bits = len(tensors["encoder.conv_out.weight"])
    settings.class_name("VQModel", ("VQModel",))
    settings.agree({"n_embed": 2**bits, "embed_dim": bits})
    arguments = settings.section("ddconfig")
    arguments.agree({"double_z": False}, "a model with a codebook has")
    taming.same_network({**network["init_args"], "z_channels": bits}, arguments)
    losses = _losses(settings)
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.LookupFreeQuantizer",
        "init_args": {
            "bits": bits,
            "commitment_weight": losses.take("commit_weight", 0.25),
            **_entropy_weights(settings, losses.take("codebook_weight", 0.1)),
            "entropy_log_offset": 1e-5,
            "bit_order": "first_least_significant",
        },
    }
    return Conversion(
        config=taming.vqgan(network, quantizer),
        tensors=tensors,
        renaming=MAGVIT2.renaming(levels),
        dropped=DROPPED,
        kept=("quantizer.shifts",),
    )


@register(
    "ibq",
    marks=(*taming.MARKS, "quantize.embedding.weight", "encoder.mid.attn_1.q.weight", "!quantize.ema_vocab_hit_SV"),
    wrappers=taming.WRAPPERS,
)
def ibq(state: State, settings: Settings) -> Conversion:
    """Convert `imagenet256_{1024,8192,16384,262144}.ckpt`, or one of the pretrained tokenizers."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    settings.class_name("IBQ", ("IBQ",))
    settings.agree({"n_embed": codebook_size, "embed_dim": code_dim})
    settings.agree({"l2_normalize": False, "cosine_similarity": False, "remap": None}, "every published IBQ has")
    settings.without_effect("it says how ids are shaped; ours are grids", "sane_index_shape")
    losses = _losses(settings)
    entropy_weight = losses.take("entropy_loss_weight", 0.05)
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.IndexBackpropagationQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "codebook_weight": settings.take("beta", 0.25),
            **_entropy_weights(settings, entropy_weight if settings.take("use_entropy_loss", True) else 0.0),
            "entropy_temperature": settings.take("entropy_temperature", 0.01),
        },
    }
    config = taming.vqgan(taming.network(state, settings), quantizer)
    renaming = taming.LAYOUT.renaming(taming.LAYOUT.levels(state), [("quantizer.codes", "quantize.embedding.weight")])
    return Conversion(config=config, tensors=chosen_weights(state, settings), renaming=renaming, dropped=DROPPED)


def _losses(settings: Settings) -> Settings:
    """Read what is said of the training, and return the weights of its losses, those of the quantizer unread."""
    settings.without_effect(
        "it is about the training",
        *("image_key", "colorize_nlabels", "stage", "scheduler_type", "min_learning_rate", "warmup_epochs"),
        *("lr_drop_epoch", "lr_drop_rate", "lr_drop_iter", "gradient_clip_val", "use_shared_epoch", "sche_type"),
        *("wpe", "wp", "wp0", "wp_iter", "max_iter"),
    )
    losses = settings.section("lossconfig")
    losses.without_effect(
        "ours trains with losses of its own settings beside those of the quantizer",
        *("target", "logvar_init", "pixelloss_weight", "perceptual_weight", "use_actnorm", "quant_loss_weight"),
        *("disc_conditional", "disc_in_channels", "disc_start", "disc_weight", "disc_factor", "disc_ndf", "disc_loss"),
        *("disc_num_layers", "gen_loss_weight", "lecam_loss_weight"),
        *("codebook_enlarge_ratio", "codebook_enlarge_steps", "use_blur", "blur_resample", "blur_kernel_size"),
        *("disc_num_channels", "disc_num_stages", "disc_hidden_channels"),
    )
    return losses


def _entropy_weights(settings: Settings, weight: float) -> dict[str, float]:
    """Return our weights of both entropies; where the reference has w_s and w_b, the second is w_b / w_s of ours.

    Raises:
        ValueError: only the entropy of a batch has a weight, which ours cannot express.
    """
    of_sample = settings.take("sample_minimization_weight", 1.0)
    of_batch = settings.take("batch_maximization_weight", 1.0)
    if not of_sample and of_batch:
        raise ValueError(
            "reference_config has sample_minimization_weight=0, which is read with batch_maximization_weight=0 alone"
        )
    return {
        "entropy_weight": weight * of_sample,
        "batch_entropy_weight": of_batch / of_sample if of_sample else 1.0,
    }


def chosen_weights(state: State, settings: Settings) -> dict[str, Tensor]:
    """Return the EMA weights under the names of the trained ones, or the trained weights if `use_ema` is false.

    A file without EMA weights gives the trained ones.

    Raises:
        ValueError: a weight has no EMA.
    """
    trained = {name: value for name, value in state.items() if not name.startswith(_MEAN)}
    if not settings.take("use_ema", True):
        return trained
    if len(trained) == len(state):
        if "use_ema" in settings:
            raise ValueError(f"reference_config has use_ema=True, but {state.source!r} has no EMA weights")
        return trained
    chosen = {name: value for name, value in state.items() if name.startswith(_MEAN)}
    for name, value in trained.items():
        if any(fnmatchcase(name, pattern) for pattern in taming.DROPPED):
            chosen[name] = value
        else:
            mean = _MEAN + name.replace(".", "")
            if mean not in state:
                raise ValueError(f"{state.source!r} has {name!r} but not its running mean {mean!r}")
            chosen[name] = chosen.pop(mean)
    return chosen


_PUBLISHED_LENGTH = 256
# Guidance scales and temperatures of the published evaluation, by the number of blocks: of both sub-tokens of
# Open-MAGVIT2, and of IBQ, of which one is read.
_MAGVIT2_SAMPLING = {24: ((1.9, 1.0), (2.0, 1.0)), 36: ((1.9, 1.1), (1.9, 1.0)), 48: ((1.75, 1.1), (1.85, 1.0))}
_IBQ_SAMPLING = {16: (2.25, 1.1), 20: (2.0, 1.0), 24: (2.35, 1.15), 30: (2.85, 1.2)}
_CLASSES = ("class_embedding.weight", "class_emb.embedding_table.weight")


@register(
    "open_magvit2_ar",
    marks=("pre_emb.weight", "post_emb.weight", "factorized_blocks.0.attention.wqkv.weight"),
    wrappers=taming.WRAPPERS,
)
def open_magvit2_ar(state: State, settings: Settings) -> Conversion:
    """Convert `AR_256_{B,L,XL}.ckpt` of Open-MAGVIT2.

    Ids are the two sub-tokens joined, the first the less significant: those of `magvit2_lfq`. Nothing in the file tells
    the number of tokens, 256 but for another `block_size` in the reference configuration.
    """
    sizes = [len(state["pre_emb.weight"]), len(state["post_emb.weight"])]
    depths = {name: state.count(f"{name}_blocks.{{}}") for name in ("spatial", "factorized")}
    arguments = _gpt_arguments(settings)
    settings.agree({"token_factorization": True}, "a model of two sub-tokens has")
    arguments.agree({"token_factorization": True}, "a model of two sub-tokens has")
    arguments.agree(
        {
            "spatial_n_layer": depths["spatial"],
            "factorized_n_layer": depths["factorized"],
            "factorized_bits": [size.bit_length() - 1 for size in sizes],
        }
    )
    arguments.without_effect("nothing reads it where ids have sub-tokens", "vocab_size")
    backbone = _gpt(state, arguments, "spatial_blocks.{}", len(state["pre_emb.weight"][0]))
    backbone |= {
        "token_embedding": "parts",
        "place_head": {
            "class_path": "discrete_lit.backbones.FactorisedHead",
            "init_args": {
                "sizes": sizes,
                "depth": depths["factorized"],
                "start_rotation": "zero",
                "shared_tables": True,
            },
        },
    }
    published = _MAGVIT2_SAMPLING.get(depths["spatial"], ((1.0, 1.0), (1.0, 1.0)))
    parts = [{"guidance_scale": scale, "temperature": temperature} for scale, temperature in published]
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(sizes[0] * sizes[1], square(state, given_length(arguments, _PUBLISHED_LENGTH))),
        num_classes=_classes(state, arguments),
        backbone=backbone,
        rules=[
            _CLASSES,
            ("token_embedding.tables.0.weight", "pre_emb.weight"),
            ("token_embedding.tables.1.weight", "post_emb.weight"),
            *in_blocks("spatial_blocks.{block}", LLAMA_BLOCK),
            *in_blocks("factorized_blocks.{block}", LLAMA_BLOCK, ours="place_head.blocks.{block}"),
            ("place_head.norm.weight", "norm.weight"),
            ("place_head.heads.{part}.project.weight", "head.{part}.weight"),
        ],
        sampler=sampled_by("OpenMAGVIT2Sampler", parts=parts),
        label_dropout=0.1,
    )


@register(
    "ibq_ar",
    marks=("tok_emb.weight", "class_emb.embedding_table.weight", "head_nm.rmsnorm.weight"),
    wrappers=taming.WRAPPERS,
)
def ibq_ar(state: State, settings: Settings) -> Conversion:
    """Convert `AR_256_{B,L,XL,XXL}.ckpt` of IBQ.

    Nothing in the file tells the number of tokens, 256 but for another `block_size` in the reference configuration.
    """
    vocab_size, width = state["tok_emb.weight"].shape
    depth = state.count("blocks.{}")
    arguments = _gpt_arguments(settings)
    arguments.agree({"vocab_size": vocab_size, "n_layer": depth, "n_embd": width})
    arguments.agree({"shared_aln": False, "use_pretrained_codebook": False}, "every published model has")
    arguments.without_effect("it says how the weights of the modulation began", "alng")
    backbone = _gpt(state, arguments, "blocks.{}", width)
    backbone |= {"conditioning": "prefix_adaln", "norm_affine": True}
    scale, temperature = _IBQ_SAMPLING.get(depth, (1.0, 1.0))
    return generator_conversion(
        "Autoregressive",
        state,
        tokens=Tokens(vocab_size, square(state, given_length(arguments, _PUBLISHED_LENGTH))),
        num_classes=_classes(state, arguments),
        backbone=backbone,
        rules=[
            _CLASSES,
            ("token_embedding.table.weight", "tok_emb.weight"),
            *in_blocks("blocks.{block}", [*LLAMA_BLOCK, ("modulation.project.{rest}", "ada_lin.1.{rest}")]),
            ("final_norm.weight", "head_nm.rmsnorm.weight"),
            ("final_modulation.project.{rest}", "head_nm.ada_lin.1.{rest}"),
            ("head.project.weight", "head.weight"),
        ],
        arrangements=[
            # Theirs are two gates, two scales and two shifts, as VAR's; and before the head scale, then shift.
            reorder_chunks("blocks.{block}.ada_lin.1.{rest}", (4, 2, 0, 5, 3, 1)),
            reorder_chunks("head_nm.ada_lin.1.{rest}", (1, 0)),
        ],
        sampler=sampled_by("RasterSampler", guidance_scale=scale, temperature=temperature),
        label_dropout=0.1,
    )


def _gpt_arguments(settings: Settings) -> Settings:
    """Return the arguments of a generator's transformer: a part of the published configuration, or all of it."""
    settings.class_name("Net2NetTransformer", ("Net2NetTransformer", "GPT"))
    settings.without_effect(
        "the tokenizer is loaded by itself, and compares it", "first_stage_config", "cond_stage_config"
    )
    settings.without_effect(
        "it is about the training",
        *("first_stage_key", "cond_stage_key", "permuter_config", "pkeep", "sos_token", "unconditional"),
        *("downsample_cond_size", "wpe", "wp", "wp0", "twde", "max_iter", "wp_iter", "scheduler_type", "use_ema"),
    )
    arguments = settings.section("transformer_config") if "transformer_config" in settings else settings
    if arguments is not settings:
        arguments.class_name("GPT", ("GPT",))
    arguments.without_effect(
        IN_TRAINING,
        *("token_drop", "resid_dropout_p", "ffn_dropout_p", "attn_dropout_p", "drop_path_rate", "initializer_range"),
        *("class_dropout_prob", "embd_pdrop", "n_unmasked"),
    )
    return arguments


def _gpt(state: State, arguments: Settings, blocks: str, width: int) -> dict[str, Any]:
    """Return what the transformers of both have in common: LlamaGen's."""
    hidden = len(state[f"{blocks.format(0)}.feed_forward.w1.weight"])
    arguments.agree({"dim": width, "cond_dim": width})
    check_hidden(arguments, width, hidden)
    return {
        "width": width,
        "depth": state.count(blocks),
        "heads": head_count(arguments, "n_head", max(1, width // 64), width),
        "mlp_hidden": hidden,
        "mlp": "swiglu",
        "norm": "rms",
        "norm_epsilon": arguments.take("norm_eps", 1e-5),
        "positions": "rope_2d",
        "start_rotation": "zero",
        "bias": False,
    }


def _classes(state: State, arguments: Settings) -> int:
    number = class_count(state, state[_CLASSES[1]])
    arguments.agree({"class_num": number})
    return number
