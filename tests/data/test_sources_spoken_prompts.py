"""The spoken prompts of Asterisk: which files are samples, their classes, and what they say."""

from pathlib import Path

import numpy as np
import pytest
from helpers.sounds import audio_bytes, tone

from discrete_lit.data import AudioClips
from discrete_lit.data.audio_clips import decode_audio
from discrete_lit.data.captions import Captions
from discrete_lit.data.shard_writer import write_shards
from discrete_lit.data.sources import SpokenDigits, SpokenPrompts
from discrete_lit.data.sources.spoken_prompts import DIGITS, prompt_text


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The layout of Debian's package, with tones."""
    root = tmp_path / "en_US_f_Allison"
    names = [f"digits/{number}" for number in range(20)] + [f"prompt-{number}" for number in range(40)]
    for name in [*names, "letters/a"]:
        path = root / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio_bytes(tone(300, seconds=0.05, sample_rate=8000), 8000))
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("digits/7", "seven"),
        ("digits/13", "thirteen"),
        ("digits/80", "eighty"),
        ("digits/h-1", "first"),
        ("digits/h-20", "twentieth"),
        ("digits/h-12", "twelfth"),
        ("digits/h-hundred", "hundredth"),
        ("digits/day-0", "sunday"),
        ("digits/mon-11", "december"),
        ("letters/w", "w"),
        ("vm-and", "vm and"),
        ("agent-loggedoff", "agent loggedoff"),
    ],
)
def test_names_as_words(name: str, text: str) -> None:
    assert prompt_text(name) == text


def test_splits_are_disjoint_and_whole(package: Path) -> None:
    train, test = (SpokenPrompts(package, split) for split in ("train", "test"))
    keys = [{entry.key for entry in source.entries} for source in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 61 and keys[1]
    assert train.classes == ["digits", "letters", "prompts"]
    labels = {entry.key: train.classes[entry.label] for entry in train.entries}
    assert labels["digits/2"] == "digits" and set(labels.values()) <= set(train.classes)


def test_ten_words_go_through_shards_to_batches(package: Path, tmp_path: Path) -> None:
    source = SpokenPrompts(package, "train", part="digits")
    assert source.classes == list(DIGITS) and len(source) == 10
    write_shards(source, tmp_path / "words", split="train")
    data = AudioClips(
        str(tmp_path / "words"), sample_rate=8000, length=400, batch_size=10, num_workers=0, captions=Captions()
    )
    (batch,) = data.evaluation_loader("train", 0, 1)
    assert [DIGITS[label] for label in batch["label"]] == batch["caption"] and len(set(batch["caption"])) == 10


def test_folders_without_prompts(tmp_path: Path, package: Path) -> None:
    with pytest.raises(ValueError, match="holds no sounds: give the folder sounds of Debian's"):
        SpokenPrompts(tmp_path / "nothing", "train")
    (package / "digits" / "4.wav").unlink()
    with pytest.raises(ValueError, match="holds 9 of the ten digits"):
        SpokenPrompts(package, "train", part="digits")


def test_pairs_of_digits_hold_out_pairs(package: Path) -> None:
    """Each clip says its two words, one in each half; the pairs of the splits share no pair."""
    train, test = (SpokenDigits(package, split, count=100) for split in ("train", "test"))
    said = [{source.captions(index)[0] for index in range(100)} for source in (train, test)]
    assert len(said[0]) == 80 and len(said[1]) == 20 and not said[0] & said[1]
    assert train.captions(1) == ("zero one",) and train.entries[1].label == 0
    first, again = (decode_audio(source.read(1), 8000, channels=1)[0] for source in (train, test))
    assert len(first) == 14400 and not np.array_equal(first, again)
    for half in (first[:7200], first[7200:]):
        # A tone of 0.05 s at a speed within 6%, and silence.
        assert half[:300].any() and not half[450:].any()
    assert train.read(1) == train.read(1) != train.read(81)


def test_digits_of_another_rate(package: Path) -> None:
    (package / "digits" / "4.wav").write_bytes(audio_bytes(tone(300, seconds=0.05, sample_rate=16000), 16000))
    with pytest.raises(ValueError, match=r"digits/4\.wav has 16000 samples a second"):
        SpokenDigits(package, "train")
    with pytest.raises(ValueError, match="at least 1 clip"):
        SpokenDigits(package, "train", count=0)
