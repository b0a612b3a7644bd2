"""TokenBridge, of YuqingWang1029/TokenBridge: KL-16's latents as ids of each channel, drawn by MAR's network and a head
over channels. Its repository began with MAR's, and its files have the same names for what it shares.
"""

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register, reorder_chunks
from discrete_lit.pretrained.layouts import IN_TRAINING, TIMM_BLOCK, head_count, in_blocks, square
from discrete_lit.pretrained.mar import HEADS, NETWORK_RULES
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.tokenizers.quantizers.normal_levels import NormalLevels

_CHANNEL_HEADS = 8
# The channel that each step predicts; it stands in the code alone.
_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
# Guidance and temperature of the published figures, by the width of L and H.
_EVALUATION = {1024: (3.1, 0.96), 1280: (3.45, 0.91)}
_CHANNEL_BLOCK = [
    *TIMM_BLOCK,
    ("attention.norms.query.{rest}", "attn.q_norm.{rest}"),
    ("attention.norms.key.{rest}", "attn.k_norm.{rest}"),
    ("modulation.project.{rest}", "adaLN_modulation.1.{rest}"),
]
_RULES = [
    *NETWORK_RULES,
    ("backbone.hidden_positions", "output_pos_embed"),
    ("head.condition_projection.{rest}", "condition_proj.{rest}"),
    ("head.tables.{step}.weight", "token_embeddings.{step}.weight"),
    ("head.positions", "channel_embed"),
    ("head.steps", "timesteps_embeddings"),
    *in_blocks("channel_blocks.{block}", _CHANNEL_BLOCK, ours="head.blocks.{block}"),
    ("head.norm.{rest}", "channel_norm.{rest}"),
    ("head.final_modulation.project.{rest}", "channel_final.adaLN_modulation.1.{rest}"),
    ("head.logits.{step}.project.weight", "channel_heads.{step}.weight"),
    ("head.logits.{step}.bias", "channel_heads.{step}.bias"),
]


@register(
    "tokenbridge",
    marks=("fake_latent", "z_proj_ln.weight", "token_embeddings.0.weight", "channel_heads.0.weight"),
    wrappers=("model_ema", "model"),
)
def tokenbridge(state: State, settings: Settings) -> Conversion:
    """Convert the averaged weights in `checkpoint-last.pth` of `tokenbridge_large` or `tokenbridge_huge`."""
    width, channels = state["z_proj.weight"].shape
    decoder_width, channel_width = len(state["decoder_embed.weight"]), len(state["condition_proj.weight"])
    length = state["output_pos_embed"].shape[1]
    grid, slots = square(state, length), state["encoder_pos_embed_learned"].shape[1] - length
    if slots < 1:
        raise ValueError(f"{state.source!r} has {slots} slots for the class before {length} places")
    if channels != len(_ORDER):
        raise ValueError(
            f"{state.source!r} has {channels} channels, but the order in which they are predicted is known for "
            f"{len(_ORDER)} alone"
        )
    levels = len(state["channel_heads.0.weight"])
    hidden, channel_hidden = (len(state[f"{part}_blocks.0.mlp.fc1.weight"]) for part in ("encoder", "channel"))
    depths = {part: state.count(f"{part}_blocks.{{}}") for part in ("encoder", "decoder", "channel")}
    settings.agree(
        {
            "vae_embed_dim": channels,
            "encoder_embed_dim": width,
            "encoder_depth": depths["encoder"],
            "decoder_embed_dim": decoder_width,
            "decoder_depth": depths["decoder"],
            "channel_embed_dim": channel_width,
            "channel_depth": depths["channel"],
            "mlp_ratio": hidden / width,
            "buffer_size": slots,
            "class_num": len(state["class_emb.weight"]),
            "quant_levels": levels,
        }
    )
    settings.agree({"patch_size": 1, "norm_layer": "LayerNorm eps 1e-6"}, "every model that is read has")
    stride, side = settings.take("vae_stride", 16), settings.optional("img_size", int)
    if side is not None and side != grid[0] * stride:
        raise ValueError(
            f"reference_config has img_size={side} and vae_stride={stride}, but the tensors have {grid[0]} x {grid[1]} "
            "places"
        )
    settings.without_effect(IN_TRAINING, "attn_dropout", "proj_dropout", "mask_ratio_min", "grad_checkpointing")
    settings.without_effect("the network reads the quantised values whatever it says", "use_quantized_value")
    low, high = settings.take("quant_min", -5.0), settings.take("quant_max", 5.0)
    std_range = settings.take("std_range", 3.0)
    if not low < high or std_range <= 0:
        raise ValueError(
            f"reference_config has quant_min={low}, quant_max={high} and std_range={std_range}: the first must lie "
            "below the second, and the last above 0"
        )
    table = NormalLevels(levels, low=-std_range, high=std_range, std_range=std_range)

    def check_table(values: Tensor, boundaries: Tensor) -> list[Tensor]:
        for found, expected in ((values, table.values), (boundaries, table.boundaries)):
            if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-4):
                raise ValueError(
                    f"{state.source!r} has other 'reconstruction_values' or 'boundaries' than {levels} levels of the "
                    f"normal law within std_range={std_range}"
                )
        return []

    sampling = settings.section("sampling")
    schedule = {"linear": "known", "constant": "constant"}[
        sampling.take("cfg_schedule", "linear", ("linear", "constant"))
    ]
    guidance, temperature = _EVALUATION.get(width, (1.0, 1.0))
    guidance, temperature = float(sampling.take("cfg", guidance)), float(sampling.take("temperature", temperature))
    if temperature < 0:
        raise ValueError(f"reference_config has sampling.temperature={temperature}, but at least 0 is needed")
    greedy = {"top_k": 1} if temperature == 0 else {"temperature": temperature}
    positions = ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "output_pos_embed")
    arranged = arrange(
        state,
        [
            *(
                Arrangement([name], [name], lambda table: [table[0]])
                for name in (*positions, "channel_embed", "timesteps_embeddings")
            ),
            Arrangement(["mask_token"], ["mask_token"], lambda vector: [vector.flatten()]),
            Arrangement(
                ["class_emb.weight", "fake_latent"],
                ["class_emb.weight"],
                lambda classes, null: [torch.cat((classes, null))],
            ),
            Arrangement(["reconstruction_values", "boundaries"], [], check_table),
            # Theirs is the scale, then the shift.
            *(reorder_chunks(f"channel_final.adaLN_modulation.1.{kind}", (1, 0)) for kind in ("weight", "bias")),
        ],
    )
    return Conversion(
        config={
            "class_path": "discrete_lit.generators.DimensionwiseMasked",
            "init_args": {
                "num_classes": len(state["class_emb.weight"]),
                "levels": levels,
                "low": low,
                "high": high,
                "std_range": std_range,
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {
                        "width": width,
                        "depth": depths["encoder"],
                        "heads": _heads(settings, "encoder", width),
                        "decoder_width": decoder_width,
                        "decoder_depth": depths["decoder"],
                        "decoder_heads": _heads(settings, "decoder", decoder_width),
                        "mlp_ratio": hidden / width,
                        "buffer": slots,
                    },
                },
                "head": {
                    "class_path": "discrete_lit.backbones.ChannelHead",
                    "init_args": {
                        "width": channel_width,
                        "depth": depths["channel"],
                        "heads": head_count(settings, "channel_heads", _CHANNEL_HEADS, channel_width),
                        "order": list(_ORDER),
                        "mlp_ratio": channel_hidden / channel_width,
                        "shifted_start": True,
                    },
                },
                "sampler": {
                    "class_path": "discrete_lit.samplers.DimensionwiseSampler",
                    "init_args": {
                        "steps": min(sampling.take("num_iter", 256), length),
                        "guidance_scale": guidance,
                        "guidance_schedule": schedule,
                        **greedy,
                    },
                },
                "label_dropout": settings.take("label_drop_prob", 0.1),
            },
        },
        tensors=arranged,
        renaming=Renaming(_RULES),
        # The head's mask hides what comes later; so does ours.
        dropped=("channel_mask",),
        latents=(channels, *grid),
    )


def _heads(settings: Settings, half: str, width: int) -> int:
    return head_count(settings, f"{half}_num_heads", HEADS.get(width, max(1, width // 64)), width)
