"""`discrete-lit tokenize`: a data set's images or clips to arrays of tokens or of latents."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.checkpoints import load
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.array_parts import (
    WHOLE,
    Part,
    PartsFolder,
    check_join,
    find_part,
    in_ranges,
    tell_missing,
    tell_part,
)
from discrete_lit.core.auto_precision import resolve_precision
from discrete_lit.core.distributed import on_first_rank
from discrete_lit.core.images import pixels_as_floats
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.array_manifest import MANIFEST
from discrete_lit.data.audio_clips import AudioClips
from discrete_lit.data.encoded_arrays import EncodedWriter
from discrete_lit.data.image_batches import EvaluationCrops
from discrete_lit.data.image_folder import ImageFolder
from discrete_lit.data.image_shards import ImageShards
from discrete_lit.data.latent_arrays import LatentPrecision, LatentStorage, LatentWriter
from discrete_lit.data.loaders import EvaluationLoader, rank_range
from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.data.video_clips import VideoClips
from discrete_lit.metrics.latent_statistics import overall_deviation, scale_complaint
from discrete_lit.tokenizers import ContinuousTokenizer, Tokenizer, freeze
from discrete_lit.tokenizers.encodec import check_sample_rate

_SAMPLES = {"image": "images", "video": "clips", "audio": "audio"}


def tokenize(
    ckpt_path: str,
    data: ImageShards | ImageFolder | AudioClips | VideoClips,
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
    part: str | None = None,
    join: int | None = None,
    missing: bool = False,
) -> dict[str, Any]:
    """Encode every image or clip of a split once, or several crops of it, into memory-mapped arrays.

    They are token arrays, or latent arrays where the tokenizer is continuous. Row i of the arrays is sample i of the
    split, whatever the number of devices. The folder's `manifest.json` holds the tokenizer's fingerprint, by which a
    generator with another tokenizer refuses the arrays; it is written last, so an interrupted run leaves nothing that
    passes for complete. Where `data.init_args.captions` is set, all captions of an image are kept beside its codes.

    The work can be cut into n jobs of an array: each runs the command with `part: i/n`, in any order, and behind them
    the command with `join: n` compares the rows of each with the hash that it left, and finishes the array. A batch is
    computed whole by one device, and holds the same images whoever computes it: the arrays are the same bytes for any
    number of parts, devices and interruptions on one kind of device. What was interrupted goes on when it is run again.

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
        part: `i/n`, to encode the i-th of n parts, i from 1; `slurm` for the number of this job in its SLURM array.
        join: n, to finish the array when n parts are done.
        missing: encode nothing, and print the numbers of the parts that are not done, as an array of sbatch takes them;
            the exit status is 1 if there are any.

    Returns:
        What `manifest.json` holds; nothing for a part; `{"missing": [...]}` where that is asked for.

    Raises:
        ValueError: not a tokenizer's checkpoint, no such split or crops, data of another kind, channels or sample rate
            than the tokenizer's, an unreadable image, a finished array in the folder, a part with other settings than
            those that have begun, parts to join that are not there, or whose rows were damaged.
    """
    if missing:
        return tell_missing(output, "tokenize", MANIFEST)
    check_join(part, join)
    own_part = find_part(part, output, "tokenize")
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
            f"ckpt_path={ckpt_path!r} takes {_SAMPLES[tokenizer.modality]} of {channels} channels: set "
            f"data.init_args.{'channels' if tokenizer.modality == 'audio' else 'image_channels'} to that, it is "
            f"{data.image_channels}"
        )
    cut = EvaluationCrops(crops, tuple(ten_crop_scales))
    precision = resolve_precision(precision, accelerator)
    fabric = make_fabric(accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    fabric.launch()
    writes: type[EncodedWriter] = TokenWriter if isinstance(tokenizer, Tokenizer) else LatentWriter
    count = data.evaluation_source(split, 0, 1).samples
    described: dict[str, Any] = {
        "count": count,
        "image_size": data.image_size,
        "num_classes": data.num_classes,
        "classes": data.classes,
        "tokenizer": tokenizer.fingerprint(),
        "source": f"{type(data).__name__} {data.locations[split]}",
        "precision": precision,
        "variants": cut.count,
        "captions": data.captions is not None,
    }
    if isinstance(tokenizer, ContinuousTokenizer):
        described |= {"storage": latents, "dtype": latent_dtype}
    settings = {
        **described,
        "listing": data.listing_sha256(split),
        "crops": [crops, *ten_crop_scales] if crops == "ten" else [crops],
        **data.pipeline.evaluation_settings(),
        "seed": seed,
        "batch_size": data.batch_size,
        "torch": torch.__version__,
    }

    def lay_out() -> None:
        if isinstance(tokenizer, Tokenizer):
            shape = tokenizer.token_shape(data.image_size)
            TokenWriter.create(output, token_shape=shape, vocab_size=tokenizer.vocab_size, **described)
        else:
            LatentWriter.create(output, latent_shape=tokenizer.latent_shape(data.image_size), **described)

    parts = PartsFolder(output, "tokenize")
    if join is not None:
        return on_first_rank(lambda: _join(parts, join, settings, writes))
    this = own_part or WHOLE
    batches = this.batches(count, data.batch_size)
    on_first_rank(lambda: parts.begin(this, settings, lay_out))
    if own_part is not None and on_first_rank(lambda: parts.facts(this)) is not None:
        return tell_part(this, output)
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

    left = on_first_rank(lambda: writer.unfinished(batches, data.batch_size))
    first, last = rank_range(len(left), fabric.global_rank, fabric.world_size)
    source = data.evaluation_source(split, 0, 1, crops=cut, batches=left[first:last])
    # An image that cannot be read would leave its row empty.
    loader = EvaluationLoader(source, data.num_workers, max_bad_fraction=0)
    for batch in tqdm(loader, desc="tokenize", unit="batch", disable=fabric.global_rank > 0):
        moved = {tokenizer.modality: batch[tokenizer.modality].to(fabric.device)}
        images = pixels_as_floats(moved)[tokenizer.modality]
        with torch.no_grad(), fabric.autocast():
            if cut.count is None:
                codes = encode(images, batch["index"], 0)
            else:  # one crop of all images after the other, so that the batch is what its size says
                each = enumerate(images.unbind(1))
                codes = torch.stack([encode(crop, batch["index"], number) for number, crop in each], dim=1)
        writer.write(batch["index"], codes, batch.get("label"), captions=batch.get("captions"))
    writer.close()
    fabric.barrier()

    def finish() -> dict[str, Any]:
        if own_part is None:
            return _finalise(parts, writes)
        rows = this.rows(count, data.batch_size)
        parts.finish(this, {"rows": [rows.start, rows.stop], "sha256": writes(output).rows_sha256(rows)})
        return tell_part(this, output)

    return on_first_rank(finish)


def _join(parts: PartsFolder, number: int, settings: dict[str, Any], writes: type[EncodedWriter]) -> dict[str, Any]:
    """Finish the array of parts whose rows are those that each part has written."""
    parts.check_complete(number, settings)
    writer = writes(parts.output)
    damaged = []
    for part in (Part(each, number) for each in range(1, number + 1)):
        rows, facts = part.rows(settings["count"], settings["batch_size"]), parts.facts(part)
        if facts != {"rows": [rows.start, rows.stop], "sha256": writer.rows_sha256(rows)}:
            parts.reopen(part)
            writer.forget(rows)
            damaged.append(part)
    writer.close()
    if damaged:
        raise ValueError(
            f"the rows of {len(damaged)} of {number} parts in {str(parts.output)!r} are not those that were written, "
            f"such as of part {damaged[0].number}: a damaged file, or a file system that lost them. Run these again: "
            f"`sbatch --array={in_ranges(part.number for part in damaged)}`, or `--part {damaged[0]}`"
        )
    return _finalise(parts, writes)


def _finalise(parts: PartsFolder, writes: type[EncodedWriter]) -> dict[str, Any]:
    """Make the array readable, and say where latents have another scale than training needs."""
    manifest = writes.finalise(parts.output)
    parts.clear()
    if "latent_std" in manifest:
        complaint = scale_complaint(overall_deviation(manifest["latent_mean"], manifest["latent_std"], about=0.0))
        if complaint is not None:
            logging.getLogger(__name__).warning("%s: %s", parts.output, complaint)
    return manifest
