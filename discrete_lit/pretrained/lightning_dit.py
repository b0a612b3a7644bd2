"""VA-VAE, of hustvl/LightningDiT: the KL autoencoder whose latents are aligned with a frozen vision network."""

from typing import Any

from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.layouts import IN_TRAINING
from discrete_lit.pretrained.reading import State, read_state
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import DROPPED, LAYOUT, MARKS, same_network

# The frozen networks that the published models are aligned with, by `use_vf`.
_NETWORKS = {"dinov2": "vit_large_patch14_dinov2.lvd142m", "mae": "vit_large_patch16_224.mae"}
_PROJECTION = "linear_proj.weight"


@register(
    "va_vae",
    marks=(*MARKS, "!quantize.embedding.weight", "!quantize.embed.weight"),
    wrappers=("state_dict",),
)
def va_vae(state: State, settings: Settings) -> Conversion:
    """Convert `vavae-imagenet256-f16d32-dinov2.pt`.

    The statistics of its latents are in a file of their own: `latents_stats` in the reference configuration is the path
    of `latents_stats.pt`. Without it latents are not normalised, and generators refuse their scale.
    """
    moments, dim = state["quant_conv.weight"].shape[0], state["post_quant_conv.weight"].shape[1]
    if moments != 2 * dim:
        raise ValueError(f"{state.source!r} has {moments} moments for {dim} latent channels, not twice as many")
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    settings.class_name("AutoencoderKL", ("AutoencoderKL",))
    settings.agree({"embed_dim": dim, "ch_mult": sizes["multipliers"]})
    settings.without_effect("it is about the data of the training", "image_key", "colorize_nlabels")
    encoder = settings.section("ddconfig")
    encoder.agree({"double_z": True}, "a model with mean and variance has")
    same_network(sizes, encoder)
    pixels = sizes["image_channels"] * (encoder.optional("resolution", int) or 256) ** 2
    if sizes["z_channels"] == dim:
        # The convolution before the moments is then twice as wide as the one behind the latents.
        del sizes["z_channels"]
    losses = settings.section("lossconfig")
    init_args: dict[str, Any] = {
        "network": network,
        "latent_channels": dim,
        # A sum over the numbers of an image there is a mean here.
        "kl_weight": losses.take("kl_weight", 1e-6) / pixels,
        "scale_factor": settings.take("latent_multiplier", 1.0),
        **_statistics(settings, dim),
        **_alignment(state, settings, losses),
    }
    losses.class_name("LPIPSWithDiscriminator", ("LPIPSWithDiscriminator",))
    losses.without_effect(
        IN_TRAINING,
        *("disc_start", "disc_weight", "disc_num_layers", "disc_in_channels", "disc_factor", "disc_loss"),
        *("perceptual_weight", "pixelloss_weight", "logvar_init", "pp_style", "use_actnorm", "disc_conditional"),
    )
    # Projected latents meet features without a bias; features that are projected have one.
    rules = [("alignment.projection.{rest}", "linear_proj.{rest}")]
    return Conversion(
        config={"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": init_args},
        tensors=state,
        renaming=LAYOUT.renaming(LAYOUT.levels(state), rules),
        dropped=(*DROPPED, "foundation_model.*"),
    )


def _statistics(settings: Settings, dim: int) -> dict[str, Any]:
    """Return the mean and deviation of each channel, of the file that `latents_stats` names.

    Raises:
        ValueError: no such file, or one without a mean and a deviation for each channel.
    """
    path = settings.optional("latents_stats", str)
    if path is None:
        return {}
    found = read_state(path)
    for name in ("mean", "std"):
        if found[name].numel() != dim:
            raise ValueError(
                f"reference_config has latents_stats={path!r}, whose {name} has {found[name].numel()} numbers for "
                f"{dim} latent channels"
            )
    return {f"latent_{name}": found[name].flatten().tolist() for name in ("mean", "std")}


def _alignment(state: State, settings: Settings, losses: Settings) -> dict[str, Any]:
    """Return the configuration of the alignment loss, where the file has its projection."""
    if _PROJECTION not in state:
        because = "the file has no projection, so nothing that the latents are aligned with"
        settings.without_effect(because, "use_vf", "reverse_proj", "vf_feature_dim", "proj_fix")
        losses.without_effect(because, "vf_weight", "adaptive_vf", "distmat_margin", "cos_margin", "distmat_weight")
        losses.without_effect(because, "cos_weight")
        return {}
    given, taken = state[_PROJECTION].shape[1], state[_PROJECTION].shape[0]
    reverse = settings.take("reverse_proj", True)
    feature_dim = taken if reverse else given
    said = settings.optional("vf_feature_dim", int)
    if said is not None and said != feature_dim:
        raise ValueError(
            f"reference_config has vf_feature_dim={said}, but with reverse_proj={reverse} the tensors have "
            f"{feature_dim}"
        )
    settings.agree({"proj_fix": False}, "every model that is read has")
    losses.agree({"distmat_weight": 1.0, "cos_weight": 1.0}, "every model that is read has")
    model_name = _NETWORKS[settings.take("use_vf", "dinov2", tuple(_NETWORKS))]
    return {
        "alignment_loss": {
            "class_path": "discrete_lit.tokenizers.losses.AlignmentLoss",
            "init_args": {
                "model_name": model_name,
                # Where training looks for them; nothing else does.
                "weights_path": f"weights/{model_name}.safetensors",
                "weight": losses.take("vf_weight", 0.1),
                "cosine_margin": losses.take("cos_margin", 0.5),
                "distance_margin": losses.take("distmat_margin", 0.25),
                "adaptive": losses.take("adaptive_vf", True),
                "project": "latents" if reverse else "features",
                "feature_dim": feature_dim,
            },
        }
    }
