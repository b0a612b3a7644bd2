"""`discrete-lit shards`: a data set into webdataset shards."""

from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources.source import Source


def shards(
    source: Source, output: str, split: str, samples_per_shard: int = 1000, shuffle_seed: int | None = 0
) -> None:
    """Write the images of a source as webdataset shards with a manifest.

    The image files are copied as they are. Interrupted, run it again: finished shards are checked and kept.

    Args:
        source: Where the images come from, for example `class_path: discrete_lit.data.sources.ClassFolders`.
        output: Folder for the shards of this split.
        split: Name of the split: train, validation or test.
        samples_per_shard: Samples in each shard but the last.
        shuffle_seed: Seed of the one fixed shuffle; null keeps the order of the source.

    Raises:
        ValueError: The source cannot be read, or `output` holds shards of another source or other settings.
    """
    manifest = write_shards(source, output, split=split, samples_per_shard=samples_per_shard, shuffle_seed=shuffle_seed)
    classes, files = manifest["num_classes"], len(manifest["shards"])
    kind = f"of {classes} classes" if classes else "without labels"
    print(f"{output}: {manifest['count']:,} {source.media.name}s {kind} in {files} shards")
