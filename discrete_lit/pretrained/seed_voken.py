"""TencentARC/SEED-Voken: Open-MAGVIT2's lookup-free tokenizers and IBQ.

Their files hold the trained weights and their EMA, under `model_ema.` and the name without its dots. The published
numbers are those of the EMA; `use_ema: false` in the reference configuration takes the trained weights.
"""

from fnmatch import fnmatchcase

from torch import Tensor

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.layouts import ConvLayout
from discrete_lit.pretrained.reading import Reference, State, agree

_MEAN = "model_ema."
DROPPED = (*taming.DROPPED, "model_ema.decay", "model_ema.num_updates", "model_ema.loss*")
MAGVIT2 = ConvLayout(middle="mid_block.{index}", downsample="downsample", upsample="upsample.conv1")


@register(
    "magvit2_lfq",
    marks=("encoder.down.0.block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    wrappers=taming.WRAPPERS,
)
def magvit2_lfq(state: State, reference: Reference) -> Conversion:
    """Convert `imagenet_256_L.ckpt`, `imagenet_128_L.ckpt`, or one of the pretrained tokenizers."""
    bits = state["encoder.conv_out.weight"].shape[0]
    agree(reference, {"n_embed": 2**bits, "embed_dim": bits})
    network = MAGVIT2.network(state, downsampling="symmetric", upsampling="depth_to_space", adaptive_norm=True)
    weights = reference.get("lossconfig", {}).get("params", {})
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.LookupFreeQuantizer",
        "init_args": {
            "bits": bits,
            "commitment_weight": weights.get("commit_weight", 0.25),
            "entropy_weight": weights.get("codebook_weight", 0.1),
            "entropy_log_offset": 1e-5,
            "bit_order": "first_least_significant",
        },
    }
    config = taming.vqgan(network, quantizer)
    tensors = chosen_weights(state, reference)
    return Conversion(
        config=config,
        tensors=tensors,
        renaming=MAGVIT2.renaming(MAGVIT2.levels(state)),
        dropped=DROPPED,
        kept=("quantizer.shifts",),
    )


@register(
    "ibq",
    marks=(*taming.MARKS, "quantize.embedding.weight", "encoder.mid.attn_1.q.weight", "!quantize.ema_vocab_hit_SV"),
    wrappers=taming.WRAPPERS,
)
def ibq(state: State, reference: Reference) -> Conversion:
    """Convert `imagenet256_{1024,8192,16384,262144}.ckpt`, or one of the pretrained tokenizers."""
    if reference.get("l2_normalize", False):
        raise ValueError("reference_config has l2_normalize=True, which no published IBQ was trained with")
    codebook_size, code_dim = state["quantize.embedding.weight"].shape
    agree(reference, {"n_embed": codebook_size, "embed_dim": code_dim})
    weights = reference.get("lossconfig", {}).get("params", {})
    entropy_weight = weights.get("entropy_loss_weight", 0.05) if reference.get("use_entropy_loss", True) else 0.0
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.IndexBackpropagationQuantizer",
        "init_args": {
            "codebook_size": codebook_size,
            "dim": code_dim,
            "codebook_weight": reference.get("beta", 0.25),
            "entropy_weight": entropy_weight,
            "entropy_temperature": reference.get("entropy_temperature", 0.01),
        },
    }
    config = taming.vqgan(taming.network(state, reference), quantizer)
    renaming = taming.LAYOUT.renaming(taming.LAYOUT.levels(state), [("quantizer.codes", "quantize.embedding.weight")])
    return Conversion(config=config, tensors=chosen_weights(state, reference), renaming=renaming, dropped=DROPPED)


def chosen_weights(state: State, reference: Reference) -> dict[str, Tensor]:
    """Return the EMA weights under the names of the trained ones, or the trained weights if `use_ema` is false.

    A file without EMA weights gives the trained ones.

    Raises:
        ValueError: a weight has no EMA.
    """
    trained = {name: value for name, value in state.items() if not name.startswith(_MEAN)}
    if len(trained) == len(state) or not reference.get("use_ema", True):
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
