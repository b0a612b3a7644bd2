"""`discrete-lit encode_captions`: the captions beside token or latent arrays to vectors of a text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from discrete_lit.cli.devices import make_fabric
from discrete_lit.data.array_manifest import read_array_manifest
from discrete_lit.data.caption_features import write_caption_features
from discrete_lit.data.caption_file import CaptionFile
from discrete_lit.tokenizers.text_encoder import TextEncoder


def encode_captions(
    text_encoder: TextEncoder, arrays: str, *, batch_size: int = 256, accelerator: str = "auto"
) -> dict[str, Any]:
    """Encode the captions beside token or latent arrays once, by a frozen text encoder.

    Training on the arrays with `context: true` then reads vectors in place of running the encoder, which pays for a
    large one. Equal captions are encoded once. A generator refuses the vectors of another encoder than its own.

    Args:
        text_encoder: that of the generator, with the same settings.
        arrays: folder that `discrete-lit tokenize` wrote of data with captions; the vectors go there.
        batch_size: captions at a time.
        accelerator: Lightning's; `auto` takes a GPU where there is one.

    Returns:
        What `context.json` holds.

    Raises:
        ValueError: arrays without captions, or a caption that is too long.
    """
    folder = Path(arrays).expanduser()
    manifest = read_array_manifest(folder)
    if not isinstance(manifest, dict) or not manifest.get("captions"):
        raise ValueError(
            f"the arrays in {folder} have no captions beside them: run `discrete-lit tokenize` on data with "
            "data.init_args.captions"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    fabric = make_fabric(accelerator)
    fingerprint = text_encoder.fingerprint()
    encoder = text_encoder.to(fabric.device).eval()
    progress = tqdm(desc="encode captions", unit="caption", disable=None)

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            vectors, valid = encoder(texts)
        progress.update(len(texts))
        return vectors, valid

    with progress:
        return write_caption_features(
            folder,
            CaptionFile(folder, manifest["count"]),
            encode,
            count=manifest["count"],
            length=encoder.length,
            dim=encoder.dim,
            encoder=fingerprint,
            batch_size=batch_size,
        )
