"""`discrete-lit tokenize`: a data set's images to token arrays."""

from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from tqdm import tqdm

from discrete_lit.checkpoints import load
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.data.image_batches import EvaluationCrops
from discrete_lit.data.image_folder import ImageFolder
from discrete_lit.data.image_shards import ImageShards
from discrete_lit.data.loaders import EvaluationLoader
from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.tokenizers import Tokenizer, freeze


def tokenize(
    ckpt_path: str,
    data: ImageShards | ImageFolder,
    *,
    output: str,
    split: str = "train",
    crops: Literal["center", "flip", "ten"] = "center",
    ten_crop_scales: tuple[float, ...] = (1.1,),
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    precision: str = "32-true",
) -> dict[str, Any]:
    """Encode every image of a split once, or several crops of it, in evaluation mode, into memory-mapped token arrays.

    Row i of the arrays is sample i of the split, whatever the number of devices. The folder's `manifest.json` holds
    the tokenizer's fingerprint, by which a generator with another tokenizer refuses the arrays; it is written last, so
    an interrupted run leaves nothing that passes for complete.

    Args:
        ckpt_path: checkpoint of a Tokenizer.
        data: where the images are; its `batch_size` and `num_workers` apply to each device.
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

    Returns:
        What `manifest.json` holds.

    Raises:
        ValueError: not a tokenizer's checkpoint, no such split or crops, images of other channels, an unreadable image,
            a finished array in the folder.
    """
    tokenizer = load(ckpt_path)
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"ckpt_path={ckpt_path!r} holds a {type(tokenizer).__name__}, not a Tokenizer")
    if split not in ("train", "validation"):
        raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
    if not data.has_split(split):
        raise ValueError(f"data has no {split} split: set data.init_args.{split}")
    channels = getattr(tokenizer, "image_channels", data.image_channels)  # a tokenizer of one's own need not say
    if channels != data.image_channels:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} takes images of {channels} channels: set data.init_args.image_channels to that, "
            f"it is {data.image_channels}"
        )
    cut = EvaluationCrops(crops, tuple(ten_crop_scales))
    precision = resolve_precision(precision, accelerator)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    if fabric.global_rank == 0:
        TokenWriter.create(
            output,
            count=data.evaluation_source(split, 0, 1).samples,
            token_shape=tokenizer.token_shape(data.image_size),
            vocab_size=tokenizer.vocab_size,
            image_size=data.image_size,
            num_classes=data.num_classes,
            classes=data.classes,
            tokenizer=tokenizer.fingerprint(),
            source=f"{type(data).__name__} {data.locations[split]}",
            precision=precision,
            variants=cut.count,
        )
    fabric.barrier()
    fabric.strategy.precision.convert_module(tokenizer)  # in place
    tokenizer = freeze(tokenizer).to(fabric.device)
    writer = TokenWriter(output)
    source = data.evaluation_source(split, fabric.global_rank, fabric.world_size, crops=cut)
    # An image that cannot be read would leave its row empty.
    loader = EvaluationLoader(source, data.num_workers, max_bad_fraction=0)
    for batch in tqdm(loader, desc="tokenize", unit="batch", disable=fabric.global_rank > 0):
        with torch.no_grad(), fabric.autocast():
            images = batch["image"].to(fabric.device)
            if cut.count is None:
                tokens = tokenizer.encode(images)
            else:  # one crop of all images after the other, so that the batch is what its size says
                tokens = torch.stack([tokenizer.encode(crop) for crop in images.unbind(1)], dim=1)
        writer.write(batch["index"], tokens, batch.get("label"))
    writer.close()
    fabric.barrier()
    manifest = TokenWriter.finalise(output) if fabric.global_rank == 0 else writer.manifest
    fabric.barrier()
    return manifest
