"""kakaobrain/rq-vae-transformer: RQ-VAE, the tokenizer of RQ-Transformer."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained import taming
from discrete_lit.pretrained.conversion import Conversion, register
from discrete_lit.pretrained.layouts import IN_TRAINING
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_CODEBOOK = "quantizer.codebooks"
_PARTS = {"codes": "weight", "cluster_size": "cluster_size_ema", "embedding_sum": "embed_ema"}
_EVERY = "every model that is read has"


@register("rq_vae", marks=(*taming.MARKS, f"{_CODEBOOK}.0.weight"), wrappers=("state_dict",), section="arch")
def rq_vae(state: State, settings: Settings) -> Conversion:
    """Convert `stage1/model.pt`.

    A codebook that all depths share stands in the file once for each of them, and has a last row that is no code.
    """
    depth = state.count(f"{_CODEBOOK}.{{}}")
    rows, code_dim = state[f"{_CODEBOOK}.0.weight"].shape
    settings.agree({"type": "rq-vae", "code_hier": 1})
    settings.without_effect("it is about the training", "gan", "ema")
    arguments = settings.section("hparams") if "hparams" in settings else settings
    arguments.agree({"bottleneck_type": "rq", "embed_dim": code_dim, "n_embed": rows - 1})
    arguments.agree({"use_padding_idx": False}, _EVERY)
    arguments.without_effect(IN_TRAINING, "masked_dropout")
    _check_shapes(state, arguments, depth, code_dim)
    shared = all(
        torch.equal(state[f"{_CODEBOOK}.0.{part}"], state[f"{_CODEBOOK}.{number}.{part}"])
        for number in range(depth)
        for part in _PARTS.values()
    )
    arguments.agree({"shared_codebook": shared})
    restarted = arguments.take("restart_unused_codes", True)
    config: dict[str, Any] = {
        "class_path": "discrete_lit.tokenizers.RQVAE",
        "init_args": {
            "network": taming.network(state, settings),
            "codebook_size": rows - 1,
            "code_dim": code_dim,
            "depth": depth,
            "shared_codebook": shared,
            "codebook_update": "ema",
            "commitment_weight": arguments.take("latent_loss_weight", 0.25),
            "decay": arguments.take("decay", 0.99),
            "codebook_init": "uniform",
            "revive_below": 1.0 if restarted else None,
            "reconstruction_loss": {"mse": "l2", "l1": "l1"}[arguments.take("loss_type", "mse", ("mse", "l1"))],
        },
    }
    renaming = [(f"{_CODEBOOK}.{{depth}}.{own}", f"{_CODEBOOK}.{{depth}}.{theirs}") for own, theirs in _PARTS.items()]
    return Conversion(
        config=config,
        tensors=_codebooks(state, range(1 if shared else depth)),
        renaming=taming.LAYOUT.renaming(taming.LAYOUT.levels(state), renaming),
        kept=(f"{_CODEBOOK}.*.steps",),
    )


def _codebooks(state: State, kept: range) -> dict[str, Tensor]:
    """Return the tensors with the codebooks of these depths alone, without their row that is no code."""
    tensors = {name: value for name, value in state.items() if not name.startswith(f"{_CODEBOOK}.")}
    for number in kept:
        for part in _PARTS.values():
            name = f"{_CODEBOOK}.{number}.{part}"
            tensors[name] = state[name][:-1] if part == "weight" else state[name]
    return tensors


def _check_shapes(state: State, arguments: Settings, depth: int, code_dim: int) -> None:
    """Compare what is said of the shapes of latents and codes with the tensors.

    Raises:
        ValueError: a position of the codes stands for several latents, which ours has no place for.
    """
    latents = len(state["quant_conv.bias"])
    names = ("latent_shape", "code_shape")
    given = {name: arguments.take(name, [0, 0, 0]) for name in names if name in arguments}
    sides = {tuple(shape[:2]) for shape in given.values()}
    if latents != code_dim or len(sides) > 1:
        raise ValueError(
            f"{state.source!r} makes one position of codes of several latents ({latents} channels of a latent, "
            f"{code_dim} of a code, {given}): one of each is read"
        )
    lasts = {"latent_shape": latents, "code_shape": depth}
    for name, shape in given.items():
        if shape[2:] != [lasts[name]]:
            raise ValueError(
                f"reference_config has {arguments.where(name)}={shape}, but the tensors have {lasts[name]}"
            )
