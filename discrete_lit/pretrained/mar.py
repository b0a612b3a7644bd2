"""MAR's tokenizer, of LTH14/mar: KL-16, the continuous autoencoder of latent diffusion."""

from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import DROPPED, LAYOUT, MARKS, same_network

# It stands in MAR's training code, not in its file.
_SCALE_FACTOR = 0.2325
# LDM's weight is 1e-6 of a sum over the 3 x 256 x 256 numbers of an image.
_KL_WEIGHT = 1e-6 / (3 * 256 * 256)


@register(
    "mar_kl_vae",
    marks=(*MARKS, "!quantize.embedding.weight", "!quantize.embed.weight"),
    wrappers=("model", "state_dict"),
)
def mar_kl_vae(state: State, settings: Settings) -> Conversion:
    """Convert `kl16.ckpt`, or another KL autoencoder of LDM with its `scale_factor` in the reference configuration."""
    moments, dim = state["quant_conv.weight"].shape[0], state["post_quant_conv.weight"].shape[1]
    if moments != 2 * dim:
        raise ValueError(f"{state.source!r} has {moments} moments for {dim} latent channels, not twice as many")
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    settings.class_name("AutoencoderKL", ("AutoencoderKL",))
    settings.agree({"embed_dim": dim, "ch_mult": sizes["multipliers"]})
    settings.agree({"use_variational": True}, "every model that is read has")
    settings.without_effect(
        "it is about the loss and the data of the training, of which ours has settings of its own",
        *("lossconfig", "image_key", "colorize_nlabels"),
    )
    encoder = settings.section("ddconfig")
    encoder.agree({"double_z": True}, "a model with mean and variance has")
    same_network(sizes, encoder)
    if sizes["z_channels"] == dim:
        # The convolution before the moments is then twice as wide as the one behind the latents.
        del sizes["z_channels"]
    config = {
        "class_path": "discrete_lit.tokenizers.KLVAE",
        "init_args": {
            "network": network,
            "latent_channels": dim,
            "kl_weight": _KL_WEIGHT,
            "scale_factor": settings.take("scale_factor", _SCALE_FACTOR),
        },
    }
    return Conversion(config=config, tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state)), dropped=DROPPED)
