"""The captions of shards, without their images."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from discrete_lit.data.captions import Captions
from discrete_lit.data.media import UndecodableSample
from discrete_lit.data.shard_set import find_shards
from discrete_lit.data.tars import read_samples

_log = logging.getLogger(__name__)


def shard_captions(location: str | Sequence[str], captions: Captions) -> Iterator[tuple[str, ...]]:
    """Read the captions of every image of shards, in their order.

    Images whose captions are missing or broken are left out, and counted in a warning.

    Args:
        location: a folder, file, pattern, URL, or a list of them.
        captions: where they are.

    Raises:
        ValueError: there are no shards, or not one caption in them.
    """
    left_out, found, example = 0, 0, ""
    for shard in find_shards(location).shards:
        for _, sample in read_samples(shard, np.ones(shard.count, dtype=bool), captions=captions.kind):
            try:
                texts = captions.read(sample.captions)
            except UndecodableSample as error:
                left_out, example = left_out + 1, example or f"sample {sample.key!r} of {sample.shard}: {error}"
                continue
            found += any(texts)
            yield texts
    if not found:
        raise ValueError(f"not one of {left_out + found:,} images in {location} has a caption; {example}")
    if left_out:
        _log.warning("left out %d images without a caption, the first is %s", left_out, example)
