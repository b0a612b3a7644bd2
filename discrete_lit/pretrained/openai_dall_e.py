"""openai/DALL-E: the dVAE, the discrete tokenizer of DALL-E.

It is published as two pickled modules, `encoder.pkl` and `decoder.pkl`, which only their own code opens. In a process
that has the package `dall_e`, one file of weights is made of both:

    parts = {part: torch.load(f"{part}.pkl", weights_only=False) for part in ("encoder", "decoder")}
    names = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    safetensors.torch.save_file(names, "dalle_dvae.safetensors")
"""

from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_GROUP = "blocks.group_{group}.block_{block}"
_EVERY = "the published models have"


def _codes(weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The codes of a 1x1 convolution of one-hot ids."""
    return [weight[:, :, 0, 0].T + bias]


@register("dalle_dvae", marks=("encoder.blocks.input.w", "decoder.blocks.input.w", "encoder.blocks.output.conv.w"))
def dalle_dvae(state: State, settings: Settings) -> Conversion:
    """Convert both modules of DALL-E's dVAE in one file, with their names behind `encoder.` and `decoder.`."""
    channels, image_channels = state["encoder.blocks.input.w"].shape[:2]
    vocab_size, latent_dim = state["encoder.blocks.output.conv.w"].shape[:2]
    code_dim = len(state["decoder.blocks.input.w"])
    blocks = sum(name.startswith("encoder.blocks.group_1.") and name.endswith("conv_1.w") for name in state)
    settings.agree({"n_hid": channels, "n_init": code_dim, "n_blk_per_group": blocks, "vocab_size": vocab_size})
    settings.agree({"input_channels": image_channels, "output_channels": image_channels})
    settings.agree({"group_count": 4}, _EVERY)
    settings.without_effect("it says how the reference computes", "device", "requires_grad", "use_mixed_precision")
    rules = [
        ("quantizer.codes", "decoder.blocks.input.codes"),
        *_with_weight_and_bias("quantizer.to_logits", "encoder.blocks.output.conv"),
        *_with_weight_and_bias("network.conv_in", "encoder.blocks.input"),
        *_with_weight_and_bias("network.conv_out", "decoder.blocks.output.conv"),
    ]
    for half in ("encoder", "decoder"):
        ours, theirs = f"network.{half}.group_{{group}}.block_{{block}}", f"{half}.{_GROUP}"
        rules += _with_weight_and_bias(f"{ours}.shortcut", f"{theirs}.id_path")
        rules += _with_weight_and_bias(f"{ours}.residual.conv_{{place}}", f"{theirs}.res_path.conv_{{place}}")
    network = {
        "class_path": "discrete_lit.tokenizers.networks.DALLEAutoencoder",
        "init_args": {"image_channels": image_channels, "channels": channels, "blocks": blocks},
    }
    return Conversion(
        config={
            "class_path": "discrete_lit.tokenizers.DVAE",
            "init_args": {
                "network": network,
                "codebook_size": vocab_size,
                "code_dim": code_dim,
                "latent_dim": latent_dim,
            },
        },
        tensors=arrange(
            state,
            [Arrangement([f"decoder.blocks.input.{part}" for part in "wb"], ["decoder.blocks.input.codes"], _codes)],
        ),
        renaming=Renaming(rules),
        kept=("quantizer.steps",),
    )


def _with_weight_and_bias(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.weight", f"{theirs}.w"), (f"{ours}.bias", f"{theirs}.b")]
