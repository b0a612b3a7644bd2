"""Writing a source of images as webdataset shards.

A folder of shards holds one split: `{split}-000000.tar`, `{split}-000001.tar` and so on, and `manifest.json`. A sample
is up to three files of a tar: `<key>.<extension>`, the image file untouched; `<key>.cls`, the label as ASCII digits,
where it has one; and `<key>.txt`, its captions in UTF-8, one a line, where it has some. The same source and settings
give the same bytes.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import atomic_write, atomic_write_text, content_sha256, file_sha256
from discrete_lit.core.locks import sole_writer
from discrete_lit.data.sources.source import Sample, Source, shuffled

FORMAT = "discrete-lit-shards-1"
MANIFEST = "manifest.json"
_UNFINISHED = "manifest.unfinished.json"
_CLOCKS_DIFFER = 60 * 10**9  # nanoseconds


def write_shards(
    source: Source,
    output: str | os.PathLike[str],
    *,
    split: str,
    samples_per_shard: int = 1000,
    shuffle_seed: int | None = 0,
) -> dict[str, Any]:
    """Write every sample of `source` into shards below `output`, and return the manifest.

    It can be interrupted at any moment and run again: shards that are finished and have the recorded SHA-256 are kept,
    a half-written one, which has a temporary name, is written again. `manifest.json` is written last. The images of a
    finished shard are read again, and compared, only where their files are not older than the shard.

    Args:
        source: the images.
        output: a folder for this split alone; made if it is not there.
        split: name of the split (train, validation or test), with which the names of the shards begin.
        samples_per_shard: samples in each shard but the last. A shard is held in memory before it is written.
        shuffle_seed: order of the samples: by SHA-256 of seed and key, so that it depends on no library and not on the
            order of the source. None keeps the order of the source.

    Returns:
        The content of `manifest.json`: `format`, `split`, `count`, `num_classes`, `classes`, `shuffle_seed`, `source`,
        `source_sha256` (`Source.fingerprint`), `samples_per_shard`, and `shards`, a list of `name`, `count`, `sha256`.

    Raises:
        ValueError: an argument is out of range, `output` holds shards of another source, of other settings (the message
            says what differs) or of images that have changed since, or another process is writing there.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ValueError(f"split {split!r} must be letters, digits and underscores, such as train")
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    plan = {
        "format": FORMAT,
        "split": split,
        "count": len(source),
        "num_classes": len(source.classes),
        "classes": source.classes,
        "shuffle_seed": shuffle_seed,
        "source": source.description,
        "source_sha256": source.fingerprint(),
        "samples_per_shard": samples_per_shard,
    }
    output = Path(output)
    with sole_writer(output, "shards"):
        finished = _finished_shards(output, plan)
        shards: list[dict[str, Any]] = []
        order = _order(source, shuffle_seed)
        with tqdm(total=len(order), desc=f"{split} shards", unit="image", unit_scale=True, disable=None) as progress:
            for start in range(0, len(order), samples_per_shard):
                indices = order[start : start + samples_per_shard]
                name = f"{split}-{len(shards):06d}.tar"
                sha256 = finished.get(name)
                if sha256 is None or not _has_sha256(output / name, sha256):
                    sha256 = _write_shard(output / name, _read(source, indices))
                elif _may_have_changed(source, indices, output / name):
                    _check_unchanged(source, indices, output / name, sha256)
                shards.append({"name": name, "count": len(indices), "sha256": sha256})
                if not (output / MANIFEST).exists():
                    _write_json(output / _UNFINISHED, {**plan, "shards": shards})
                progress.update(len(indices))
        manifest = {**plan, "shards": shards}
        # Its time says when the shards were made: a run that found them finished leaves it alone.
        if not (output / MANIFEST).exists() or read_json(output / MANIFEST) != manifest:
            _write_json(output / MANIFEST, manifest)
        (output / _UNFINISHED).unlink(missing_ok=True)
    return manifest


def _order(source: Source, seed: int | None) -> list[int]:
    if seed is None:
        return list(range(len(source)))
    return shuffled(source, seed)


def _read(source: Source, indices: Sequence[int]) -> list[Sample]:
    # In the order of the source, which is that of the disk: on a spinning disk the shuffle would cost a seek an image.
    samples = {index: source[index] for index in sorted(indices)}
    return [samples[index] for index in indices]


def _write_shard(path: Path, samples: Sequence[Sample]) -> str:
    with atomic_write(path) as file:
        _write_tar(file, samples)
    return file_sha256(path)


def _write_tar(file: IO[bytes], samples: Sequence[Sample]) -> None:
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for sample in samples:
            _add(archive, f"{sample.key}.{sample.extension}", sample.data)
            if sample.label is not None:
                _add(archive, f"{sample.key}.cls", str(sample.label).encode())
            if sample.captions:
                _add(archive, f"{sample.key}.txt", "".join(f"{caption}\n" for caption in sample.captions).encode())


def _may_have_changed(source: Source, indices: Sequence[int], shard: Path) -> bool:
    """Whether a file of the source is not older than the shard, or about as old: two machines' clocks differ."""
    return max(map(source.last_change, indices)) > shard.stat().st_mtime_ns - _CLOCKS_DIFFER


def _check_unchanged(source: Source, indices: Sequence[int], shard: Path, sha256: str) -> None:
    content = io.BytesIO()
    _write_tar(content, _read(source, indices))
    if content_sha256(content.getvalue()) != sha256:
        raise ValueError(
            f"images of {source.description} have changed under the same names and sizes since {shard} was written. "
            f"Choose another output folder, or delete {shard.parent}"
        )


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # A new TarInfo has time, owner and group 0: bytes that depend on nothing but name and content.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    archive.addfile(info, io.BytesIO(data))


def _finished_shards(output: Path, plan: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each shard that an earlier run with the same plan finished."""
    path = next((path for name in (MANIFEST, _UNFINISHED) if (path := output / name).exists()), None)
    if path is None:
        if stranger := next(output.glob("*.tar"), None):
            raise ValueError(
                f"{output} holds {stranger.name} and no manifest: something else wrote it. Choose another output folder"
            )
        # Says from the first moment whose shards these are.
        _write_json(output / _UNFINISHED, {**plan, "shards": []})
        return {}
    try:
        earlier = read_json(path)
        shards = {shard["name"]: shard["sha256"] for shard in earlier["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): delete the folder and run again") from error
    # `source` is for people: the same data may have moved to a folder of another name.
    different = [key for key in plan if key != "source" and earlier.get(key) != plan[key]]
    if different:
        lines = [f"  {key}: {_short(earlier.get(key))} there, {_short(plan[key])} now" for key in different]
        raise ValueError(
            f"{output} holds shards of {earlier.get('source')!r} that differ from what is asked:\n"
            + "\n".join(lines)
            + "\nChoose another output folder, or delete this one"
        )
    return shards


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(content, indent=1))
