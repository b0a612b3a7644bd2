"""`discrete-lit measure_latents`: the scale that a continuous tokenizer's latents need."""

from typing import Any, Literal

import torch
from tqdm import tqdm

from discrete_lit.checkpoints import load, save
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.images import from_uint8
from discrete_lit.data.image_folder import ImageFolder
from discrete_lit.data.image_shards import ImageShards
from discrete_lit.data.loaders import EvaluationLoader
from discrete_lit.metrics.latent_statistics import LatentStatistics, overall_deviation
from discrete_lit.tokenizers import KLVAE, freeze

_SCALES = ("scale_factor", "latent_mean", "latent_std")


def measure_latents(
    ckpt_path: str,
    data: ImageShards | ImageFolder,
    *,
    split: str = "train",
    num_images: int | None = None,
    scale: Literal["factor", "channels"] = "factor",
    output: str | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> dict[str, Any]:
    """Measure the latents of a KLVAE over a data set, and print the scale with which they have unit deviation.

    Statistics are those of sampled latents, without the scale that the checkpoint has. With `output`, a checkpoint is
    written with the new scale in place of that one: generators then take it from there.

    Args:
        ckpt_path: checkpoint of a KLVAE.
        data: where the images are; read as in evaluation.
        split: `train` or `validation` of the data.
        num_images: how many of its first images; all by default.
        scale: one `factor` for all channels, 1 / deviation of all latents, as LDM and MAR have; or the mean and the
            deviation of each of the `channels`, as generators on VA-VAE's latents have.
        output: the checkpoint to write; none by default.
        accelerator: Lightning's; one device is used.
        precision: Lightning's.

    Returns:
        The settings of the scale, and `channel_mean` and `channel_std`, a number for each channel.

    Raises:
        ValueError: not a KLVAE's checkpoint, no such split, no images, or a channel that is constant.
    """
    tokenizer = load(ckpt_path)
    if not isinstance(tokenizer, KLVAE):
        raise ValueError(f"ckpt_path={ckpt_path!r} holds a {type(tokenizer).__name__}, not a KLVAE")
    if split not in ("train", "validation") or not data.has_split(split):
        raise ValueError(
            f"split={split!r} is no split of data: give train or validation, and set data.init_args.{split}"
        )
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    fabric = make_fabric(accelerator, precision=precision)
    fabric.strategy.precision.convert_module(tokenizer)  # in place
    network = freeze(tokenizer).to(fabric.device)
    network.scale_factor, network.latent_mean, network.latent_std = 1.0, None, None
    statistics = LatentStatistics(network.latent_dim).to(fabric.device)
    source = data.evaluation_source(split, 0, 1)
    left = source.samples if num_images is None else num_images
    for batch in tqdm(EvaluationLoader(source, data.num_workers), desc="measure_latents", unit="batch"):
        images = from_uint8(batch["image"][:left].to(fabric.device))
        with torch.no_grad(), fabric.autocast():
            statistics.update(*network.moments(images))
        left -= len(images)
        if left <= 0:
            break
    mean, deviation = (values.tolist() for values in statistics.compute())
    if not deviation or min(deviation) <= 0:
        raise ValueError(f"latents of these images are constant in a channel: their deviations are {deviation}")
    found: dict[str, Any] = (
        {"scale_factor": 1 / overall_deviation(mean, deviation), "latent_mean": None, "latent_std": None}
        if scale == "factor"
        else {"scale_factor": 1.0, "latent_mean": mean, "latent_std": deviation}
    )
    for name in _SCALES:
        print(f"{name}: {found[name]}")
    if output is not None:
        scaled = load(ckpt_path)
        scaled.hparams["init_args"] = {**scaled.hparams["init_args"], **found}
        save(scaled, output)
    return {**found, "channel_mean": mean, "channel_std": deviation}
