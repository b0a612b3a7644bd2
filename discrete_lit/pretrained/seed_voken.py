"""TencentARC/SEED-Voken: Open-MAGVIT2's lookup-free tokenizers and IBQ.

Their files hold the trained weights and their EMA, under `model_ema.` and the name without its dots. The published
numbers are those of the EMA; `use_ema: false` in the reference configuration takes the trained weights.
"""

from fnmatch import fnmatchcase

from torch import Tensor

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.layouts import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_MEAN = "model_ema."
DROPPED = (*taming.DROPPED, "model_ema.decay", "model_ema.num_updates", "model_ema.loss*")
MAGVIT2 = ConvLayout(middle="mid_block.{index}", downsample="downsample", upsample="upsample.conv1")


@register(
    "magvit2_lfq",
    marks=("encoder.down.0.block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    wrappers=taming.WRAPPERS,
)
def magvit2_lfq(state: State, settings: Settings) -> Conversion:
    """Convert `imagenet_256_L.ckpt`, `imagenet_128_L.ckpt`, or one of the pretrained tokenizers."""
    bits = state["encoder.conv_out.weight"].shape[0]
    settings.class_name("VQModel", ("VQModel",))
    settings.agree({"n_embed": 2**bits, "embed_dim": bits})
    settings.without_effect(
        "it says how ids are split for a generator; ours are whole", "token_factorization", "factorized_bits"
    )
    network = MAGVIT2.network(state, downsampling="symmetric", upsampling="depth_to_space", adaptive_norm=True)
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
    config = taming.vqgan(network, quantizer)
    return Conversion(
        config=config,
        tensors=chosen_weights(state, settings),
        renaming=MAGVIT2.renaming(MAGVIT2.levels(state)),
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
