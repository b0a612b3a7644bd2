"""Meta's audio models in the layout of huggingface/transformers: EnCodec and the decoder of MusicGen."""

from math import ceil, floor, log2, prod
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, Tokens, arrange, register
from discrete_lit.pretrained.layouts import IN_TRAINING, generator_conversion, head_count, in_blocks, sampled_by
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_WEIGHT = "conv.parametrizations.weight.original1"


@register("encodec", marks=("encoder.layers.0.conv.bias", "quantizer.layers.0.codebook.embed"), section=None)
def encodec(state: State, settings: Settings) -> Conversion:
    """Convert `facebook/encodec_24khz`, `encodec_32khz` or `encodec_48khz`, which normalises chunks (`ChunkedEnCodec`).

    `encode` gives the codes of the largest bandwidth; `books` asks for fewer.
    """
    # Older files have the names that weight normalisation had.
    state = arrange(
        state,
        [
            Arrangement(
                [f"{{rest}}.weight_{old}"], [f"{{rest}}.parametrizations.weight.original{new}"], lambda each: [each]
            )
            for old, new in (("g", 0), ("v", 1))
        ],
    )
    network = _seanet(state, settings)
    ratios = network["ratios"]
    codebook_size, code_dim = state["quantizer.layers.0.codebook.embed"].shape
    depth = state.count("quantizer.layers.{}.codebook")
    settings.agree({"codebook_size": codebook_size, "codebook_dim": code_dim, "hidden_size": code_dim})
    sample_rate = settings.take("sampling_rate", 24000)
    if sample_rate < 1:
        raise ValueError(f"reference_config has sampling_rate={sample_rate}: a positive number is needed")
    bandwidths = settings.optional("target_bandwidths", list) or []  # type: ignore[type-var]
    # Kilobits a second to codes of a frame, as the reference counts them.
    bits = log2(codebook_size) * ceil(sample_rate / prod(ratios))
    # Bandwidths of as many books stay apart: training draws one of them.
    books = sorted(min(max(1, floor(bandwidth * 1000 / bits)), depth) for bandwidth in bandwidths) or [depth]
    chunked = _chunks(settings, sample_rate=sample_rate)
    rules = []
    for half in ("encoder", "decoder"):
        ours, theirs = f"network.{half}.{{layer}}", f"{half}.layers.{{layer}}"
        parts = ((f"{ours}.first", f"{theirs}.block.1"), (f"{ours}.second", f"{theirs}.block.3"))
        for own, published in (*parts, (f"{ours}.shortcut", f"{theirs}.shortcut"), (ours, theirs)):
            rules += [(f"{own}.{part}.{{rest}}", f"{published}.{part}.{{rest}}") for part in ("conv", "norm", "lstm")]
    for ours, theirs in (("codes", "embed"), ("embedding_sum", "embed_avg"), ("cluster_size", "cluster_size")):
        rules.append((f"quantizer.codebooks.{{book}}.{ours}", f"quantizer.layers.{{book}}.codebook.{theirs}"))
    return Conversion(
        config={
            "class_path": f"discrete_lit.tokenizers.{'ChunkedEnCodec' if chunked else 'EnCodec'}",
            "init_args": {
                "network": {"class_path": "discrete_lit.tokenizers.networks.SEANet", "init_args": network},
                "codebook_size": codebook_size,
                "code_dim": code_dim,
                "depth": depth,
                "sample_rate": sample_rate,
                "books": books[-1],
                "training_books": books,
                # The codes are there: none begin anew from data.
                "codebook_init": "uniform",
                **chunked,
            },
        },
        tensors=state,
        renaming=Renaming(rules),
        dropped=("quantizer.layers.*.codebook.inited",),
        kept=("quantizer.codebooks.*.steps",),
    )


def _chunks(settings: Settings, *, sample_rate: int) -> dict[str, Any]:
    """Return the arguments of `ChunkedEnCodec`; none of a model that codes a clip as a whole."""
    seconds, overlap = settings.optional("chunk_length_s", float), settings.optional("overlap", float)
    normalize = settings.take("normalize", False)
    if (seconds is not None) != normalize or (seconds is None and overlap is not None):
        raise ValueError(
            f"reference_config has normalize={normalize}, chunk_length_s={seconds} and overlap={overlap}: the "
            "published models have all three (facebook/encodec_48khz) or none"
        )
    if seconds is None:
        return {}
    length = int(seconds * sample_rate)
    stride = max(1, int((1 - (overlap or 0)) * length))
    return {"chunk_length": length, "overlap": length - stride}


def _seanet(state: State, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `SEANet`: what shapes tell, and the settings that they cannot."""
    weight_norm = f"encoder.layers.0.{_WEIGHT}" in state

    def kernel(place: str) -> Tensor:
        return state[f"{place}.{_WEIGHT if weight_norm else 'conv.weight'}"]

    last = max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    places = [f"encoder.layers.{number}" for number in range(last + 1)]
    first, *between, end = [place for place in places if f"{place}.conv.bias" in state]
    filters, audio_channels, size = kernel(first).shape
    residuals = [place for place in places if f"{place}.block.1.conv.bias" in state]
    lstm = next((place for place in places if f"{place}.lstm.weight_ih_l0" in state), None)
    # A stride has a kernel of twice its size.
    ratios = [kernel(place).shape[-1] // 2 for place in reversed(between)]
    if not ratios or len(residuals) % len(ratios):
        raise ValueError(f"{state.source!r} has {len(residuals)} residual blocks for {len(ratios)} strides")
    inner = [len(kernel(f"{place}.block.1")) for place in residuals[:1]]
    found: dict[str, Any] = {
        "audio_channels": audio_channels,
        "filters": filters,
        "ratios": ratios,
        "residual_layers": len(residuals) // len(ratios),
        "kernel": size,
        "last_kernel": kernel(end).shape[-1],
        "lstm_layers": sum(name.startswith(f"{lstm}.lstm.weight_ih_l") for name in state),
        "norm": "weight" if weight_norm else "group",
    }
    if residuals:
        found["compress"] = filters // inner[0]
        found["residual_kernel"] = kernel(f"{residuals[0]}.block.1").shape[-1]
        found["conv_shortcut"] = f"{residuals[0]}.shortcut.conv.bias" in state
    published = {
        "audio_channels": "audio_channels",
        "num_filters": "filters",
        "upsampling_ratios": "ratios",
        "num_residual_layers": "residual_layers",
        "kernel_size": "kernel",
        "last_kernel_size": "last_kernel",
        "num_lstm_layers": "lstm_layers",
        "compress": "compress",
        "residual_kernel_size": "residual_kernel",
        "use_conv_shortcut": "conv_shortcut",
    }
    settings.agree({theirs: found[ours] for theirs, ours in published.items() if ours in found})
    settings.agree({"norm_type": "weight_norm" if weight_norm else "time_group_norm"})
    return found | {
        "dilation_growth": settings.take("dilation_growth_rate", 2),
        "causal": settings.take("use_causal_conv", True),
        "padding": settings.take("pad_mode", "reflect", ("reflect", "constant", "replicate")),
        "trim_right": settings.take("trim_right_ratio", 1.0),
    }


_BLOCK = [
    ("attention.query_key_value.weight", "self_attn.{q|k|v}_proj.weight"),
    ("attention.out.weight", "self_attn.out_proj.weight"),
    ("attention_norm.{rest}", "self_attn_layer_norm.{rest}"),
    ("context_attention.query.weight", "encoder_attn.q_proj.weight"),
    ("context_attention.key_value.weight", "encoder_attn.{k|v}_proj.weight"),
    ("context_attention.out.weight", "encoder_attn.out_proj.weight"),
    ("context_attention.null", "encoder_attn.null"),
    ("context_norm.{rest}", "encoder_attn_layer_norm.{rest}"),
    ("mlp_norm.{rest}", "final_layer_norm.{rest}"),
    ("mlp.expand.weight", "fc1.weight"),
    ("mlp.contract.weight", "fc2.weight"),
]
_TABLES, _HEADS, _LAYER = "model.decoder.embed_tokens", "lm_heads", "model.decoder.layers.{layer}"


@register(
    "musicgen_decoder",
    marks=(f"{_TABLES}.0.weight", f"{_HEADS}.0.weight", "model.decoder.layers.0.encoder_attn.k_proj.weight"),
    section="decoder",
)
def musicgen_decoder(state: State, settings: Settings) -> Conversion:
    """Convert the decoder of `facebook/musicgen-small`, `-medium` or `-large`: codes of four books given texts.

    A batch has as `"context"` what the decoder attends to: the states of T5, through `enc_to_dec_proj` where the
    folder has one. No context is what the published code writes as zeros.
    """
    books, depth = state.count(f"{_TABLES}.{{}}"), state.count(_LAYER.replace("{layer}", "{}"))
    rows, width = state[f"{_TABLES}.0.weight"].shape
    vocab_size = rows - 1
    hidden = len(state["model.decoder.layers.0.fc1.weight"])
    settings.agree({"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": depth, "ffn_dim": hidden})
    settings.agree({"num_codebooks": books, "pad_token_id": vocab_size, "bos_token_id": vocab_size})
    settings.agree({"tie_word_embeddings": False, "scale_embedding": False}, "the published models have")
    settings.agree({"audio_channels": 1, "activation_function": "gelu"}, "the published models of mono sound have")
    settings.without_effect(IN_TRAINING, "layerdrop", "dropout", "attention_dropout", "activation_dropout")
    settings.without_effect(IN_TRAINING, "initializer_factor")
    settings.without_effect("ours has a cache of its own", "use_cache")
    settings.without_effect("a clip has a fixed length", "eos_token_id")
    frames = settings.take("max_position_embeddings", 2048) - books + 1
    if frames < 1:
        raise ValueError(
            f"reference_config has max_position_embeddings={frames + books - 1}, too few for {books} books"
        )

    def start(*tables: Tensor) -> list[Tensor]:
        """One table of all books, the start, which is the sum of their last rows, and no class."""
        return [
            torch.cat(tables),
            torch.stack([table[-1] for table in tables]).sum(dim=0)[None, None],
            tables[0][:2] * 0,
        ]

    arrangements = [
        Arrangement([f"{_TABLES}.{book}.weight" for book in range(books)], ["tables", "start", "classes"], start),
        Arrangement([f"{_HEADS}.{book}.weight" for book in range(books)], ["heads"], lambda *heads: [torch.cat(heads)]),
        Arrangement(
            [f"{_LAYER}.encoder_attn.k_proj.weight"],
            [f"{_LAYER}.encoder_attn.k_proj.weight", f"{_LAYER}.encoder_attn.null"],
            lambda weight: [weight, weight.new_zeros(1, weight.shape[1])],
        ),
    ]
    backbone = {
        "width": width,
        "depth": depth,
        "heads": head_count(settings, "num_attention_heads", max(1, width // 64), width),
        "mlp_hidden": hidden,
        "norm_epsilon": 1e-5,
        "norm_bias": True,
        "positions": "sinusoidal",
        "conditioning": "added",
        "context_dim": state["model.decoder.layers.0.encoder_attn.k_proj.weight"].shape[1],
        "bias": False,
    }
    return generator_conversion(
        "DelayedAutoregressive",
        state,
        tokens=Tokens(vocab_size, (frames, books)),
        num_classes=1,
        backbone=backbone,
        rules=[
            ("token_embedding.table.weight", "tables"),
            ("start", "start"),
            ("class_embedding.weight", "classes"),
            *in_blocks(_LAYER.replace("{layer}", "{block}"), _BLOCK),
            ("final_norm.{rest}", "model.decoder.layer_norm.{rest}"),
            ("head.project.weight", "heads"),
        ],
        arrangements=arrangements,
        dropped=("model.decoder.embed_positions.weights",),
        sampler=sampled_by("DelaySampler", guidance_scale=3.0, top_k=min(250, vocab_size)),
        label_dropout=0.3,
    )
