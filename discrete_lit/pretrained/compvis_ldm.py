"""The class-conditional latent diffusion of CompVis/latent-diffusion: a U-Net that attends to the class.

The file holds its first stage too: a VQGAN, whose latents before the codebook are what is modelled.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.diffusion.gaussian import scaled_linear_betas
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register, reorder_chunks
from discrete_lit.pretrained.layouts import IN_TRAINING
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings
from discrete_lit.pretrained.taming import taming_vqgan

_UNET = "model.diffusion_model"
_EMA = "model_ema."
_FIRST_STAGE = "first_stage_model."
_CLASSES = "cond_stage_model.embedding.weight"
# Of configs/latent-diffusion/cin256-v2.yaml.
_IMAGE_SIZE, _STEPS, _START, _END = 64, 1000, 0.0015, 0.0195
_IMAGENET, _DROPOUT = 1000, 0.1
# FID 3.60 of LDM-4-G: guidance 1.5 in 250 steps.
_GUIDANCE, _SAMPLING_STEPS = 1.5, 250
# The schedule's tables, of which `alphas_cumprod` is compared, and the counters of EMA.
_TABLES = (
    *("betas", "alphas_cumprod_prev", "sqrt_*", "log_one_minus_alphas_cumprod", "posterior_*", "lvlb_weights"),
    *("logvar", "cond_ids", f"{_EMA}*"),
)
_FIXED = "every model that is read has"


@register(
    "ldm",
    marks=(f"{_UNET}.input_blocks.0.0.weight", f"{_UNET}.time_embed.0.weight", _CLASSES),
    wrappers=("state_dict",),
)
def ldm(state: State, settings: Settings) -> Conversion:
    """Convert `cin/model.ckpt` (cin256-v2); of its two sets of weights, the average.

    The last class stands for none, as in the published model; but 1,000 are ImageNet's, with none among them, as in
    the repository's other configuration (cin-ldm-vq-f8): guidance of such a model is refused.
    """
    settings.class_name("LatentDiffusion", ("LatentDiffusion",))
    stages = [
        _Stage(state, f"{_UNET}.input_blocks.{number}") for number in range(state.count(f"{_UNET}.input_blocks.{{}}"))
    ]
    unet = _sizes(state, stages, settings.section("unet_config"))
    classes = settings.section("cond_stage_config")
    classes.class_name("ClassEmbedder", ("ClassEmbedder",))
    rows, class_width = state[_CLASSES].shape
    classes.agree({"n_classes": rows, "embed_dim": class_width})
    classes.without_effect("it is about the data of the training", "key")
    channels, outputs = state[f"{_UNET}.input_blocks.0.0.weight"].shape[1], len(state[f"{_UNET}.out.2.weight"])
    if channels != outputs or rows < 2:
        raise ValueError(
            f"{state.source!r} has {channels} channels, {outputs} outputs and {rows} classes, none of them null"
        )
    settings.agree({"channels": channels})
    side = settings.take("image_size", settings.section("unet_config").take("image_size", _IMAGE_SIZE))
    settings.section("unet_config").agree({"image_size": side}, "the model has")
    _training(settings)
    prediction = {"eps": "noise", "x0": "data"}[settings.take("parameterization", "eps", ("eps", "x0"))]
    steps = settings.take("timesteps", _STEPS)
    start, end = settings.take("linear_start", _START), settings.take("linear_end", _END)
    if steps < 1:
        raise ValueError(f"reference_config has timesteps={steps}, a schedule has at least 1")

    def same_schedule(table: Tensor) -> list[Any]:
        expected = torch.cumprod(1 - torch.tensor(scaled_linear_betas(steps, start=start, end=end)), dim=0)
        if table.shape != expected.shape or not torch.allclose(table.double(), expected.double(), rtol=1e-4):
            raise ValueError(
                f"{state.source!r} has another schedule than timesteps={steps}, linear_start={start}, "
                f"linear_end={end}: give reference_config the values of its YAML"
            )
        return []

    has_null = rows != _IMAGENET

    def with_null(table: Tensor) -> list[Tensor]:
        return [table if has_null else torch.cat((table, torch.zeros_like(table[:1])))]

    averaged = settings.take("use_ema", True)
    if "use_ema" in settings and averaged and not any(name.startswith(_EMA) for name in state):
        raise ValueError(f"reference_config has use_ema=True, but {state.source!r} has no averaged weights")
    tensors = {name: _averaged(state, name) if averaged else value for name, value in state.items()}
    first = {name.removeprefix(_FIRST_STAGE): value for name, value in state.items() if name.startswith(_FIRST_STAGE)}
    own = State({name: tensors[name] for name in state if not name.startswith(_FIRST_STAGE)}, state.source)
    arrangements = [
        Arrangement(["alphas_cumprod"], [], same_schedule),
        Arrangement([_CLASSES], [_CLASSES], with_null),
        # The gate comes first in ours.
        *(reorder_chunks(f"{name}.{part}", (1, 0)) for name in _gated(own) for part in ("weight", "bias")),
    ]
    return Conversion(
        config={
            "class_path": "discrete_lit.generators.LatentDiffusion",
            "init_args": {
                "num_classes": rows - int(has_null),
                "label_dropout": _DROPOUT if has_null else 0.0,
                "backbone": {
                    "class_path": "discrete_lit.backbones.UNet",
                    "init_args": {**unet, "class_width": class_width},
                },
                "denoiser": {
                    "class_path": "discrete_lit.diffusion.gaussian.GaussianDenoiser",
                    "init_args": {
                        "path": {
                            "class_path": "discrete_lit.diffusion.gaussian.ScheduledPath",
                            "init_args": {"schedule": "scaled_linear", "steps": steps, "start": start, "end": end},
                        },
                        "prediction": prediction,
                    },
                },
                "sampler": {
                    "class_path": "discrete_lit.samplers.GuidedSolver",
                    "init_args": {
                        "solver": {
                            "class_path": "discrete_lit.diffusion.solvers.DDIM",
                            "init_args": {
                                "steps": min(_SAMPLING_STEPS, steps // 2),
                                "spacing": "strided",
                                "offset": 1,
                                "last": "first_step",
                            },
                        },
                        "guidance_scale": _GUIDANCE if has_null else 1.0,
                    },
                },
            },
        },
        tensors=arrange(own, arrangements),
        renaming=Renaming(_rules(state, stages)),
        dropped=_TABLES,
        latents=(channels, side, side),
        tokenizer=_first_stage(State(first, state.source), settings),
    )


def _training(settings: Settings) -> None:
    """Read what a configuration says of training, and what every published model has in common."""
    settings.agree(
        {
            **{"conditioning_key": "crossattn", "num_timesteps_cond": 1, "beta_schedule": "linear", "loss_type": "l2"},
            **{"original_elbo_weight": 0.0, "l_simple_weight": 1.0, "learn_logvar": False, "v_posterior": 0.0},
            **{"given_betas": None, "cond_stage_forward": None, "use_positional_encodings": False, "cosine_s": 8e-3},
            "scale_by_std": False,
        },
        _FIXED,
    )
    settings.without_effect(
        "it is about the training, of which ours has settings of its own",
        *("first_stage_key", "cond_stage_key", "cond_stage_trainable", "log_every_t", "logvar_init", "load_only_unet"),
    )
    settings.without_effect("its samplers do not clip latents", "clip_denoised")
    settings.without_effect("it is about conditions that are stacked on to the latents", "concat_mode")


class _Stage:
    """One entry of the lists of blocks: which of its parts has which number.

    Args:
        state: the tensors.
        name: of the entry.
    """

    def __init__(self, state: State, name: str) -> None:
        self.name = name
        self.block = f"{name}.0" if f"{name}.0.in_layers.0.weight" in state else None
        self.attention = f"{name}.1" if f"{name}.1.norm.weight" in state else None
        resamples = (f"{name}.0.op", *(f"{name}.{number}.conv" for number in (1, 2)))
        self.resample = next((found for found in resamples if f"{found}.weight" in state), None)
        self.width = None if self.block is None else len(state[f"{self.block}.in_layers.2.weight"])

    def rules(self, ours: str) -> list[tuple[str, str]]:
        """Pairs of our names and the published ones."""
        rules = []
        if self.block is not None:
            parts = {
                **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1"},
                **{"norm2": "out_layers.0", "conv2": "out_layers.3", "shortcut": "skip_connection"},
            }
            rules += [
                (f"{ours}.block.{own}.{{rest}}", f"{self.block}.{theirs}.{{rest}}") for own, theirs in parts.items()
            ]
        if self.resample is not None:
            rules.append((f"{ours}.resample.{{rest}}", f"{self.resample}.{{rest}}"))
        if self.attention is not None:
            own, theirs = f"{ours}.attention", self.attention
            layer = (f"{own}.layers.{{layer}}", f"{theirs}.transformer_blocks.{{layer}}")
            named = {
                **{"attention_norm.{rest}": "norm1.{rest}", "cross_norm.{rest}": "norm2.{rest}"},
                **{
                    "mlp_norm.{rest}": "norm3.{rest}",
                    "attention.query_key_value.weight": "attn1.{to_q|to_k|to_v}.weight",
                },
                **{
                    "attention.out.{rest}": "attn1.to_out.0.{rest}",
                    "cross_attention.query.weight": "attn2.to_q.weight",
                },
                **{"cross_attention.key_value.weight": "attn2.{to_k|to_v}.weight"},
                **{"cross_attention.out.{rest}": "attn2.to_out.0.{rest}", "mlp.expand.{rest}": "ff.net.0.proj.{rest}"},
                "mlp.contract.{rest}": "ff.net.2.{rest}",
            }
            rules += [(f"{layer[0]}.{mine}", f"{layer[1]}.{published}") for mine, published in named.items()]
            around = {"norm": "norm", "project_in": "proj_in", "project_out": "proj_out"}
            rules += [
                (f"{own}.{mine}.{{rest}}", f"{theirs}.{published}.{{rest}}") for mine, published in around.items()
            ]
        return rules


def _rules(state: State, stages: list[_Stage]) -> list[tuple[str, str]]:
    outputs = state.count(f"{_UNET}.output_blocks.{{}}")
    rules = [
        ("conv_in.{rest}", f"{_UNET}.input_blocks.0.0.{{rest}}"),
        ("time_embedding.layers.{layer}.{rest}", f"{_UNET}.time_embed.{{layer}}.{{rest}}"),
        ("class_embedding.weight", _CLASSES),
        ("norm_out.{rest}", f"{_UNET}.out.0.{{rest}}"),
        ("conv_out.{rest}", f"{_UNET}.out.2.{{rest}}"),
    ]
    for number, stage in enumerate(stages[1:]):
        rules += stage.rules(f"down.{number}")
    for number in range(outputs):
        rules += _Stage(state, f"{_UNET}.output_blocks.{number}").rules(f"up.{number}")
    # The middle is a list of block, attention and block.
    middle = f"{_UNET}.middle_block"
    rules += _Stage(state, middle).rules("middle.0")
    last = [
        (own, theirs.replace(f"{middle}.0", f"{middle}.2")) for own, theirs in _Stage(state, middle).rules("middle.1")
    ]
    return rules + [rule for rule in last if rule[0].startswith("middle.1.block")]


def _sizes(state: State, stages: list[_Stage], settings: Settings) -> dict[str, Any]:
    """Return the arguments of `UNet`, from the tensors and, for the heads, from the configuration.

    Raises:
        ValueError: the configuration says something else, or widths are no multiples of the first one.
    """
    settings.class_name("UNetModel", ("UNetModel",))
    channels = len(state[f"{_UNET}.input_blocks.0.0.weight"])
    levels: list[list[_Stage]] = [[]]
    for stage in stages[1:]:
        if stage.block is None:
            levels.append([])
        else:
            levels[-1].append(stage)
    widths = [level[0].width or 0 for level in levels if level]
    if len(widths) != len(levels) or any(width % channels for width in widths):
        raise ValueError(f"{state.source!r} has widths {widths} that are no multiples of its first one, {channels}")
    attention = [2**number for number, level in enumerate(levels) if level[0].attention is not None]
    first = next((stage.attention for stage in stages if stage.attention is not None), f"{_UNET}.middle_block.1")
    depth = state.count(f"{first}.transformer_blocks.{{}}")
    found = {
        "in_channels": state[f"{_UNET}.input_blocks.0.0.weight"].shape[1],
        "out_channels": len(state[f"{_UNET}.out.2.weight"]),
        "model_channels": channels,
        "num_res_blocks": len(levels[0]),
        "channel_mult": [width // channels for width in widths],
        "transformer_depth": depth,
        "context_dim": state[f"{first}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
    }
    settings.agree(found)
    if sorted(settings.take("attention_resolutions", attention)) != attention:
        raise ValueError(
            f"reference_config has {settings.where('attention_resolutions')}, rates of down-sampling, other than those "
            f"at which the tensors have attention: {attention}"
        )
    settings.agree(
        {
            **{"use_spatial_transformer": True, "conv_resample": True, "dims": 2, "num_classes": None},
            **{"use_scale_shift_norm": False, "resblock_updown": False, "n_embed": None, "num_heads_upsample": -1},
        },
        _FIXED,
    )
    settings.without_effect(IN_TRAINING, "dropout", "use_checkpoint", "use_fp16")
    settings.without_effect("it is about attention without a transformer", "use_new_attention_order")
    settings.without_effect("a spatial transformer's heads divide the channels evenly in any case", "legacy")
    sizes: dict[str, Any] = {
        "channels": channels,
        "multipliers": found["channel_mult"],
        "blocks": found["num_res_blocks"],
        "attention": attention,
        "transformer_depth": depth,
    }
    head_dim = settings.take("num_head_channels", -1)
    heads = settings.take("num_heads", -1 if head_dim > 0 else 1)
    return sizes | ({"head_dim": head_dim} if head_dim > 0 else {"heads": heads})


def _gated(state: State) -> list[str]:
    """Name the linear layers that make value and gate of a GEGLU."""
    return [name.removesuffix(".weight") for name in state if name.endswith(".ff.net.0.proj.weight")]


def _averaged(state: State, name: str) -> Tensor:
    """Return the average of a weight of the U-Net where the file has it: its name is then without dots."""
    average = _EMA + name.removeprefix("model.").replace(".", "")
    return state[average] if name.startswith(f"{_UNET}.") and average in state else state[name]


def _first_stage(state: State, settings: Settings) -> Conversion | None:
    """Return the conversion of the first stage, if the file has one: a VQGAN, whose codebook only decodes."""
    if not state:
        settings.without_effect(
            "the file has no first stage: the tokenizer that is given scales its own latents",
            *("first_stage_config", "scale_factor"),
        )
        return None
    scale, stage = settings.take("scale_factor", 1.0), settings.section("first_stage_config")
    stage.class_name("VQModelInterface", ("VQModelInterface",))
    vqgan = taming_vqgan(state, stage)
    config = {
        "class_path": "discrete_lit.tokenizers.CodebookLatents",
        "init_args": {"tokenizer": vqgan.config, "scale_factor": scale},
    }
    rules = [(f"tokenizer.{ours}", theirs) for ours, theirs in vqgan.renaming.rules]
    return Conversion(
        config=config,
        tensors=vqgan.tensors,
        renaming=Renaming(rules, vqgan.renaming.levels),
        dropped=vqgan.dropped,
        kept=[f"tokenizer.{name}" for name in vqgan.kept],
    )
