"""HART, of mit-han-lab/hart: the hybrid tokenizer `hart_tokenizer`, and the text-to-image generator `hart`."""

from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.layouts import IN_TRAINING
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, MARKS
from discrete_lit.pretrained.var import DROPPED, LAYOUT

# Sides of the scales at 256 pixels, VAR's; `v_patch_nums` of the published configuration says others.
_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@register("hart_tokenizer", marks=(*MARKS, "quantize.embedding.weight", "quantize.ema_vocab_hit_SV"))
def hart_tokenizer(state: State, settings: Settings) -> Conversion:
    """Convert `tokenizer/model.safetensors` of `hart-0.7b-1024px`, whose discriminator is not read."""
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    settings.agree({"vocab_size": codebook_size, "z_channels": code_dim, "ch": sizes["channels"]})
    settings.agree({"ch_mult": sizes["multipliers"]})
    phi_kernels = state.count("quantize.quant_resi.qresi_ls.{}")
    settings.agree({"share_quant_resi": phi_kernels, "quant_conv_ks": sizes["latent_kernel"]})
    settings.agree(
        {
            "using_znorm": False,
            "default_qresi_counts": 0,
            "quantizer_type": "var_hybrid",
            "hybrid": True,
            "double_decoder": False,
        },
        "the published tokenizer has",
    )
    settings.without_effect(IN_TRAINING, "dropout", "test_mode")
    settings.without_effect("it is of another quantizer of the same code", "levels", "disable_quant_resi")
    settings.without_effect("it is of Hugging Face's reader", "architectures", "model_type", "torch_dtype")
    settings.without_effect("it is the version that wrote the file", "transformers_version", "_name_or_path")
    scales = settings.take("v_patch_nums", list(_SCALES))
    hits = len(state["quantize.ema_vocab_hit_SV"])
    if "v_patch_nums" not in settings and hits != len(_SCALES):
        raise ValueError(
            f"{state.source!r} has {hits} scales: give their sides as v_patch_nums in reference_config, as its "
            "config.json does"
        )
    config = {
        "class_path": "discrete_lit.tokenizers.HybridVQ",
        "init_args": {
            "network": network,
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "scales": scales,
            "phi_kernels": phi_kernels,
            "phi_ratio": settings.take("quant_resi", 0.5),
            "commitment_weight": settings.take("beta", 0.25),
            "decoder_only": settings.take("freeze_codebook_for_hybrid", True),
            "codebook_init": "uniform",
        },
    }
    rules = [CODES, ("quantizer.phi.{kernel}.{rest}", "quantize.quant_resi.qresi_ls.{kernel}.{rest}")]
    return Conversion(
        config=config, tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state), rules), dropped=DROPPED
    )
