"""Audio clips: decoding, resampling, the crop in time, folders and shards, and files that are broken."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sounds import audio_bytes, tone, write_tones

from discrete_lit.data import AudioClips
from discrete_lit.data.audio_clips import decode_audio
from discrete_lit.data.captions import Captions
from discrete_lit.data.media import AUDIO_FILES, UndecodableSample
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources.source import Entry, Source


def loudest_frequency(sound: np.ndarray, sample_rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(np.fft.rfftfreq(len(sound), 1 / sample_rate)[spectrum.argmax()])


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS")])
def test_files_are_read(kind: str, subtype: str | None) -> None:
    sound = tone(440, seconds=0.25, sample_rate=16000)
    found = decode_audio(audio_bytes(sound, 16000, kind, subtype), 16000, channels=1)
    assert found.shape == (1, 4000) and found.dtype == np.float32
    # Vorbis is lossy.
    assert np.abs(found[0] - sound[:, 0]).max() < (0.05 if kind == "OGG" else 1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 24000])
def test_another_sample_rate_is_resampled(rate: int) -> None:
    """A tone stays where it is; one above half the new rate is gone, not folded back."""
    sound = tone(1000, seconds=0.5, sample_rate=16000) + 0.5 * tone(6500, seconds=0.5, sample_rate=16000)
    found = decode_audio(audio_bytes(sound, 16000), rate, channels=1)[0]
    assert abs(len(found) - rate // 2) <= 1
    inside = found[len(found) // 4 : -len(found) // 4]
    assert loudest_frequency(inside, rate) == pytest.approx(1000, abs=12)
    spectrum = np.abs(np.fft.rfft(inside * np.hanning(len(inside))))
    frequencies = np.fft.rfftfreq(len(inside), 1 / rate)
    folded = spectrum[np.abs(frequencies - (rate - 6500)) < 50]
    if rate == 8000:
        assert folded.max() < 0.02 * spectrum.max()


def test_channels() -> None:
    """A mean of a stereo file, mono repeated; of three channels no two are made."""
    stereo = audio_bytes(tone(300, seconds=0.1, sample_rate=8000, channels=2), 8000)
    both, mono = decode_audio(stereo, 8000, channels=2), decode_audio(stereo, 8000, channels=1)
    assert np.abs(both[1]).max() == 0 and np.allclose(mono[0], both[0] / 2, atol=1e-6)
    repeated = decode_audio(audio_bytes(tone(300, seconds=0.1, sample_rate=8000), 8000), 8000, channels=2)
    assert np.array_equal(repeated[0], repeated[1])
    three = audio_bytes(tone(300, seconds=0.1, sample_rate=8000, channels=3), 8000)
    with pytest.raises(UndecodableSample, match="it has 3 channels, and 2 are asked for"):
        decode_audio(three, 8000, channels=2)


def broken_sounds() -> dict[str, tuple[bytes, str]]:
    sound = tone(440, seconds=0.5, sample_rate=8000)
    holes = sound.copy()
    holes[7] = np.nan
    whole = {kind: audio_bytes(sound, 8000, kind) for kind in ("WAV", "FLAC", "OGG")}
    return {
        "nan": (audio_bytes(holes, 8000, subtype="FLOAT"), "1 of its samples are not finite numbers"),
        "empty": (audio_bytes(sound[:0], 8000), "it holds no sample"),
        "text": (b"this is no sound", "LibsndfileError"),
        "nothing": (b"", "LibsndfileError"),
        "cut wav": (whole["WAV"][:3000], "it is cut off: 3,000 of"),
        "cut flac": (whole["FLAC"][: len(whole["FLAC"]) // 2], "cut off|LibsndfileError"),
        "cut ogg": (whole["OGG"][: len(whole["OGG"]) // 2], "it is cut off"),
        # On the boundary of a page nothing but the missing end mark tells.
        "cut ogg page": (whole["OGG"][: whole["OGG"].rfind(b"OggS")], "it is cut off"),
    }


@pytest.mark.parametrize("name", list(broken_sounds()))
def test_broken_files_are_named(name: str) -> None:
    data, message = broken_sounds()[name]
    with pytest.raises(UndecodableSample, match=message):
        decode_audio(data, 8000, channels=1)


def test_a_wav_of_unknown_size_is_read() -> None:
    """Programs that write to a pipe leave the largest number in the place of the size."""
    data = bytearray(audio_bytes(tone(440, seconds=0.1, sample_rate=8000), 8000))
    data[4:8] = struct.pack("<I", 2**32 - 1)
    assert decode_audio(bytes(data), 8000, channels=1).shape == (1, 800)


def data_of(folder: Path, **settings: object) -> AudioClips:
    given = {"sample_rate": 8000, "length": 400, "batch_size": 2, "num_workers": 0, **settings}
    return AudioClips(str(folder), str(folder), **given)  # type: ignore[arg-type]


def test_batches_of_a_folder(tmp_path: Path) -> None:
    write_tones(tmp_path)
    data = data_of(tmp_path, captions=Captions())
    assert data.classes == ["high", "low"] and data.num_classes == 2
    batches = list(data.evaluation_loader("validation", 0, 1))
    assert [tuple(batch["audio"].shape) for batch in batches] == [(2, 1, 400)] * 4
    first = batches[0]
    assert first["key"] == ["high/1.wav", "high/3.wav"] and first["label"].tolist() == [0, 0]
    assert first["caption"] == ["a high tone"] * 2
    # The middle of the clip's 640 samples.
    whole = decode_audio((tmp_path / "high" / "1.wav").read_bytes(), 8000, channels=1)
    assert np.array_equal(first["audio"][0].numpy(), whole[:, 120:520])
    start = next(iter(data_of(tmp_path, crop="start").evaluation_loader("validation", 0, 1)))
    assert np.array_equal(start["audio"][0].numpy(), whole[:, :400])


def test_a_clip_shorter_than_the_window_ends_with_silence(tmp_path: Path) -> None:
    write_tones(tmp_path, count=2, seconds=0.02)
    for batch in data_of(tmp_path, batch_size=1).evaluation_loader("validation", 0, 1):
        assert batch["audio"].abs().amax(dim=-1).all() and not batch["audio"][..., 160:].any()


def training_batches(data: AudioClips, epochs: int = 1) -> list[torch.Tensor]:
    loader = data.training_loader(0, 1)
    return [batch["audio"] for _ in range(epochs) for batch in loader]


def test_crops_belong_to_seed_epoch_and_key(tmp_path: Path) -> None:
    """Another batch size draws the same crops; another epoch or seed draws others."""
    write_tones(tmp_path)
    pairs, singles = (torch.cat(training_batches(data_of(tmp_path, batch_size=size))) for size in (2, 1))
    assert torch.equal(pairs, singles)
    two = torch.cat(training_batches(data_of(tmp_path, batch_size=1), epochs=2))
    assert not torch.equal(two[:8].sort(dim=0).values, two[8:].sort(dim=0).values)
    other = torch.cat(training_batches(data_of(tmp_path, batch_size=1, seed=1)))
    assert not torch.equal(other.sort(dim=0).values, singles.sort(dim=0).values)


class Tones(Source):
    """The files of a folder of tones, as a source of shards."""

    media = AUDIO_FILES

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.wav"))
        entries = [
            Entry(
                f"{path.parent.name}/{path.stem}", "wav", ("high", "low").index(path.parent.name), path.stat().st_size
            )
            for path in self.paths
        ]
        super().__init__("tones", classes=["high", "low"], entries=entries)

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.paths[index].with_suffix(".txt").read_text(),)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """The same tones in a folder and in shards."""
    write_tones(tmp_path / "folder")
    write_shards(Tones(tmp_path / "folder"), tmp_path / "shards", split="train", samples_per_shard=3)
    return {"folder": tmp_path / "folder", "shards": tmp_path / "shards"}


def test_shards_hold_the_same_clips(places: dict[str, Path]) -> None:
    found = {}
    for form, place in places.items():
        batches = list(data_of(place, captions=Captions()).evaluation_loader("validation", 0, 1))
        rows = zip(
            *(torch.cat([batch[name] for batch in batches]) for name in ("audio", "label")),
            [caption for batch in batches for caption in batch["caption"]],
            strict=True,
        )
        found[form] = sorted((label.item(), caption, tuple(sound.flatten().tolist())) for sound, label, caption in rows)
    assert len(found["folder"]) == 8 and found["folder"] == found["shards"]


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_training_resumes_inside_an_epoch(places: dict[str, Path], form: str) -> None:
    whole = training_batches(data_of(places[form]), epochs=2)
    first = data_of(places[form]).training_loader(0, 1)
    taken = iter(first)
    before = [next(taken)["audio"] for _ in range(3)]
    second = data_of(places[form]).training_loader(0, 1)
    second.load_state_dict(first.state_dict())
    after = [batch["audio"] for _ in range(2) for batch in second]
    assert len(whole) == 8 and all(map(torch.equal, whole, before + after))


def test_a_broken_clip_is_replaced_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tones(tmp_path)
    (tmp_path / "low" / "0.wav").write_bytes(b"RIFF")
    batches = training_batches(data_of(tmp_path, max_bad_fraction=0.2))
    assert len(batches) == 4 and all(batch.isfinite().all() for batch in batches)
    assert "skipped bad sample 'low/0.wav'" in caplog.text
    with pytest.raises(ValueError, match="1 of 8 samples are bad"):
        training_batches(data_of(tmp_path, max_bad_fraction=0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_rate": 0}, "sample_rate of audio clips is 0"),
        ({"length": 0}, "length of audio clips is 0"),
        ({"channels": 0}, "channels of audio clips is 0"),
        ({"crop": "end"}, "must be 'random', 'start' or 'middle'"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of(tmp_path, **settings)


def test_a_folder_without_clips(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no audio clips in .*\.mp3, which soundfile does not read here"):
        data_of(tmp_path).evaluation_loader("validation", 0, 1)
