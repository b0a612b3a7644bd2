"""CompVis/taming-transformers and CompVis/latent-diffusion: the VQGANs."""

from typing import Any

from discrete_lit.pretrained.convolutional import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register

LAYOUT = ConvLayout()
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
def taming_vqgan(state: State, reference: Reference) -> Conversion:
    """`last.ckpt` of taming's VQGANs, `model.ckpt` of LDM's first stages."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"n_embed": codebook_size, "embed_dim": code_dim})
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        # The published models were trained with beta on the codebook term.
        weighted_term="codebook",
    )
    return Conversion(
        vqgan(network(state, reference), quantizer), state, LAYOUT.renaming(LAYOUT.levels(state), [CODES]), DROPPED
    )


@register(
    "taming_gumbelvq",
    marks=(*MARKS, "quantize.embed.weight", "quantize.proj.weight"),
    wrappers=WRAPPERS,
)
def taming_gumbelvq(state: State, reference: Reference) -> Conversion:
    """`last.ckpt` of `vqgan_gumbel_f8`."""
    codebook_size, code_dim = state["quantize.embed.weight"].shape
    agree(reference, {"n_embed": codebook_size, "embed_dim": code_dim})
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.GumbelQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "kl_weight": reference.get("kl_weight", 1e-8),
            "temperature": 0.9,
            "hard": True,
        },
    }
    codes = [
        ("quantizer.codes", "quantize.embed.weight"),
        ("quantizer.to_logits.{rest}", "quantize.proj.{rest}"),
    ]
    config = vqgan(network(state, reference), quantizer)
    return Conversion(config, state, LAYOUT.renaming(LAYOUT.levels(state), codes), DROPPED, kept=("quantizer.steps",))


def network(state: State, reference: Reference) -> dict[str, Any]:
    """The configuration of the network of tensors in taming's layout."""
    config = LAYOUT.network(state)
    sizes = config["init_args"]
    found = {"ch": "channels", "ch_mult": "multipliers", "num_res_blocks": "blocks", "z_channels": "z_channels"}
    agree(reference.get("ddconfig", {}), {theirs: sizes[ours] for theirs, ours in found.items() if ours in sizes})
    return config


def vqgan(network: dict[str, Any], quantizer: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a `VQGAN`."""
    return {"class_path": "discrete_lit.tokenizers.VQGAN", "init_args": {"network": network, "quantizer": quantizer}}


def vector_quantizer(codebook_size: int, code_dim: int, **settings: Any) -> dict[str, Any]:
    """The configuration of a `VectorQuantizer` whose codes were trained by gradient, as those at `CODES` were."""
    trained = {"codebook_update": "gradient", "codebook_init": "uniform"}
    return {
        "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
        "init_args": {"codebook_size": codebook_size, "dim": code_dim, **trained, **settings},
    }
