"""Samples of prompts: GenEval's files, label accuracy by what a prompt asks for, sweeps, captions compared."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.random_weights import randomise
from helpers.stored_images import pixels, save_folder, save_npz
from PIL import Image
from torch import Tensor

from discrete_lit.backbones import Transformer
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli import sweep as sweep_command
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.cli.sample import sample
from discrete_lit.cli.sweep import sweep
from discrete_lit.evaluation import classifier as classifiers
from discrete_lit.evaluation.caption_match import match_captions
from discrete_lit.evaluation.classifier import ImageClassifier
from discrete_lit.evaluation.prompts import class_of_prompts, read_prompts
from discrete_lit.generators import Masked
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.tokenizers import StaticTextEncoder, TextTokenizer

GENEVAL = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "exclude": [{"class": "cow", "count": 2}],
        "prompt": "a red cow",
    },
)
CLASSES = ({"class": "class2"}, {"class": "class0"}, {"class": "class1"})


def written(path: Path, *lines: Any) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def asks(*included: dict[str, Any] | None, prompts: str = "abc") -> list[dict[str, Any]]:
    given = included or CLASSES
    return [{"prompt": text, "include": [] if one is None else [one]} for text, one in zip(prompts, given, strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generator of 4x4 grey pixels that attends to the letters of a prompt."""
    torch.manual_seed(0)
    encoder = StaticTextEncoder(TextTokenizer.characters("abcdehnorw "), 8, length=12)
    config: dict[str, Any] = {
        "class_path": "discrete_lit.generators.Masked",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.PixelLevels",
                "init_args": {"levels": 4, "image_channels": 1},
            },
            "image_size": 4,
            "num_classes": 1,
            "backbone": {
                "class_path": "discrete_lit.backbones.Transformer",
                "init_args": {"width": 16, "depth": 1, "heads": 2, "context_dim": 8},
            },
            "sampler": {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 2}},
            "text_encoder": dict(encoder.hparams),
        },
    }
    made: Any = instantiate(config)
    randomise(made.backbone, 0.5)
    path = tmp_path_factory.mktemp("text") / "made.ckpt"
    save(made, path)
    return str(path)


def test_samples_lie_as_the_evaluator_of_geneval_reads_them(checkpoint: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"prompt_file": written(tmp_path / "metadata.jsonl", *GENEVAL), "batch_size": 3}
    for count in (6, 4):  # a second command leaves nothing of the first
        run = sample(checkpoint, str(tmp_path / "out"), num_samples=count, **given)
    assert run["prompts"] == ["a bench", "a red cow"]
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    # As evaluate_images.py walks through the folders.
    folders = sorted(path for path in (tmp_path / "out" / "geneval").iterdir() if path.is_dir() and path.name.isdigit())
    assert [json.loads((folder / "metadata.jsonl").read_text()) for folder in folders] == list(GENEVAL)
    for number, folder in enumerate(folders):
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["00000.png", "00001.png"] and all(re.match(r"\d+\.png", name) for name in names)
        for row, name in enumerate(names):
            with Image.open(folder / "samples" / name) as picture:
                assert picture.mode == "RGB"
                shown = np.asarray(picture)
            assert np.array_equal(shown, np.repeat(images[number + 2 * row], 3, axis=2))


@pytest.mark.parametrize(
    ("lines", "count", "message"),
    [
        (GENEVAL, 5, "num_samples=5 does not fit 2 prompts: some would have 2 samples and others 3"),
        (({"tag": "colors"},), 2, r"line 1 is no object with a text \"prompt\""),
        ((GENEVAL[0], "{"), 2, "line 2 is not JSON"),
        ((), 2, "draws what a text says"),
    ],
)
def test_prompt_files_that_are_refused(
    lines: tuple[Any, ...], count: int, message: str, checkpoint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(
            checkpoint,
            str(tmp_path / "out"),
            num_samples=count,
            prompt_file=written(tmp_path / "metadata.jsonl", *lines),
        )
    assert not (tmp_path / "out").exists()


class ByBrightness(ImageClassifier):
    """Take dark images for class 0, grey ones for 1 and bright ones for 2."""

    def __init__(self, image_channels: int = 3) -> None:
        super().__init__(3, (4,), image_channels=image_channels)

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack((mean < -0.3, mean.abs() <= 0.3, mean > 0.3), dim=1).float()


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Twelve samples of the prompts a, b and c, whose pictures are bright, dark and grey but for two."""
    monkeypatch.setattr(classifiers, "load_classifier", lambda path: ByBrightness())
    save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3)
    levels = np.array([250, 10, 127] * 4)
    levels[[0, 4]] = 10, 127  # an a that is dark, a b that is grey
    images = np.broadcast_to(levels[:, None, None, None], (12, 8, 8, 3)).astype(np.uint8)
    samples = save_npz(tmp_path / "run" / "samples.npz", images, np.zeros(12, np.int64))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"prompts": ["a", "b", "c"]}))
    return {
        "reference": str(tmp_path / "reference"),
        "samples": {"mine": samples},
        "output": str(tmp_path / "report"),
        "image_size": 8,
        "num_images": 12,
        "extractor": ColourMeans(),
        "classifier": "classifier.ckpt",
        "prompts": written(tmp_path / "classes.jsonl", *asks()),
    }


def test_label_accuracy_is_of_the_class_that_the_prompt_asks_for(evaluated: dict[str, Any]) -> None:
    row = evaluate(**evaluated)["rows"][0]
    assert row["label_accuracy"] == pytest.approx(10 / 12)
    # Of prompts that ask for other classes the same pictures are wrong.
    Path(evaluated["prompts"]).write_text("".join(f"{json.dumps(line)}\n" for line in asks(*CLASSES[1:], CLASSES[0])))
    assert evaluate(**evaluated)["rows"][0]["label_accuracy"] == pytest.approx(2 / 12)


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        (asks({"class": "class2"}, {"class": "Coat"}, {"class": "class0"}), {}, "the class 'Coat' of 'b' is unknown"),
        (asks({"class": "class2"}, None, {"class": "class0"}), {}, "'b' includes no class"),
        (asks()[:2], {}, "was drawn of 'c', which the file of prompts does not have"),
        (asks(), {"num_images": 10}, "num_images=10 does not fit 3 prompts"),
        ([{"prompt": "a", "include": [*CLASSES]}], {}, "includes 'class2', 'class0', 'class1'"),
    ],
)
def test_prompts_that_cannot_be_scored(
    lines: list[Any], changes: dict[str, Any], message: str, evaluated: dict[str, Any]
) -> None:
    written(Path(evaluated["prompts"]), *lines)
    with pytest.raises(ValueError, match=message):
        evaluate(**{**evaluated, **changes})


def test_samples_without_prompts_and_classes_without_names_are_refused(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"must be a \.jsonl with a line for each prompt"):
        class_of_prompts(written(tmp_path / "plain.txt", "a", "b"), ["class0"])
    with pytest.raises(ValueError, match="names classes, and neither reference nor held_out does"):
        evaluate(**{**evaluated, "reference": evaluated["samples"]["mine"]})
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no run\.json beside it that says its prompts"):
        evaluate(**evaluated)


def test_a_plain_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    found = read_prompts(written(tmp_path / "prompts.txt", "a b", "", " c "))
    assert found.texts == ("a b", "c") and found.metadata is None and found.of([0, 3, 4]) == ["a b", "c", "a b"]


@pytest.fixture
def swept(tmp_path: Path, make_grid_tokenizer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A sweep of a generator that draws dark pictures of "a" and bright ones of "b"."""
    tokenizer = make_grid_tokenizer(4, (8, 8))

    def decode(tokens: Tensor) -> Tensor:
        return (tokens.float() / 1.5 - 1).reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1)

    monkeypatch.setattr(tokenizer, "decode", decode)
    torch.manual_seed(0)
    generator = Masked(
        tokenizer,
        8,
        num_classes=1,
        backbone=lambda layout: Transformer(layout, width=8, depth=1, heads=1, context_dim=4),
        sampler=MaskGITSampler(2),
        text_encoder=StaticTextEncoder(TextTokenizer.characters("ab"), 4, length=6),
    ).eval()
    randomise(generator.backbone, 0.3)
    drawn = generator.draw

    def told(condition: Any, *arguments: Any, **options: Any) -> Any:
        output = drawn(condition, *arguments, **options)
        first, second = generator.text_encoder(["a", "b"])[0]  # type: ignore[misc]
        is_b = (condition.context == second).flatten(1).all(dim=1)
        assert bool((is_b | (condition.context == first).flatten(1).all(dim=1)).all())
        return output.with_tokens(torch.where(is_b.view(-1, 1, 1), 3, 0).expand(-1, 8, 8))

    monkeypatch.setattr(generator, "draw", told)
    monkeypatch.setattr(sweep_command, "load", lambda path: generator)
    monkeypatch.setattr(sweep_command, "load_classifier", lambda path: ByBrightness())
    for name in ("g.ckpt", "c.ckpt"):
        (tmp_path / name).write_bytes(b"weights")
    save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3)
    # Its b is bright, as class 2 is; its a is dark, and the prompt asks for grey.
    asked = asks({"class": "class1"}, {"class": "class2"}, prompts="ab")
    return {
        "ckpt_path": str(tmp_path / "g.ckpt"),
        "reference": str(tmp_path / "reference"),
        "output": str(tmp_path / "out"),
        "settings": {"temperature": [0.5, 1.0]},
        "num_samples": 10,
        "batch_size": 4,
        "extractor": ColourMeans(),
        "accelerator": "cpu",
        "prompt_file": written(tmp_path / "prompts.jsonl", *asked),
        "classifier": str(tmp_path / "c.ckpt"),
    }


def test_a_sweep_draws_prompts_and_says_how_many_show_what_they_ask_for(swept: dict[str, Any]) -> None:
    found = sweep(**swept)
    assert [point["accuracy"] for point in found["points"]] == [0.5, 0.5] and found["prompts"] == ["a", "b"]
    assert "accuracy" in (Path(swept["output"]) / "sweep.md").read_text().splitlines()[0]
    without = {name: value for name, value in swept.items() if name not in ("classifier", "prompt_file")}
    plain = sweep(**without, prompt=["a", "b"])
    # The same pictures, and nobody who judges them.
    assert [point["distance"] for point in plain["points"]] == [point["distance"] for point in found["points"]]
    assert [point["accuracy"] for point in plain["points"]] == [None, None]
    # Other prompts are measured anew.
    assert sweep(**without, prompt=["a"])["points"][0]["distance"] != plain["points"][0]["distance"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_file": None}, "draws what a text says: give --prompt"),
        ({"num_samples": 9}, "num_samples=9 does not fit 2 prompts"),
        ({"prompt_file": None, "prompt": ["a"]}, "classifier needs to know what each prompt asks for"),
        ({"reference": "moments"}, "names classes, and the reference does not"),
    ],
)
def test_sweeps_of_prompts_that_are_refused(swept: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    if "reference" in changes:
        images = Path(swept["output"]).parent / "images.npz"
        changes = {"reference": save_npz(images, pixels(24, 0))}
    with pytest.raises(ValueError, match=message):
        sweep(**{**swept, **changes})


@pytest.fixture
def captioned(tmp_path: Path) -> str:
    """Four images with captions beside them, three of which a model has found."""
    for name, text in (("a", "A dark  coat\na coat"), ("b", "a boot"), ("c", "a bag")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "d.json").write_text(json.dumps({"caption": ["a dress"]}))
    texts = {"a": "a dark coat", "b": "a boot", "c": "a dress", "d": "a Dress"}
    captions = {str(tmp_path / f"{name}.png"): text for name, text in texts.items()}
    return written(tmp_path / "captions.json", {"captions": captions, "seed": 0})


def test_captions_are_exact_or_not(captioned: str, evaluated: dict[str, Any], capsys) -> None:
    found = match_captions(captioned)
    assert (found.exact, found.count, found.fraction) == (3, 4, 0.75)
    report = evaluate(**evaluated, captions={"theirs": captioned})
    assert report["captions"] == {"theirs": {"source": captioned, "count": 4, "exact": 0.75}}
    assert "captions, theirs: 75.0% of 4 are exactly one of their image's own" in capsys.readouterr().out


def test_captions_that_cannot_be_compared(captioned: str, tmp_path: Path) -> None:
    for content, message in (
        ("{", "is not JSON"),
        ('{"captions": {}}', 'holds no "captions"'),
        ('{"captions": {"a.png": 3}}', 'holds no "captions"'),
        ("[]", 'holds no "captions"'),
    ):
        with pytest.raises(ValueError, match=message):
            match_captions(written(tmp_path / "other.json", content))
    with pytest.raises(ValueError, match="nowhere': no such file"):
        match_captions("nowhere")
    (tmp_path / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption to compare with that of .*c\.png': it has no \.txt"):
        match_captions(captioned)
