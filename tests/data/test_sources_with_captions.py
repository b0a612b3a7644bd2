"""The sources with captions: compositions of digits, sentences of the embedded set, stamps, and clip art."""

import csv
import gzip
import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from discrete_lit.core.files import content_sha256
from discrete_lit.data.sources import (
    DigitCompositions,
    EmbeddedSet,
    OpenClipart,
    TuxpaintSpeech,
    TuxpaintStamps,
    digit_compositions,
)
from discrete_lit.data.sources.digit_compositions import WORDS, held_out
from discrete_lit.data.sources.openclipart import words_of

EMBEDDED = Path(__file__).parents[2] / "data" / "fashion_mnist.npz"


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the form of scikit-learn's: 100 digits, those of class d made of the levels d and 16 - d."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for number in range(100):
        digit = number % 10
        rows.writerow([float(digit)] * 32 + [float(16 - digit)] * 31 + [float(number // 10)] + [digit])
    content = text.getvalue().encode()
    monkeypatch.setattr(digit_compositions, "_DIGITS_SHA256", content_sha256(content))
    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress(content))
    return tmp_path / "digits.csv.gz"


def pixels_of(source: DigitCompositions, index: int) -> np.ndarray:
    levels = np.asarray(Image.open(io.BytesIO(source.read(index)))).astype(float) * 16 / 255
    assert np.abs(levels - levels.round()).max() < 0.04
    return levels.round().astype(int)


def digit_at(levels: np.ndarray, row: int, column: int) -> int | None:
    """The digit whose image begins at a place; None of black."""
    part = levels[row : row + 8, column : column + 8]
    if not part.any():
        return None
    assert part[0, 0] == 16 - part[5, 0]
    return int(part[0, 0])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pictures_show_what_their_captions_say(digits: Path, split) -> None:
    beside = DigitCompositions(split, count=100, file=digits)
    for index in range(100):
        levels = pixels_of(beside, index)
        left, right = digit_at(levels, 0, 0), digit_at(levels, 0, 8)
        first, second = beside.captions(index)
        assert levels.shape == (8, 16)
        assert first == f"{WORDS[left]} left of {WORDS[right]}" and second == f"{WORDS[right]} right of {WORDS[left]}"
        assert held_out(left, right) == (split == "test")


def test_the_four_places(digits: Path) -> None:
    around = DigitCompositions("train", "around", count=640, file=digits)
    assert around.classes == ["left of", "right of", "above", "below"]
    places = {
        "left of": ((4, 0), (4, 8)),
        "right of": ((4, 8), (4, 0)),
        "above": ((0, 4), (8, 4)),
        "below": ((8, 4), (0, 4)),
    }
    seen: Counter[str] = Counter()
    for index in range(640):
        levels = pixels_of(around, index)
        place = around.classes[around[index].label or 0]
        a, b = (digit_at(levels, *where) for where in places[place])
        assert around.captions(index)[0] == f"{WORDS[a]} {place} {WORDS[b]}"
        seen[place] += 1
    assert set(seen.values()) == {160}


def test_sums(digits: Path) -> None:
    sums = DigitCompositions("train", "sum", count=80, file=digits)
    thought = DigitCompositions("train", "sum", count=80, file=digits, thought=True)
    for index in range(80):
        levels = pixels_of(sums, index)
        tens, ones = digit_at(levels, 0, 0), digit_at(levels, 0, 8)
        a, b = map(int, sums.captions(index)[0].split("+"))
        assert not held_out(a, b) and a + b == 10 * (tens or 0) + (ones or 0)
        assert thought.captions(index) == (f"{a}+{b}={a + b}",)
    assert len({sums.fingerprint(), thought.fingerprint()}) == 2


def test_held_out_pairs_are_a_fifth_with_every_digit_as_often() -> None:
    pairs = [(a, b) for a in range(10) for b in range(10) if held_out(a, b)]
    assert len(pairs) == 20 and all((b, a) in pairs for a, b in pairs)
    assert Counter(a for a, _ in pairs) == Counter(b for _, b in pairs) == dict.fromkeys(range(10), 2)


def test_splits_have_digits_of_their_own_and_draw_by_the_seed(digits: Path) -> None:
    def images(split, **settings: int) -> set[int]:
        source = DigitCompositions(split, count=400, file=digits, **settings)
        return {int(pixels_of(source, index)[7, 7]) for index in range(400)}

    # The last pixel numbers the image of its digit: 8 of 10 are of train.
    assert images("train") == set(range(8)) and images("validation") == images("test") == {8, 9}
    first, other = (DigitCompositions("train", count=100, file=digits, seed=seed) for seed in (0, 1))
    assert first.read(3) == DigitCompositions("train", count=200, file=digits).read(3)
    assert first.fingerprint() != other.fingerprint()
    assert any(first.read(index) != other.read(index) for index in range(100))


def test_bad_input(digits: Path, tmp_path: Path) -> None:
    for made, message in (
        (lambda: DigitCompositions("all", file=digits), "accepted are train, validation, test"),
        (lambda: DigitCompositions("train", "stacked", file=digits), "and beside, around, sum"),
        (lambda: DigitCompositions("train", count=0, file=digits), "count is 0"),
        (lambda: DigitCompositions("train", thought=True, file=digits), "thought is of sums"),
        (lambda: DigitCompositions("train", file=tmp_path / "none"), "there is no .*none"),
        (lambda: DigitCompositions("train", file=__file__), "not a whole gzip file"),
    ):
        with pytest.raises(ValueError, match=message):
            made()
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"1,2"))
    with pytest.raises(ValueError, match="holds other data than"):
        DigitCompositions("train", file=tmp_path / "other.gz")


def test_sentences_of_the_embedded_set_say_class_and_brightness() -> None:
    plain, captioned = EmbeddedSet(EMBEDDED, "test"), EmbeddedSet(EMBEDDED, "test", captions=True)
    assert plain.captions(0) == () and plain.fingerprint() != captioned.fingerprint()
    tones: Counter[str] = Counter()
    for index in range(0, 10_000, 10):
        photo, sentence, short = captioned.captions(index)
        noun, tone = short.split(", ")
        assert photo == f"a photo of a {tone} {noun}" and sentence == f"this {noun} is {tone}"
        assert captioned.classes[captioned[index].label or 0].lower().split("/")[0] in noun
        pixels = np.asarray(Image.open(io.BytesIO(captioned.read(index))))
        brightness = pixels[pixels > 0].mean()
        assert {"dark": brightness < 127.5, "grey": 127.5 <= brightness < 170.5, "bright": brightness >= 170.5}[tone]
        tones[tone] += 1
    assert min(tones.values()) > 200


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Forty stamps of two classes, half transparent, with captions; one without, and a turned copy."""
    for number in range(40):
        file = tmp_path / "stamps" / ("animals", "food")[number % 2] / "more" / f"stamp.{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (9, 7), (255, 0, 0, 0))
        picture.putpixel((5, 6), (0, 0, 255, 128))
        picture.save(file)
        text = f"Stamp {number}.\nfr.utf8=Tampon {number}.\npt_br.utf8=  Selo\nbroken line\n"
        file.with_suffix(".txt").write_text(text, encoding="utf-8")
    Image.new("L", (4, 4)).save(tmp_path / "stamps" / "food" / "none.png")
    Image.new("L", (4, 4)).save(tmp_path / "stamps" / "food" / "none_mirror.png")
    return tmp_path / "stamps"


def test_stamps_have_a_caption_in_each_language(stamps: Path) -> None:
    sources = {split: TuxpaintStamps(stamps, split, languages=("en", "pt_br")) for split in ("train", "test")}
    keys = {split: {entry.key for entry in source.entries} for split, source in sources.items()}
    assert not keys["train"] & keys["test"] and 1 <= len(keys["test"]) < 10
    assert len(keys["train"] | keys["test"]) == 41 and "food/none_mirror" not in keys["train"] | keys["test"]
    for source in sources.values():
        assert source.classes == ["animals", "food"]
        for index, entry in enumerate(source.entries):
            if entry.key == "food/none":
                assert source.captions(index) == ()
                continue
            number = int(entry.key.rpartition("%2E")[2])
            assert entry.label == number % 2 and source.captions(index) == (f"Stamp {number}.", "Selo")
            image = Image.open(io.BytesIO(source.read(index)))
            assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (9, 7), (255, 255, 255))
            assert image.getpixel((5, 6)) == (127, 127, 255)
    assert TuxpaintStamps(stamps, "test").fingerprint() != sources["test"].fingerprint()


def test_stamps_that_are_not_there(stamps: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no stamps: give the folder"):
        TuxpaintStamps(tmp_path / "none", "train")
    with pytest.raises(ValueError, match=r"languages=\['xx'\]: accepted are some of en, fr, pt_br"):
        TuxpaintStamps(stamps, "train", languages=("xx",))


def test_spoken_captions_in_several_languages(stamps: Path) -> None:
    """The language is the class, a stamp is in one split in all of them, and a recording without a text is left out."""
    for number in range(40):
        stem = stamps / ("animals", "food")[number % 2] / "more" / f"stamp.{number}"
        for ending in ("_desc.ogg", "_desc_fr.ogg", "_desc_pt_br.wav", "_desc_ru.ogg", "_fr.ogg", ".ogg"):
            stem.with_name(stem.name + ending).write_bytes(f"{number}{ending}".encode())
    languages = ("fr", "en", "pt_br", "ru")
    sources = {split: TuxpaintSpeech(stamps, split, languages=languages) for split in ("train", "test")}
    said = {split: {entry.key.rpartition("_")[0] for entry in source.entries} for split, source in sources.items()}
    assert sum(map(len, sources.values())) == 120 and said["test"]
    for split, source in sources.items():
        assert len(source) == 3 * len(TuxpaintStamps(stamps, split).entries) - 3 * (split == without_a_caption(stamps))
        assert source.classes == list(languages)
        for index, entry in enumerate(source.entries):
            number = source.read(index).split(b"_")[0].decode()
            expected = {0: f"Tampon {number}.", 1: f"Stamp {number}.", 2: "Selo"}[entry.label or 0]
            assert source.captions(index) == (expected,) and entry.extension == ("wav" if entry.label == 2 else "ogg")
    for refused in ((), ("fr", "fr"), ("xx",)):
        with pytest.raises(ValueError, match="accepted are some of en, fr, pt_br, ru, each once"):
            TuxpaintSpeech(stamps, "train", languages=refused)
    with pytest.raises(ValueError, match="holds no spoken captions"):
        TuxpaintSpeech(stamps / "none", "train")


def without_a_caption(stamps: Path) -> str:
    """The split of the stamp that has no text."""
    return next(
        split
        for split in ("train", "test")
        if any(entry.key == "food/none" for entry in TuxpaintStamps(stamps, split).entries)
    )


@pytest.mark.parametrize(
    ("name", "author", "words"),
    [
        ("seagull_nicu_buculei_01", "Nicu Buculei", "seagull"),
        ("ice-cream_cone_(3)_gerald_g._02b", "Gerald G.", "ice cream cone 3"),
        ("puntine_architetto_franc_01", "Architetto Francesco", "puntine"),  # cut off
        ("cello_mo_01", "mo", "cello"),
        ("mo_01", "mo", "mo"),  # a name of nothing else
        ("red_flower_03", "", "red flower"),
        ("nicu_in_the_snow", "Nicu Buculei", "nicu in the snow"),  # no end of the name
    ],
)
def test_words_of_a_drawing(name: str, author: str, words: str) -> None:
    assert " ".join(words_of(name, author)) == words


@pytest.fixture
def clipart(tmp_path: Path) -> Path:
    """Sixty drawings of two classes, half transparent, in two variations of each name; a link, and a text."""
    root = tmp_path / "png"
    for number in range(60):
        folder = ("animals/sea_birds", "food")[number % 2]
        file = root / folder / f"thing{number // 4}_ann_b_{number // 2 % 2:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (40, 20), (255, 0, 0, 0 if number % 4 else 255))
        said = PngInfo()
        said.add_text("Author", "Ann Bee (ann@bee.org)")
        picture.save(file, pnginfo=said)
    (root / "food" / "again.png").symlink_to(root / "animals" / "sea_birds" / "thing0_ann_b_00.png")
    (root / "food" / "readme.txt").write_text("no picture")
    return root


def test_drawings_have_captions_of_file_and_folders(clipart: Path) -> None:
    sources = {split: OpenClipart(clipart, split, longest_side=16) for split in ("train", "test")}
    keys = {split: {entry.key for entry in source.entries} for split, source in sources.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 60
    assert 0 < len(keys["test"]) < 20 and "food/again" not in keys["train"] | keys["test"]
    titles = {split: {source.captions(index)[0] for index in range(len(source))} for split, source in sources.items()}
    assert not titles["train"] & titles["test"]  # the variations of a drawing are in one split
    for source in sources.values():
        assert source.classes == ["animals", "food"]
        for index, entry in enumerate(source.entries):
            number = int(entry.key.partition("thing")[2].partition("_")[0])
            folder = "food" if entry.label else "animals, sea birds"
            assert source.captions(index) == (f"thing{number}", f"thing{number}, {folder}")
            image = Image.open(io.BytesIO(source.read(index)))
            assert (image.mode, image.size) == ("RGB", (16, 8))
            assert image.getpixel((3, 3)) in ((255, 255, 255), (255, 0, 0))
    few = OpenClipart(clipart, "train", leave_out=("animals/sea_birds",))
    assert {entry.label for entry in few.entries} == {1} and few.fingerprint() != sources["train"].fingerprint()


def test_drawings_that_are_not_there(clipart: Path, tmp_path: Path) -> None:
    for made, message in (
        (lambda: OpenClipart(tmp_path / "none", "train"), "holds no drawings: give the folder png"),
        (lambda: OpenClipart(clipart, "validation"), "accepted are train, test"),  # pyright: ignore[reportArgumentType]
        (lambda: OpenClipart(clipart, "train", longest_side=0), "must be at least 1 pixel"),
        (lambda: OpenClipart(clipart, "train", leave_out=("stars",)), "has no folder 'stars'"),
    ):
        with pytest.raises(ValueError, match=message):
            made()
