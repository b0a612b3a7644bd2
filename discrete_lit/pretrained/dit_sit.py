"""DiT, of facebookresearch/DiT, and SiT, of willisma/SiT: class-conditional transformers over KL-8 latents.

SiT's repository began with DiT's network, and its files have the same names. What differs is what the output means.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones.embeddings import grid_coordinates, sine_cosine_table
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, arrange, register
from discrete_lit.pretrained.layouts import TIMM_BLOCK, head_count, in_blocks, square
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_MARKS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.adaLN_modulation.1.weight")
# The number of heads of S, B, L and XL, by width.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Guidance of the published figures, of the first three channels: FID 2.27 of DiT-XL/2 and 2.06 of SiT-XL/2.
_GUIDANCE, _GUIDED, _STEPS = 1.5, 3, 250
_RULES = [
    ("patch_embedding.{rest}", "x_embedder.proj.{rest}"),
    ("time_embedding.layers.{layer}.{rest}", "t_embedder.mlp.{layer}.{rest}"),
    ("class_embedding.weight", "y_embedder.embedding_table.weight"),
    *in_blocks("blocks.{block}", [*TIMM_BLOCK, ("modulation.project.{rest}", "adaLN_modulation.1.{rest}")]),
    ("final_modulation.project.{rest}", "final_layer.adaLN_modulation.1.{rest}"),
    ("output.{rest}", "final_layer.linear.{rest}"),
]


@register("dit", marks=_MARKS, wrappers=("ema", "model"))
def dit(state: State, settings: Settings) -> Conversion:
    """Convert `DiT-XL-2-256x256.pt` or `DiT-XL-2-512x512.pt`, or a checkpoint of the repository's training."""
    channels = state["x_embedder.proj.weight"].shape[1]
    learned = _outputs(state, settings) == 2 * channels
    denoiser = _denoiser({"class_path": "ScheduledPath", "init_args": {"schedule": "linear"}}, "noise", learned)
    variance = "learned" if learned else "largest"
    solver = {"class_path": "discrete_lit.diffusion.solvers.DDPM", "init_args": {"steps": _STEPS, "variance": variance}}
    return _conversion(state, settings, solver=solver, arrangements=[], denoiser=denoiser)


@register("sit", marks=_MARKS, wrappers=("ema", "model"))
def sit(state: State, settings: Settings) -> Conversion:
    """Convert `SiT-XL-2-256x256.pt`, or a checkpoint of the repository's training.

    Its time runs from noise to data, and its velocity with it: ours is minus that, so that the output's weights change
    their signs. The second half of the published outputs is never read, and is not kept.
    """
    channels, patch = state["x_embedder.proj.weight"].shape[1], state["x_embedder.proj.weight"].shape[-1]
    outputs = _outputs(state, settings)
    paths = {"Linear": "RectifiedPath", "GVP": "TrigonometricPath"}
    path = paths[settings.take("path_type", "Linear", tuple(paths))]
    settings.agree({"prediction": "velocity", "loss_weight": None}, "every model that is read has")
    settings.without_effect("they are the ends of the times of training and sampling", "train_eps", "sample_eps")

    def towards_noise(values: Tensor) -> list[Tensor]:
        by_channel = rearrange(values, "(pixels c) ... -> pixels c ...", pixels=patch**2, c=outputs)
        return [-by_channel[:, :channels].flatten(0, 1)]

    names = [f"final_layer.linear.{name}" for name in ("weight", "bias")]
    return _conversion(
        state,
        settings,
        solver={"class_path": "discrete_lit.diffusion.solvers.EulerMaruyama", "init_args": {"steps": _STEPS}},
        arrangements=[Arrangement([name], [name], towards_noise) for name in names],
        denoiser=_denoiser({"class_path": path}, "velocity", False),
        time_input="data",
        time_scale=1.0,
    )


def _outputs(state: State, settings: Settings) -> int:
    """Return the channels of the output: as many as the latents', or twice as many.

    Raises:
        ValueError: another number, or another one than the configuration says.
    """
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    outputs, left = divmod(len(state["final_layer.linear.weight"]), patch**2)
    if left or outputs not in (channels, 2 * channels):
        raise ValueError(f"{state.source!r} has {outputs} outputs for {channels} channels, not as many or twice that")
    settings.agree({"learn_sigma": outputs == 2 * channels})
    return outputs


def _denoiser(path: dict[str, Any], prediction: str, learned_variance: bool) -> dict[str, Any]:
    path = {**path, "class_path": f"discrete_lit.diffusion.gaussian.{path['class_path']}"}
    return {
        "class_path": "discrete_lit.diffusion.gaussian.GaussianDenoiser",
        "init_args": {"path": path, "prediction": prediction, "learned_variance": learned_variance},
    }


def _conversion(
    state: State, settings: Settings, *, solver: dict[str, Any], arrangements: list[Arrangement], **options: Any
) -> Conversion:
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    grid = square(state, state["pos_embed"].shape[1])
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    found = {
        "input_size": patch * grid[0],
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": state.count("blocks.{}"),
        "mlp_ratio": hidden / width,
    }
    settings.agree(found)
    rows = len(state["y_embedder.embedding_table.weight"])
    dropout, classes = settings.take("class_dropout_prob", 0.1), settings.optional("num_classes", int)
    if classes is None:
        classes = rows if dropout == 0 else rows - 1
    if rows != classes + int(dropout > 0) or classes < 1:
        raise ValueError(
            f"{state.source!r} has {rows} class embeddings; reference_config has num_classes={classes} and "
            f"class_dropout_prob={dropout}, which make {classes + int(dropout > 0)}"
        )

    def with_null(table: Tensor) -> list[Tensor]:
        return [table if dropout else torch.cat((table, torch.zeros_like(table[:1])))]

    def check_positions(table: Tensor) -> list[Any]:
        expected = sine_cosine_table(grid_coordinates(grid).flip(1), width)
        if not torch.allclose(table[0].float(), expected, atol=1e-5):
            raise ValueError(f"{state.source!r} has a 'pos_embed' other than the fixed sines and cosines of DiT")
        return []

    patches, classes_name = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
    arranged = arrange(
        state,
        [
            Arrangement(["pos_embed"], [], check_positions),
            Arrangement([patches], [patches], lambda kernel: [kernel.flatten(1)]),
            Arrangement([classes_name], [classes_name], with_null),
            *arrangements,
        ],
    )
    backbone = {
        "width": width,
        "depth": found["depth"],
        "heads": head_count(settings, "num_heads", _HEADS.get(width, max(1, width // 64)), width),
        "patch_size": patch,
        "mlp_hidden": hidden,
    }
    guidance = {"guidance_scale": _GUIDANCE, "guided_channels": _GUIDED} if dropout and channels > _GUIDED else {}
    return Conversion(
        config={
            "class_path": "discrete_lit.generators.LatentDiffusion",
            "init_args": {
                "num_classes": classes,
                "backbone": {"class_path": "discrete_lit.backbones.DiT", "init_args": backbone},
                "sampler": {
                    "class_path": "discrete_lit.samplers.GuidedSolver",
                    "init_args": {"solver": solver, **guidance},
                },
                "label_dropout": dropout,
                **options,
            },
        },
        tensors=arranged,
        renaming=Renaming(_RULES),
        latents=(channels, *(patch * side for side in grid)),
    )
