"""FoundationVision/VAR: its multi-scale tokenizer."""

from discrete_lit.pretrained.convolutional import ConvLayout
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, register
from discrete_lit.pretrained.taming import CODES, MARKS

LAYOUT = ConvLayout(query_key_value="qkv")
# At 256 pixels. The file knows their number alone: at 512 pixels it is used with 1, 2, 3, 4, 6, 9, 13, 18, 24, 32.
_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# A running mean of how often each scale takes each id.
DROPPED = ("quantize.ema_vocab_hit_SV",)


@register("var_vqvae", marks=(*MARKS, "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"))
def var_vqvae(state: State, reference: Reference) -> Conversion:
    """`vae_ch160v4096z32.pth`; `v_patch_nums` of the reference configuration chooses another image size."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = {"vocab_size": codebook_size, "z_channels": code_dim, "ch": network["init_args"]["channels"]}
    agree(reference, sizes)
    scales = reference.get("v_patch_nums")
    if scales is None and len(state["quantize.ema_vocab_hit_SV"]) != len(_SCALES):
        raise ValueError(
            f"{state.source!r} has {len(state['quantize.ema_vocab_hit_SV'])} scales: give their sides as v_patch_nums "
            "in reference_config"
        )
    config = {
        "class_path": "discrete_lit.tokenizers.MultiScaleVQ",
        "init_args": {
            "network": network,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "scales": list(_SCALES if scales is None else scales),
            "phi_kernels": state.count("quantize.quant_resi.qresi_ls.{}"),
            "phi_ratio": reference.get("quant_resi", 0.5),
            "commitment_weight": reference.get("beta", 0.25),
            "codebook_init": "uniform",
        },
    }
    rules = [CODES, ("quantizer.phi.{kernel}.{rest}", "quantize.quant_resi.qresi_ls.{kernel}.{rest}")]
    return Conversion(config, state, LAYOUT.renaming(LAYOUT.levels(state), rules), DROPPED)
