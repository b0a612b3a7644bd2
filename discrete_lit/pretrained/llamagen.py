"""FoundationVision/LlamaGen: its tokenizers."""

from discrete_lit.pretrained.convolutional import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register
from discrete_lit.pretrained.taming import CODES, vqgan

LAYOUT = ConvLayout(
    encoder_level="encoder.conv_blocks.{level}",
    decoder_level="decoder.conv_blocks.{level}",
    block="res.{block}",
    middle="mid.{place}",
)
# A window of the ids that were last used.
DROPPED = ("quantize.codebook_used",)


@register(
    "llamagen_vq",
    marks=("encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"),
    wrappers=("ema", "model", "state_dict"),
)
def llamagen_vq(state: State, reference: Reference) -> Conversion:
    """`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, `vq_ds16_t2i.pt`; the EMA weights where a file has them."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    found = {
        "codebook_size": codebook_size,
        "codebook_embed_dim": code_dim,
        "encoder_ch_mult": sizes["multipliers"],
        "decoder_ch_mult": sizes["decoder_multipliers"],
    }
    agree(reference, found)
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.VectorQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "codebook_update": "gradient",
            "codebook_init": "uniform",
            "commitment_weight": reference.get("commit_loss_beta", 0.25),
            "normalize": reference.get("codebook_l2_norm", True),
            "entropy_weight": reference.get("entropy_loss_ratio", 0.0),
            "entropy_log_offset": 1e-5,
        },
    }
    return Conversion(vqgan(network, quantizer), state, LAYOUT.renaming(LAYOUT.levels(state), [CODES]), DROPPED)
