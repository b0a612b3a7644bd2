"""`discrete-lit tokenize`: a data set's images or clips to arrays of tokens or of latents."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.checkpoints import load
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.clips import Clips
from discrete_lit.data.encoded_arrays import EncodedWriter
from discrete_lit.data.image_batches import EvaluationCrops
from discrete_lit.data.image_folder import ImageFolder
from discrete_lit.data.image_shards import ImageShards
from discrete_lit.data.latent_arrays import LatentPrecision, LatentStorage, LatentWriter
from discrete_lit.data.loaders import EvaluationLoader
from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.metrics.latent_statistics import overall_deviation, scale_complaint
from discrete_lit.tokenizers import ContinuousTokenizer, Tokenizer, freeze
from discrete_lit.tokenizers.encodec import check_sample_rate


def tokenize(
    ckpt_path: str,
    data: ImageShards | ImageFolder | Clips,
    *,
    output: str,
    split: str = "train",
    crops: Literal["center", "flip", "ten"] = "center",
    ten_crop_scales: tuple[float, ...] = (1.1,),
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    precision: str = "32-true",
    latents: LatentStorage = "moments",
    latent_dtype: LatentPrecision = "float16",
    seed: int = 0,
) -> dict[str, Any]:
    """Encode every image or clip of a split once, or several crops of it, into memory-mapped arrays.

    They are token arrays, or latent arrays where the tokenizer is continuous. Row i of the arrays is sample i of the
    split, whatever the number of devices. The folder's `manifest.json` holds the tokenizer's fingerprint, by which a
    generator with another tokenizer refuses the arrays; it is written last, so an interrupted run leaves nothing that
    passes for complete. Where `data.init_args.captions` is set, all captions of an image are kept beside its codes.

    Args:
        ckpt_path: checkpoint of a Tokenizer or ContinuousTokenizer.
        data: where the images or clips are; its `batch_size` and `num_workers` apply to each device.
        output: folder to write; one that holds a finished array is refused.
        split: `train` or `validation` of the data.
        crops: `center`, the crop of evaluation; `flip`, also its mirror image; or `ten`, the centre, the corners and
            their mirror images. Training on the arrays draws one for each image and epoch.
        ten_crop_scales: the image is cut to a square of this times the image size before; ten crops for each. RAR's
            is 1.1, LlamaGen's are 1.1 and 1.05.
        accelerator: Lightning's; `auto` takes a GPU where there is one.
        devices: on each node; more than one starts a process for each.
        num_nodes: nodes that run this command.
        precision: Lightning's, as for `sample`; ids near a decision boundary depend on it, and the manifest names it.
        latents: of a continuous tokenizer, what is kept of each image: the `moments` of its latents, of which training
            draws anew in each epoch, or one `sample`, which takes half the space.
        latent_dtype: of the numbers of latents.
        seed: of the noise of each `sample`.

    Returns:
        What `manifest.json` holds.

    Raises:
        ValueError: not a tokenizer's checkpoint, no such split or crops, data of another kind, channels or sample rate
            than the tokenizer's, an unreadable image,
            a finished array in the folder.
    """
    tokenizer = load(ckpt_path)
    if not isinstance(tokenizer, Tokenizer | ContinuousTokenizer):
        raise ValueError(
            f"ckpt_path={ckpt_path!r} holds a {type(tokenizer).__name__}, not a Tokenizer or ContinuousTokenizer"
        )
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    if not data.has_split(split):
        raise ValueError(f"data has no {split} split: set data.init_args.{split}")
    if tokenizer.modality != data.modality:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} takes {tokenizer.modality}, and a {type(data).__name__} has {data.modality}: "
            "give data of that kind"
        )
    check_sample_rate(getattr(tokenizer, "sample_rate", None), data)
    channels = getattr(tokenizer, "image_channels", data.image_channels)  # a tokenizer of one's own need not say
    if channels != data.image_channels:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} takes {tokenizer.modality} of {channels} channels: set "
            f"data.init_args.{'channels' if tokenizer.modality == 'audio' else 'image_channels'} to that, it is "
            f"{data.image_channels}"
        )
    cut = EvaluationCrops(crops, tuple(ten_crop_scales))
    precision = resolve_precision(precision, accelerator)
    fabric = make_fabric(accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    fabric.launch()
    writes: type[EncodedWriter] = TokenWriter if isinstance(tokenizer, Tokenizer) else LatentWriter
    if fabric.global_rank == 0:
        described: dict[str, Any] = {
            "count": data.evaluation_source(split, 0, 1).samples,
            "image_size": data.image_size,
            "num_classes": data.num_classes,
            "classes": data.classes,
            "tokenizer": tokenizer.fingerprint(),
            "source": f"{type(data).__name__} {data.locations[split]}",
            "precision": precision,
            "variants": cut.count,
            "captions": data.captions is not None,
        }
        if isinstance(tokenizer, Tokenizer):
            token_shape = tokenizer.token_shape(data.image_size)
            TokenWriter.create(output, token_shape=token_shape, vocab_size=tokenizer.vocab_size, **described)
        else:
            latent_shape = tokenizer.latent_shape(data.image_size)
            LatentWriter.create(output, latent_shape=latent_shape, storage=latents, dtype=latent_dtype, **described)
    fabric.barrier()
    fabric.strategy.precision.convert_module(tokenizer)  # in place
    tokenizer = freeze(tokenizer).to(fabric.device)
    writer = writes(output)
    crops_of_each = cut.count or 1

    def encode(images: Tensor, index: Tensor, crop: int) -> Tensor:
        if isinstance(tokenizer, Tokenizer):
            return tokenizer.encode(images)
        if latents == "moments":
            return torch.stack(tokenizer.moments(images), dim=1)
        return tokenizer.encode(images, CounterRandom(seed, index.to(images.device) * crops_of_each + crop))

    source = data.evaluation_source(split, fabric.global_rank, fabric.world_size, crops=cut)
    # An image that cannot be read would leave its row empty.
    loader = EvaluationLoader(source, data.num_workers, max_bad_fraction=0)
    for batch in tqdm(loader, desc="tokenize", unit="batch", disable=fabric.global_rank > 0):
        with torch.no_grad(), fabric.autocast():
            images = batch[tokenizer.modality].to(fabric.device)
            if cut.count is None:
                codes = encode(images, batch["index"], 0)
            else:  # one crop of all images after the other, so that the batch is what its size says
                each = enumerate(images.unbind(1))
                codes = torch.stack([encode(crop, batch["index"], number) for number, crop in each], dim=1)
        writer.write(batch["index"], codes, batch.get("label"), captions=batch.get("captions"))
    writer.close()
    fabric.barrier()
    manifest = writes.finalise(output) if fabric.global_rank == 0 else writer.manifest
    if "latent_std" in manifest:
        complaint = scale_complaint(overall_deviation(manifest["latent_mean"], manifest["latent_std"], about=0.0))
        if complaint is not None:
            logging.getLogger(__name__).warning("%s: %s", output, complaint)
    fabric.barrier()
    return manifest
