"""BitDance's tokenizer, of shallowdream204/BitDance: signs of many channels, around Open-MAGVIT2's network."""

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.seed_voken import DROPPED, MAGVIT2
from discrete_lit.pretrained.settings import Settings


@register(
    "bitdance_ae",
    marks=("encoder.down.0.block.0.conv1.weight", "decoder.adaptive.0.gamma.weight", "!model_ema.decay"),
    wrappers=taming.WRAPPERS,
)
def bitdance_ae(state: State, settings: Settings) -> Conversion:
    """Convert `ae_d16c32.pt`, or the tokenizer within a BitDance checkpoint.

    An id has the bits of all codebooks, the first channel's the lowest; `num_codebooks` groups of consecutive channels
    only count in training, for the entropy of a batch.
    """
    bits = state["encoder.conv_out.weight"].shape[0]
    settings.class_name("VQModel", ("VQModel",))
    settings.agree({"gan_decoder": False}, "every model that is read has")
    if state["decoder.conv_in.weight"].shape[1] != bits:
        raise ValueError(
            f"{state.source!r} has a decoder of {state['decoder.conv_in.weight'].shape[1]} channels for {bits} bits: "
            "one that takes noise too (gan_decoder) is not read"
        )
    groups = settings.take("num_codebooks", 4)
    if groups < 1 or bits % groups:
        raise ValueError(f"reference_config has num_codebooks={groups}, which does not divide the {bits} bits")
    network = MAGVIT2.network(state, downsampling="symmetric", upsampling="depth_to_space", adaptive_norm=True)
    arguments = settings.section("ddconfig")
    arguments.agree({"double_z": False}, "a model of signs has")
    taming.same_network({**network["init_args"], "z_channels": bits}, arguments)
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.LookupFreeQuantizer",
        "init_args": {"bits": bits, "entropy_groups": groups, "bit_order": "first_least_significant"},
    }
    return Conversion(
        config=taming.vqgan(network, quantizer),
        tensors=state,
        renaming=MAGVIT2.renaming(MAGVIT2.levels(state)),
        dropped=DROPPED,
        kept=("quantizer.shifts",),
    )
