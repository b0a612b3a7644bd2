"""GIDD (dvruette/gidd): text diffusion models whose noise is masks and wrong ids, in the layout of Hugging Face.

The transformer is the DDiT of MDLM; `sedd_mdlm.py` has its names.
"""

from math import exp
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Tokens, register
from discrete_lit.pretrained.layouts import generator_conversion, head_count, sampled_by
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.sedd_mdlm import HEAD_WIDTH, ddit, neighbouring_pairs, rules, sizes, without_classes
from discrete_lit.pretrained.settings import Settings

# Where no uniform ids are asked for, the reference has as many as this, exp(-`clip_noise`).
_LEAST_UNIFORM = exp(-20)
# What the reference's MDLM clips its mask probability with.
_MDLM_EPSILON = 1e-4
_OF_THE_LIBRARY = (
    *("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
    *("id2label", "label2id", "return_dict", "problem_type", "output_attentions", "output_hidden_states"),
)


@register(
    "gidd",
    marks=("vocab_embed.embedding", "sigma_map.mlp.0.weight", "rotary_emb.cos_cached"),
    wrappers=("state_dict",),
    section=None,
)
def gidd(state: State, settings: Settings) -> Conversion:
    """Convert `model.safetensors` of `dvruette/gidd-{small,base}-p_unif-{0.0,0.1,0.2}`; `config.json` beside it tells
    `p_uniform`, which the tensors do not.

    The ids are those of GPT-2's vocabulary. The mask, the last id of the reference, is behind them; its logit, which
    the reference never uses, is left out. `diffusion_process: mdlm` is the repository's baseline, with masks alone.
    """
    every = "every model that is read has"
    embedding, output = "vocab_embed.embedding", "output_layer.linear"
    rows, (width, depth, condition_width) = len(state[embedding]), sizes(state, "")
    length = state["rotary_emb.cos_cached"].shape[1]
    settings.agree(
        {
            "vocab_size": rows,
            "max_seq_len": length,
            "hidden_size": width,
            "timestep_cond_dim": condition_width,
            "num_hidden_layers": depth,
        }
    )
    settings.agree({"mask_token_id": rows - 1}, "its mask is the last of all ids, which is")
    settings.agree({"model_type": "dit", "clip_noise": 20, "gamma": 1.0}, every)
    settings.agree({"loss_type": settings.take("diffusion_process", "gidd", ("gidd", "mdlm"))}, "its noise is that of")
    settings.without_effect("it is about the library that wrote the file", *_OF_THE_LIBRARY)
    heads = head_count(settings, "num_attention_heads", max(1, width // HEAD_WIDTH), width)
    backbone = ddit(state, "", heads) | {
        "dropout": settings.take("attention_dropout", 0.0),
        "dropout_places": ["attention_output", "mlp_output"],
    }
    names = [f"{output}.weight", f"{output}.bias"]
    return generator_conversion(
        "DiscreteDiffusion",
        state,
        tokens=Tokens(rows - 1, (length,)),
        num_classes=1,
        backbone=backbone,
        rules=rules(""),
        arrangements=[
            _usual_tables(length, width // heads),
            neighbouring_pairs("", heads),
            without_classes(""),
            Arrangement(names, names, lambda weight, bias: [weight[:-1], bias[:-1]]),
        ],
        head={"class_path": "discrete_lit.diffusion.LeaveOneOutHead"},
        time_input="unit_time",
        label_dropout=0.0,
        sampler=sampled_by("AncestralSampler", steps=settings.take("steps", 128), min_p=settings.take("min_p", 0.0)),
        **_noise(state, settings),
    )


def _noise(state: State, settings: Settings) -> dict[str, Any]:
    """Return the configuration of process, schedule and loss."""
    home = "discrete_lit.diffusion"
    uniform, margin = settings.optional("p_uniform", float), settings.take("t_eps", 1e-4)
    limits = {"lowest": settings.take("min_loss_weight", 0.0), "highest": settings.take("max_loss_weight", 2.0)}
    weighting = settings.take("loss_weighting", "dynamic", ("dynamic", "clip", "none"))
    if settings.take("diffusion_process", "gidd") == "mdlm":
        return {
            "process": {"class_path": f"{home}.AbsorbingProcess"},
            "schedule": {"class_path": f"{home}.LogLinearSchedule", "init_args": {"epsilon": _MDLM_EPSILON}},
            "loss": {"class_path": f"{home}.losses.MaskedCrossEntropy"},
        }
    if uniform is None:
        raise ValueError(
            f"the weights of {state.source!r} do not tell how many ids noise draws uniformly: give p_uniform in "
            "reference_config, as its config.json does; 0.0, 0.1 or 0.2 in the published ones"
        )
    share = {"uniform_fraction": max(uniform, _LEAST_UNIFORM)}
    loss: dict[str, Any] = {"class_path": f"{home}.losses.ContinuousBound", "init_args": {"time_margin": margin}}
    if weighting != "none":
        loss = {
            "class_path": f"{home}.GIDDLoss",
            "init_args": {"weighting": weighting, "time_margin": margin, **limits},
        }
    return {
        "process": {"class_path": f"{home}.GIDDProcess", "init_args": share},
        "schedule": {"class_path": f"{home}.GIDDSchedule", "init_args": share},
        "loss": loss,
    }


def _usual_tables(length: int, head_dim: int) -> Arrangement:
    """Drop the tables of the rotary positions, after a check: of base 10000, and without effect on values."""

    def check(cosines: Tensor, sines: Tensor) -> list[Tensor]:
        angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        turned = torch.cat((angles, angles), dim=1)[:, None]
        angles = torch.cat((turned, turned, torch.zeros_like(turned)), dim=1)[None, :, :, None]
        for found, usual in ((cosines, angles.cos()), (sines, angles.sin())):
            if found.shape != usual.shape or not torch.allclose(found.float(), usual, rtol=0, atol=1e-2):
                raise ValueError("rotary_emb.cos_cached or sin_cached is not that of base 10000, which ours has")
        return []

    return Arrangement(["rotary_emb.cos_cached", "rotary_emb.sin_cached"], [], check)
