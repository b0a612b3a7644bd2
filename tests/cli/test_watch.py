"""`discrete-lit watch`: what stands on the page is what the samplers did, and a browser shows it."""

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import refusal, run, untrained_klvae
from PIL import Image

from discrete_lit.checkpoints import instantiate, load, save
from discrete_lit.cli import drawn_steps
from discrete_lit.cli import watch as watching
from discrete_lit.cli.drawn_steps import as_png, draw_steps
from discrete_lit.core.random import CounterRandom

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
}
BACKBONE = {"class_path": "discrete_lit.backbones.Transformer", "init_args": {"width": 16, "depth": 1, "heads": 2}}


def generator(family: str, tokenizer: dict[str, Any], file: Path, **settings: Any) -> Path:
    """The checkpoint of an untrained generator of three classes of 8x8 images."""
    arguments = {"tokenizer": tokenizer, "image_size": 8, "num_classes": 3, "backbone": BACKBONE, **settings}
    save(instantiate({"class_path": f"discrete_lit.generators.{family}", "init_args": arguments}), file)
    return file


def saved(checkpoint: Path) -> dict[str, Any]:
    return {"class_path": "discrete_lit.tokenizers.from_checkpoint", "init_args": {"checkpoint": str(checkpoint)}}


@pytest.fixture(scope="module")
def scales_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scales")
    settings = {"codebook_size": 12, "code_dim": 3, "scales": [1, 2, 4], "network": NETWORK}
    tokenizer = instantiate({"class_path": "discrete_lit.tokenizers.MultiScaleVQ", "init_args": settings})
    save(tokenizer, folder / "tokenizer.ckpt")
    return generator("NextScale", saved(folder / "tokenizer.ckpt"), folder / "generator.ckpt")


@pytest.fixture(scope="module")
def checkpoints(
    generator_checkpoints: dict[str, Path],
    scales_checkpoint: Path,
    tokenizer_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    guided = generator(
        "Masked",
        saved(tokenizer_checkpoint),
        tmp_path_factory.mktemp("guided") / "generator.ckpt",
        label_dropout=0.1,
        sampler={"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"guidance_scale": 2.0}},
    )
    own = {"NextScale": scales_checkpoint, "guided": guided}
    return {name: str(path) for name, path in {**generator_checkpoints, **own}.items()}


@pytest.fixture(scope="module")
def page(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "watch.html"
    run("watch", "--output", file, "--checkpoints", json.dumps(checkpoints), "--labels", "[2, 0]", "--seeds", "[0, 5]")
    return file


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))).astype(int)


def test_the_page_holds_what_was_drawn(page: Path, checkpoints: dict[str, str]) -> None:
    tab = data_of(page)["tabs"][1]
    assert [panel["name"] for panel in tab["panels"]] == list(checkpoints)
    for panel in tab["panels"]:
        model = load(checkpoints[panel["name"]])
        output = model.draw(torch.tensor([2, 0]), CounterRandom(5, torch.arange(2)))
        assert set(panel["draws"]) == {"2/0", "2/5", "0/0", "0/5"}
        for row, label in enumerate((2, 0)):
            assert output.network_calls == output.sequential_passes * (2 if panel["name"] == "guided" else 1)
            first, *_, last = panel["draws"][f"{label}/5"]
            assert last["ids"] == output.tokens[row].flatten().tolist()[-16:]
            assert (last["calls"], last["passes"]) == (output.network_calls, output.sequential_passes)
            assert (first["calls"], first["passes"], set(first["ids"])) == (0, 0, {None})
            decoded = pixels(as_png(model.tokenizer.decode(output.tokens)[row]))
            assert np.abs(pixels(last["picture"]) - decoded).max() <= 1  # decoded in batches of other sizes
            assert np.ptp(decoded) > 1


@pytest.mark.parametrize("family", ["Masked", "Autoregressive"])
def test_what_changed_and_what_is_not_drawn(family: str, checkpoints: dict[str, str]) -> None:
    frames = draw_steps(load(checkpoints[family]).eval(), [1], 3)[0]
    for before, after in pairwise(frames):
        changed = [place for place in range(16) if before["ids"][place] != after["ids"][place]]
        assert after["changed"] == changed
        known = [place for place in range(16) if after["ids"][place] is not None]
        assert all((after["confidence"][place] is None) == (place not in known) for place in range(16))
        assert after["passes"] == before["passes"] + 1


def test_scales_are_shown_at_their_size(checkpoints: dict[str, str]) -> None:
    frames = draw_steps(load(checkpoints["NextScale"]).eval(), [1], 3)[0]
    assert [frame["size"] for frame in frames] == [[4, 4], [1, 1], [2, 2], [4, 4]]
    assert [frame["passes"] for frame in frames] == [0, 1, 2, 3]


def test_long_draws_have_fewer_pictures(checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_steps, "MOST_PICTURES", 5)
    frames = draw_steps(load(checkpoints["Autoregressive"]).eval(), [1], 3)[0]
    shown = [number for number, frame in enumerate(frames) if frame["picture"]]
    assert shown == [4, 8, 12, 16]


def test_the_toy_needs_no_checkpoint_and_the_page_no_network(tmp_path: Path) -> None:
    run("watch", "--output", tmp_path / "toy.html")
    text = (tmp_path / "toy.html").read_text()
    assert [tab["name"] for tab in data_of(tmp_path / "toy.html")["tabs"]] == ["Toy"]
    assert not re.findall(r"https?://|<link(?![^>]*data:)|@import|<!--[A-Z]+-->", text)
    assert len(text.encode()) < watching.LARGEST_PAGE


def test_names_cannot_break_the_page(checkpoints: dict[str, str], tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>"
    given = json.dumps({name: checkpoints["Masked"]})
    run("watch", "--output", tmp_path / "page.html", "--checkpoints", given, "--labels", "[0]", "--seeds", "[0]")
    assert name not in (tmp_path / "page.html").read_text()
    assert data_of(tmp_path / "page.html")["tabs"][1]["panels"][0]["name"] == name


# Mistakes.


def said(capfd: pytest.CaptureFixture, tmp_path: Path, checkpoints: dict[str, Any], *arguments: Any) -> str:
    output = tmp_path / "page.html"
    message = refusal(capfd, "watch", "--output", output, "--checkpoints", json.dumps(checkpoints), *arguments)
    assert not output.exists()
    return message


def test_two_grids(checkpoints: dict[str, str], tokenizer_checkpoint: Path, tmp_path: Path, capfd) -> None:
    other = generator("Masked", saved(tokenizer_checkpoint), tmp_path / "other.ckpt", image_size=16)
    message = said(capfd, tmp_path, {"small": checkpoints["Masked"], "large": str(other)})
    assert "one grid: small has 4 x 4 tokens of 8 x 8 pixels" in message
    assert "large has 8 x 8 tokens of 16 x 16 pixels" in message


def test_text_has_no_images(tmp_path: Path, capfd) -> None:
    characters = {"class_path": "discrete_lit.tokenizers.Characters"}
    text = generator("Masked", characters, tmp_path / "text.ckpt", num_classes=1)
    assert "its tokens have no picture" in said(capfd, tmp_path, {"text": str(text)})


def test_what_is_no_generator_of_ids(tokenizer_checkpoint: Path, tmp_path: Path, capfd) -> None:
    assert "nowhere.ckpt" in said(capfd, tmp_path, {"a": str(tmp_path / "nowhere.ckpt")})
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert "notes.txt" in said(capfd, tmp_path, {"a": str(tmp_path / "notes.txt")})
    assert "a FSQ, accepted: a Generator" in said(capfd, tmp_path, {"a": str(tokenizer_checkpoint)})
    assert "a KLVAE, accepted" in said(capfd, tmp_path, {"a": str(untrained_klvae(tmp_path / "kl.ckpt"))})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--labels", "[3]"), "labels must be different classes in [0, 3), at least one, got [3]"),
        (("--labels", "[-1]"), "got [-1]"),
        (("--labels", "[1, 1]"), "got [1, 1]"),
        (("--labels", "[]"), "got []"),
        (("--seeds", "[2, 2]"), "seeds must be different numbers >= 0, at least one, got [2, 2]"),
        (("--seeds", "[]"), "got []"),
        (("--seeds", "[-1]"), "got [-1]"),
    ],
)
def test_classes_and_seeds(arguments, words: str, checkpoints: dict[str, str], tmp_path: Path, capfd) -> None:
    assert words in said(capfd, tmp_path, {"masked": checkpoints["Masked"]}, *arguments)


def test_labels_of_nothing_and_a_folder_for_a_file(tmp_path: Path, capfd) -> None:
    assert "give checkpoints too" in refusal(capfd, "watch", "--output", tmp_path / "a.html", "--labels", "[1]")
    assert "is a folder, accepted: the path of the page" in refusal(capfd, "watch", "--output", tmp_path)


def test_a_page_that_is_too_large(checkpoints: dict[str, str], tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(watching, "LARGEST_PAGE", 1000)
    assert "fewer labels or seeds than 3 and 2" in said(capfd, tmp_path, {"masked": checkpoints["Masked"]})
