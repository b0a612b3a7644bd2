"""`discrete-lit evaluate_audio`: sets of audio clips against real ones, to a report."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete_lit.checkpoints import load
from discrete_lit.cli.clip_sets import check_splits, count_clips, real_clips, write_report
from discrete_lit.cli.devices import make_fabric
from discrete_lit.core.files import Npz, file_sha256
from discrete_lit.core.provenance import environment
from discrete_lit.data.audio_clips import AudioClips
from discrete_lit.data.data_module import Split
from discrete_lit.metrics.audio_features import AudioFeatures, MelStatistics
from discrete_lit.metrics.frechet import compare
from discrete_lit.metrics.moments import FeatureMoments, Moments
from discrete_lit.metrics.spectral import SISNR, SpectralDistance
from discrete_lit.tokenizers import EnCodec, freeze


def evaluate_audio(
    data: AudioClips,
    output: str,
    *,
    num_clips: int | None = None,
    samples: dict[str, str] | None = None,
    reconstructions: dict[str, str] | None = None,
    extractor: AudioFeatures | None = None,
    accelerator: str = "auto",
) -> dict[str, Any]:
    """Measure sets of clips at one count against the clips of training, and report them in one table.

    Each set is a row with a Fréchet audio distance over the extractor's features, `FAD-<extractor>`. A codec is a row
    for each of its numbers of books, with bits a second, SI-SNR and spectral distance. The first row is the real clips
    of validation, the floor of the distances. Writes `report.json` and `report.md` into `output`, and prints the table.

    Args:
        data: of clips: `train` is the reference; clips of `validation` are reconstructed.
        output: folder of the report.
        num_clips: of each row, the first ones; as many as validation has by default. A distance depends on it.
        samples: name in the table to the `samples.npz` of `discrete-lit sample`.
        reconstructions: name in the table to the checkpoint of a codec.
        extractor: of features; `MelStatistics` at the data's sample rate by default.
        accelerator: Lightning's; `auto` takes a GPU where there is one.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: no row, a split that is missing, a set that is too small or of another sample rate, or a checkpoint
            of another kind.
    """
    if not (samples or reconstructions):
        raise ValueError("there is nothing to measure: give samples or reconstructions")
    check_splits(data)
    count = count_clips(data, "validation", asked=num_clips, setting="num_clips", least=2)
    of_reference = count_clips(data, "train", asked=None, setting="num_reference", least=2)
    device = make_fabric(accelerator).device
    features = (extractor or MelStatistics(data.sample_rate)).to(device)
    if features.sample_rate != data.sample_rate:
        raise ValueError(
            f"{features.name} takes {features.sample_rate} samples a second, the data have {data.sample_rate}: set "
            "data.init_args.sample_rate to that, and files are resampled"
        )
    drawn = {name: _drawn(name, path, data, count) for name, path in (samples or {}).items()}
    codecs = {name: _codec(path, data).to(device) for name, path in (reconstructions or {}).items()}
    if set(drawn) & set(codecs):
        raise ValueError(f"two rows of the table have the same name: {', '.join(sorted(set(drawn) & set(codecs)))}")

    reference = _moments(features, _clips(data, "train", of_reference, device=device))
    place = str(data.locations["train"])
    rows: list[dict[str, Any]] = []

    def add(name: str, moments: Moments, **figures: float) -> None:
        rows.append({"name": name, **asdict(compare(features, moments, reference, place)), **figures})

    add("real clips", _moments(features, _clips(data, "validation", count, device=device)))
    for name, codec in codecs.items():
        for books in range(1, codec.depth + 1):
            ratio = SISNR().to(device)
            distance = SpectralDistance(data.sample_rate, windows=_windows(data.image_size[0])).to(device)
            sums = FeatureMoments(features)
            for clips in _clips(data, "validation", count, device=device):
                made = codec.reconstruct_by(clips, books)
                ratio.update(made, clips)
                distance.update(made, clips)
                sums.update(features(made))
            rate = codec.bits_per_second / codec.books * books
            figures = {"bits_per_second": rate, "si_snr": float(ratio.compute())}
            add(f"{name}, {books} books", sums.compute(), **figures, spectral_distance=float(distance.compute()))
    for name, clips in drawn.items():
        add(name, _moments(features, (part.to(device) for part in clips.split(data.batch_size))))

    table = markdown(rows, reference=f"{place}, {reference.count:,} clips")
    files = {**(samples or {}), **(reconstructions or {})}
    report = {
        "rows": rows,
        "reference": place,
        "reference_count": reference.count,
        "files": {name: file_sha256(path) for name, path in files.items()},
        **environment(device),
    }
    write_report(output, report, table)
    return report


def markdown(rows: list[dict[str, Any]], *, reference: str) -> str:
    """Write the table of a report, and under it what the distances are and their limits."""
    first = rows[0]
    lines = [f"| | bits/s | SI-SNR (dB) | spectral distance | {first['metric']} |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        known = (("bits_per_second", ",.0f"), ("si_snr", ".2f"), ("spectral_distance", ".3f"))
        cells = [format(row[name], form) if name in row else "" for name, form in known]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['value']:.3f} |")
    notes = sorted({note for row in rows for note in row["notes"]})
    lines += ["", f"{first['count']:,} clips each against {reference}. {first['protocol']}."]
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def _windows(length: int) -> tuple[int, ...]:
    return tuple(window for window in (64, 128, 256, 512, 1024, 2048) if window <= length) or (4,)


def _moments(features: AudioFeatures, batches: Iterator[Tensor]) -> Moments:
    sums = FeatureMoments(features)
    for clips in batches:
        sums.update(features(clips))
    return sums.compute()


def _clips(data: AudioClips, split: Split, count: int, *, device: torch.device) -> Iterator[Tensor]:
    return (batch["audio"].to(device) for batch in real_clips(data, split, count))


def _drawn(name: str, path: str, data: AudioClips, count: int) -> Tensor:
    """Read the clips that `discrete-lit sample` wrote, `(N, C, T)` in [-1, 1]."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"{name}: {path!r} does not exist; `discrete-lit sample` writes samples.npz")
    with Npz(path) as file:
        header = file.headers.get("audio")
        if header is None or header.dtype != np.int16 or len(header.shape) != 3:
            raise ValueError(f"{name}: {path!r} holds {sorted(file.headers)}, audio (N, T, C) of int16 is needed")
        if header.shape[0] < count:
            raise ValueError(f"{name}: {path!r} has {header.shape[0]:,} clips, {count:,} are measured: set num_clips")
        rate, clips = int(file.read("sample_rate")), file.read("audio")[:count]
    if rate != data.sample_rate:
        raise ValueError(f"{name}: {path!r} has {rate} samples a second, the data have {data.sample_rate}")
    return torch.from_numpy(clips).movedim(-1, 1).float() / 32767


def _codec(path: str, data: AudioClips) -> EnCodec:
    codec = load(path)
    if not isinstance(codec, EnCodec):
        raise ValueError(f"reconstructions={path!r} holds a {type(codec).__name__}, not a codec of audio")
    if (codec.sample_rate, codec.image_channels) != (data.sample_rate, data.image_channels):
        raise ValueError(
            f"reconstructions={path!r} takes {codec.sample_rate} samples a second of {codec.image_channels} channels; "
            f"the data have {data.sample_rate} of {data.image_channels}: set sample_rate and channels of the data"
        )
    return freeze(codec)
