"""MAR, of LTH14/mar, and its tokenizer KL-16, the continuous autoencoder of latent diffusion."""

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register
from discrete_lit.pretrained.layouts import IN_TRAINING, TIMM_BLOCK, head_count, in_blocks, square
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import DROPPED, LAYOUT, MARKS, same_network

# It stands in MAR's training code, not in its file.
_SCALE_FACTOR = 0.2325
# LDM's weight is 1e-6 of a sum over the 3 x 256 x 256 numbers of an image.
_KL_WEIGHT = 1e-6 / (3 * 256 * 256)


@register(
    "mar_kl_vae",
    marks=(*MARKS, "!quantize.embedding.weight", "!quantize.embed.weight"),
    wrappers=("model", "state_dict"),
)
def mar_kl_vae(state: State, settings: Settings) -> Conversion:
    """Convert `kl16.ckpt`, or another KL autoencoder of LDM with its `scale_factor` in the reference configuration."""
    moments, dim = state["quant_conv.weight"].shape[0], state["post_quant_conv.weight"].shape[1]
    if moments != 2 * dim:
        raise ValueError(f"{state.source!r} has {moments} moments for {dim} latent channels, not twice as many")
    network = LAYOUT.network(state)
    sizes = network["init_args"]
    settings.class_name("AutoencoderKL", ("AutoencoderKL",))
    settings.agree({"embed_dim": dim, "ch_mult": sizes["multipliers"]})
    settings.agree({"use_variational": True}, "every model that is read has")
    settings.without_effect(
        "it is about the loss and the data of the training, of which ours has settings of its own",
        *("lossconfig", "image_key", "colorize_nlabels"),
    )
    encoder = settings.section("ddconfig")
    encoder.agree({"double_z": True}, "a model with mean and variance has")
    same_network(sizes, encoder)
    if sizes["z_channels"] == dim:
        # The convolution before the moments is then twice as wide as the one behind the latents.
        del sizes["z_channels"]
    config = {
        "class_path": "discrete_lit.tokenizers.KLVAE",
        "init_args": {
            "network": network,
            "latent_channels": dim,
            "kl_weight": _KL_WEIGHT,
            "scale_factor": settings.take("scale_factor", _SCALE_FACTOR),
        },
    }
    return Conversion(config=config, tensors=state, renaming=LAYOUT.renaming(LAYOUT.levels(state)), dropped=DROPPED)


# The number of heads of MAR-B, L and H, by width.
HEADS = {768: 12, 1024: 16, 1280: 16}
# The head of MAR, which HART has too.
HEAD_RULES = (
    ("head.network.time_embedding.layers.{layer}.{rest}", "diffloss.net.time_embed.mlp.{layer}.{rest}"),
    ("head.network.condition_projection.{rest}", "diffloss.net.cond_embed.{rest}"),
    ("head.network.input_projection.{rest}", "diffloss.net.input_proj.{rest}"),
    ("head.network.blocks.{block}.norm.{rest}", "diffloss.net.res_blocks.{block}.in_ln.{rest}"),
    ("head.network.blocks.{block}.expand.{rest}", "diffloss.net.res_blocks.{block}.mlp.0.{rest}"),
    ("head.network.blocks.{block}.contract.{rest}", "diffloss.net.res_blocks.{block}.mlp.2.{rest}"),
    ("head.network.modulations.{block}.{rest}", "diffloss.net.res_blocks.{block}.adaLN_modulation.1.{rest}"),
    ("head.network.final_modulation.{rest}", "diffloss.net.final_layer.adaLN_modulation.1.{rest}"),
    ("head.network.output.{rest}", "diffloss.net.final_layer.linear.{rest}"),
)
# The network of MAR, which TokenBridge has too, but for the vectors that are added to its hidden states.
NETWORK_RULES = (
    ("backbone.class_embedding.weight", "class_emb.weight"),
    ("backbone.input_projection.{rest}", "z_proj.{rest}"),
    ("backbone.input_norm.{rest}", "z_proj_ln.{rest}"),
    ("backbone.encoder_positions", "encoder_pos_embed_learned"),
    ("backbone.encoder_norm.{rest}", "encoder_norm.{rest}"),
    *in_blocks("encoder_blocks.{block}", TIMM_BLOCK, ours="backbone.encoder.{block}"),
    ("backbone.decoder_projection.{rest}", "decoder_embed.{rest}"),
    ("backbone.mask_vector", "mask_token"),
    ("backbone.decoder_positions", "decoder_pos_embed_learned"),
    ("backbone.decoder_norm.{rest}", "decoder_norm.{rest}"),
    *in_blocks("decoder_blocks.{block}", TIMM_BLOCK, ours="backbone.decoder.{block}"),
)
_RULES = [*NETWORK_RULES, ("backbone.hidden_positions", "diffusion_pos_embed_learned"), *HEAD_RULES]


@register(
    "mar",
    marks=("fake_latent", "z_proj_ln.weight", "diffloss.net.cond_embed.weight"),
    wrappers=("model_ema", "model"),
)
def mar(state: State, settings: Settings) -> Conversion:
    """Convert the averaged weights in `checkpoint-last.pth` of `mar_base`, `mar_large` or `mar_huge`."""
    width, decoder_width = len(state["z_proj.weight"]), len(state["decoder_embed.weight"])
    length = state["diffusion_pos_embed_learned"].shape[1]
    slots = state["encoder_pos_embed_learned"].shape[1] - length
    patch = settings.take("patch_size", 1)
    if patch < 1 or state["z_proj.weight"].shape[1] % patch**2:
        raise ValueError(
            f"reference_config has patch_size={patch}, whose square does not divide the "
            f"{state['z_proj.weight'].shape[1]} numbers of a place"
        )
    dim = state["z_proj.weight"].shape[1] // patch**2
    grid = square(state, length)
    said = settings.optional("vae_embed_dim", int)
    if said is not None and said != dim:
        raise ValueError(
            f"reference_config has vae_embed_dim={said}, but with patch_size={patch} the tensors have {dim} channels"
        )
    if slots < 1:
        raise ValueError(f"{state.source!r} has {slots} slots for the class before {length} places")
    hidden = len(state["encoder_blocks.0.mlp.fc1.weight"])
    depths = {half: state.count(f"{half}_blocks.{{}}") for half in ("encoder", "decoder")}
    head = {"width": len(state["diffloss.net.input_proj.weight"]), "depth": state.count("diffloss.net.res_blocks.{}")}
    settings.agree(
        {
            "encoder_embed_dim": width,
            "encoder_depth": depths["encoder"],
            "decoder_embed_dim": decoder_width,
            "decoder_depth": depths["decoder"],
            "mlp_ratio": hidden / width,
            "buffer_size": slots,
            "class_num": len(state["class_emb.weight"]),
            "diffloss_w": head["width"],
            "diffloss_d": head["depth"],
        }
    )
    stride, side = settings.take("vae_stride", 16), settings.optional("img_size", int)
    if side is not None and side != patch * grid[0] * stride:
        raise ValueError(
            f"reference_config has img_size={side} and vae_stride={stride}, but the tensors have {grid[0]} x {grid[1]} "
            f"places of patch_size={patch}"
        )
    settings.agree({"norm_layer": "LayerNorm eps 1e-6"}, "every model that is read has")
    settings.without_effect(
        IN_TRAINING, "attn_dropout", "proj_dropout", "mask_ratio_min", "grad_checkpointing", "diffusion_batch_mul"
    )
    sampling = settings.section("sampling")
    schedule = {"linear": "known", "constant": "constant"}[
        sampling.take("cfg_schedule", "linear", ("linear", "constant"))
    ]
    steps = settings.take("num_sampling_steps", "100")
    if not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"reference_config has num_sampling_steps={steps!r}, but a whole number above 0 is read")
    solver = {
        "steps": int(steps),
        "temperature": sampling.take("temperature", 1.0),
    }
    arranged = arrange(
        state,
        [
            *(
                Arrangement([name], [name], lambda table: [table[0]])
                for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned")
            ),
            Arrangement(["mask_token"], ["mask_token"], lambda vector: [vector.flatten()]),
            Arrangement(["class_emb.weight", "fake_latent"], ["class_emb.weight"], _with_null),
        ],
    )
    return Conversion(
        config={
            "class_path": "discrete_lit.generators.ContinuousMasked",
            "init_args": {
                "num_classes": len(state["class_emb.weight"]),
                "patch_size": patch,
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {
                        "width": width,
                        "depth": depths["encoder"],
                        "heads": head_count(
                            settings, "encoder_num_heads", HEADS.get(width, max(1, width // 64)), width
                        ),
                        "decoder_width": decoder_width,
                        "decoder_depth": depths["decoder"],
                        "decoder_heads": head_count(
                            settings,
                            "decoder_num_heads",
                            HEADS.get(decoder_width, max(1, decoder_width // 64)),
                            decoder_width,
                        ),
                        "mlp_ratio": hidden / width,
                        "buffer": slots,
                    },
                },
                "head": {"class_path": "discrete_lit.backbones.TokenDiffusionHead", "init_args": head},
                "sampler": {
                    "class_path": "discrete_lit.samplers.MARSampler",
                    "init_args": {
                        "steps": min(sampling.take("num_iter", 64), length),
                        "guidance_scale": float(sampling.take("cfg", 1.0)),
                        "guidance_schedule": schedule,
                        "solver": {"class_path": "discrete_lit.diffusion.solvers.DDPM", "init_args": solver},
                    },
                },
                "label_dropout": settings.take("label_drop_prob", 0.1),
            },
        },
        tensors=arranged,
        renaming=Renaming(_RULES),
        latents=(dim, *(patch * side for side in grid)),
    )


def _with_null(classes: Tensor, null: Tensor) -> list[Tensor]:
    return [torch.cat((classes, null))]
