"""MaskGIT as google-research/maskgit published it, in Flax: `maskgit_flax`, and its VQGAN `maskgit_flax_tokenizer`.

Flax numbers the layers of a kind in the order in which the code calls them, and keeps the input of a layer before its
output: both become the names and the order of the PyTorch port, whose conversion then serves the VQGAN.
"""

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, arrange, register
from discrete_lit.pretrained.layouts import (
    IN_TRAINING,
    generator_conversion,
    in_blocks,
    sampled_by,
    square,
)
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import CODES, vector_quantizer, vqgan
from discrete_lit.pretrained.titok_rar import LAYOUT

_WRAPPERS = ("params",)
_ATTENTION, _MLP = "Attention_0.self_attention", "Mlp_0"
_BLOCK = [
    ("attention.query_key_value.{rest}", f"{_ATTENTION}.{{query|key|value}}.{{rest}}"),
    ("attention.out.{rest}", f"{_ATTENTION}.out.{{rest}}"),
    ("attention_norm.{rest}", "Attention_0.attention_output_ln.{rest}"),
    ("mlp.expand.{rest}", f"{_MLP}.intermediate_output.{{rest}}"),
    ("mlp.contract.{rest}", f"{_MLP}.layer_output.{{rest}}"),
    ("mlp_norm.{rest}", f"{_MLP}.layer_output_ln.{{rest}}"),
]
_RULES = [
    ("token_embedding.table.weight", "tokens"),
    ("class_embedding.weight", "classes"),
    ("positions.embedding", "positions"),
    ("embedding_norm.{rest}", "Embed_0.embeddings_ln.{rest}"),
    *in_blocks("TransformerLayer_{block}", _BLOCK),
    ("head.transform.0.{rest}", "MlmLayer_0.mlm_dense.{rest}"),
    ("head.transform.2.{rest}", "MlmLayer_0.mlm_ln.{rest}"),
    ("head.bias", "MlmLayer_0.mlm_bias.bias"),
]


@register(
    "maskgit_flax",
    marks=("Embed_0.word_embeddings.embedding", "MlmLayer_0.mlm_bias.bias"),
    wrappers=_WRAPPERS,
    section="transformer",
)
def maskgit_flax(state: State, settings: Settings) -> Conversion:
    """Convert `maskgit_imagenet{256,512}_checkpoint`.

    Ids, classes and the mask share a table, in this order; `codebook_size` says how many are ids, 1024 by default. No
    null label was trained: it has zeros, and guidance is refused. The logits are of the ids alone.
    """
    words, places = "Embed_0.word_embeddings.embedding", "Embed_0.position_embeddings.embedding"
    width, length = state[words].shape[1], len(state[places]) - 1
    vocab_size = settings.take("codebook_size", 1024)
    classes = len(state[words]) - vocab_size - 1
    depth = state.count("TransformerLayer_{}")
    heads = state[f"TransformerLayer_0.{_ATTENTION}.query.kernel"].shape[1]
    hidden = len(state[f"TransformerLayer_0.{_MLP}.intermediate_output.bias"])
    grid = square(state, length)
    given = settings.optional("num_class", int)
    if classes < 1 or given not in (None, classes):
        raise ValueError(
            f"codebook_size={vocab_size} and num_class={given} do not fit the {len(state[words])} rows of the table of "
            f"{state.source!r}: one for each id and class, and one for the mask"
        )
    settings.agree({"latent_size": grid[0]})
    settings.agree({"num_layers": depth, "num_embeds": width, "intermediate_size": hidden, "num_heads": heads})
    settings.without_effect("the tokenizer is loaded by itself, and compares it", "vqvae", "image_size")
    settings.without_effect(IN_TRAINING, "dropout_rate")

    def rows(table: Tensor) -> list[Tensor]:
        ids, of_classes, mask = table.split((vocab_size, classes, 1))
        return [torch.cat((ids, mask)), torch.cat((of_classes, torch.zeros_like(mask)))]

    arrangements = [
        Arrangement([words], ["tokens", "classes"], rows),
        Arrangement([places], ["positions"], lambda table: [table[None]]),
        Arrangement(["MlmLayer_0.mlm_bias.bias"], ["MlmLayer_0.mlm_bias.bias"], lambda bias: [bias[:vocab_size]]),
        *_attention(),
        *_linear_layers(
            f"TransformerLayer_{{block}}.{_MLP}.intermediate_output",
            f"TransformerLayer_{{block}}.{_MLP}.layer_output",
            "MlmLayer_0.mlm_dense",
        ),
        _gain("{rest}"),
    ]
    return generator_conversion(
        "Masked",
        state,
        tokens=Tokens(vocab_size, grid),
        num_classes=classes,
        backbone={
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_hidden": hidden,
            "mlp": "gelu_tanh",
            "norm_epsilon": 1e-12,
            "norm_first": False,
            "embedding_norm": True,
            "head_transform": "gelu_tanh",
            "tied": True,
        },
        rules=_RULES,
        arrangements=arrangements,
        sampler=sampled_by("MaskGITSampler", steps=settings.take("num_iter", 8), choice_temperature=4.5),
        label_dropout=0.0,
    )


def _attention() -> list[Arrangement]:
    """Put the heads of flax's attention side by side, outputs before inputs."""
    names = [f"TransformerLayer_{{block}}.{_ATTENTION}.{part}" for part in ("query", "key", "value")]
    out = f"TransformerLayer_{{block}}.{_ATTENTION}.out"
    return [
        *(Arrangement([f"{name}.kernel"], [f"{name}.weight"], lambda kernel: [kernel.flatten(1).T]) for name in names),
        *(Arrangement([f"{name}.bias"], [f"{name}.bias"], lambda bias: [bias.flatten()]) for name in names),
        Arrangement([f"{out}.kernel"], [f"{out}.weight"], lambda kernel: [kernel.flatten(0, 1).T]),
    ]


def _linear_layers(*names: str) -> list[Arrangement]:
    return [Arrangement([f"{name}.kernel"], [f"{name}.weight"], lambda kernel: [kernel.T]) for name in names]


def _gain(of: str) -> Arrangement:
    return Arrangement([f"{of}.scale"], [f"{of}.weight"], lambda scale: [scale])


@register(
    "maskgit_flax_tokenizer",
    marks=("quantizer.codebook", "encoder.ResBlock_0.Conv_0.kernel", "decoder.Conv_0.kernel"),
    wrappers=_WRAPPERS,
    section="vqvae",
)
def maskgit_flax_tokenizer(state: State, settings: Settings) -> Conversion:
    """Convert `tokenizer_imagenet{256,512}_checkpoint`."""
    codebook_size, code_dim = state["quantizer.codebook"].shape
    # Of the decoder's convolutions two are its ends, the others double the size.
    levels = sum(f"decoder.Conv_{number}.kernel" in state for number in range(len(state))) - 1
    blocks, rest = divmod(state.count("encoder.ResBlock_{}"), levels + 1)
    if rest or levels < 1 or "encoder.Conv_2.kernel" in state:
        raise ValueError(f"{state.source!r} is no VQGAN of MaskGIT's that halves the size by averages")
    named = arrange(state, _port_names(levels, blocks))
    network = LAYOUT.network(named, downsampling="average", shortcut="output", pixels="unit")
    sizes = network["init_args"]
    settings.agree(
        {
            "codebook_size": codebook_size,
            "embedding_dim": code_dim,
            "filters": sizes["channels"],
            "num_res_blocks": blocks,
            "channel_multipliers": sizes["multipliers"],
        }
    )
    settings.agree(
        {
            "quantizer": "vq",
            "conv_downsample": False,
            "activation_fn": "swish",
            "norm_type": "GN",
            "entropy_loss_type": "softmax",
        },
        "every model that is read has",
    )
    settings.without_effect("the generator is loaded by itself", "transformer", "num_class", "num_iter")
    settings.without_effect("the networks take any image size", "image_size")
    quantizer = vector_quantizer(
        codebook_size,
        code_dim,
        commitment_weight=settings.take("commitment_cost", 0.25),
        entropy_weight=settings.take("entropy_loss_ratio", 0.1),
        entropy_temperature=settings.take("entropy_temperature", 0.01),
        entropy_log_offset=1e-5,
    )
    return Conversion(config=vqgan(network, quantizer), tensors=named, renaming=LAYOUT.renaming(levels, [CODES]))


def _port_names(levels: int, blocks: int) -> list[Arrangement]:
    """Give Flax's layers the names of the PyTorch port, whose decoder counts its levels from the full resolution."""
    homes = {"encoder.Conv_0": "encoder.conv_in", "encoder.Conv_1": "encoder.conv_out"}
    homes |= {"decoder.Conv_0": "decoder.conv_in", f"decoder.Conv_{levels}": "decoder.conv_out"}
    homes |= {f"{half}.GroupNorm_0": f"{half}.norm_out" for half in ("encoder", "decoder")}
    for number in range(blocks):
        homes[f"encoder.ResBlock_{levels * blocks + number}"] = f"encoder.mid.{number}"
        homes[f"decoder.ResBlock_{number}"] = f"decoder.mid.{number}"
        for level in range(levels):
            homes[f"encoder.ResBlock_{level * blocks + number}"] = f"encoder.down.{level}.block.{number}"
            own = f"decoder.up.{levels - 1 - level}"
            homes[f"decoder.ResBlock_{(1 + level) * blocks + number}"] = f"{own}.block.{number}"
    homes |= {
        f"decoder.Conv_{1 + level}": f"decoder.up.{levels - 1 - level}.upsample_conv" for level in range(levels - 1)
    }
    layers = {
        "Conv_0": "conv1",
        "Conv_1": "conv2",
        "Conv_2": "nin_shortcut",
        "GroupNorm_0": "norm1",
        "GroupNorm_1": "norm2",
    }
    every = {name: home for name, home in homes.items() if "ResBlock" not in name}
    every |= {
        f"{name}.{layer}": f"{home}.{own}"
        for name, home in homes.items()
        if "ResBlock" in name
        for layer, own in layers.items()
    }
    arrangements = [Arrangement(["quantizer.codebook"], ["quantize.embedding.weight"], lambda codes: [codes])]
    for theirs, ours in every.items():
        arrangements += [
            Arrangement([f"{theirs}.kernel"], [f"{ours}.weight"], lambda kernel: [kernel.permute(3, 2, 0, 1)]),
            Arrangement([f"{theirs}.scale"], [f"{ours}.weight"], lambda scale: [scale]),
            Arrangement([f"{theirs}.bias"], [f"{ours}.bias"], lambda bias: [bias]),
        ]
    return arrangements
