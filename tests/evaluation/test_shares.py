"""One figure whoever measures: one, two and three ranks, ranks without an image, jobs of an array, interruptions."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.several_ranks import on_ranks
from helpers.stored_images import pixels, save_folder, save_npz
from helpers.tiny_runs import TOKENIZER
from torch import Tensor

from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.evaluation import shares as shares_file
from discrete_lit.evaluation.shares import Tally


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """120 samples and held-out images, three batches each, and reconstructions of these, also from perturbed ids,
    against 240; an image of each folder is broken."""
    save_folder(tmp_path / "reference", pixels(303, 0), np.arange(303) % 3)
    save_folder(tmp_path / "held_out", pixels(303, 1), np.arange(303) % 3)
    for name in ("reference", "held_out"):
        (tmp_path / name / "class0" / "000.png").write_bytes(b"broken")
    torch.manual_seed(0)
    save(instantiate(TOKENIZER["model"]), tmp_path / "fsq.ckpt")
    return {
        "reference": str(tmp_path / "reference"),
        "held_out": str(tmp_path / "held_out"),
        "samples": {"mine": save_npz(tmp_path / "samples.npz", pixels(120, 2) // 2, np.arange(120) % 3)},
        "reconstructions": {"fsq": str(tmp_path / "fsq.ckpt")},
        "perturbed": [0.2, 0.7],
        "output": str(tmp_path / "report"),
        "image_size": 8,
        "num_images": 120,
        "num_reference": 240,
        "batch_size": 50,
        "extractor": ColourMeans(),
        "accelerator": "cpu",
    }


def figures(report: dict[str, Any]) -> list[float]:
    """Every number of the rows."""
    names = ("count", "FD-Means", "precision", "recall", "within_class_diversity")
    perturbed = [found["value"] for row in report["rows"] for found in row["perturbed"]]
    assert len({*perturbed, *(row["FD-Means"] for row in report["rows"])}) == 2 + 3
    return [*(row[name] for row in report["rows"] for name in names), *perturbed]


def evaluate_on_rank(settings: dict[str, Any], devices: int) -> dict[str, Any]:
    return evaluate(**settings, devices=devices)


@pytest.mark.ddp
def test_several_ranks_report_what_one_does(settings: dict[str, Any], tmp_path: Path) -> None:
    """Two batches of the measured sets: the third rank has no image of any."""
    settings["batch_size"] = 60
    alone = evaluate(**settings, devices=1)
    assert "reference: 1 broken images were left out" not in alone["notes"]  # another one took its place
    assert "held-out real images: 1 broken images were left out, 120 measured" in alone["notes"]
    for ranks in (2, 3):
        several = settings | {"output": str(tmp_path / f"on {ranks}")}
        reports = on_ranks(ranks, evaluate_on_rank, tmp_path / f"ranks {ranks}", several, ranks)
        assert all(report == reports[0] for report in reports)
        assert figures(reports[0]) == pytest.approx(figures(alone), rel=1e-9)
        assert reports[0]["notes"] == alone["notes"] and reports[0]["reference"] == alone["reference"]
        assert json.loads(Path(several["output"], "report.json").read_text()) == reports[0]
        # The reference's features are the same bits, in the same order.
        kept = [
            np.load(next(Path(folder).glob("*.features.npy"))) for folder in (settings["output"], several["output"])
        ]
        assert np.array_equal(*kept)


class NotFinite(ColourMeans):
    """Gives NaN on one rank."""

    def extract(self, images: Tensor) -> Tensor:
        return super().extract(images) / (0 if os.environ["LOCAL_RANK"] == "1" else 1)


def refusal_on_rank(settings: dict[str, Any], devices: int) -> str:
    with pytest.raises(ValueError) as refused:
        evaluate(**settings, devices=devices)
    return str(refused.value)


@pytest.mark.ddp
def test_what_one_rank_refuses_all_refuse(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not that the others wait for it for ever, or say that they lost a connection."""
    said = on_ranks(3, refusal_on_rank, tmp_path / "ranks", settings | {"extractor": NotFinite()}, 3)
    assert set(said) == {f"Means gives features of {settings['reference']!r} that are not finite"}


def test_jobs_of_an_array_join_to_the_whole(settings: dict[str, Any], tmp_path: Path, capsys) -> None:
    alone = evaluate(**settings)
    jobs = settings | {"output": str(tmp_path / "array")}
    with pytest.raises(ValueError, match="reference: 5 of 5 parts are not in"):
        evaluate(**jobs, join=5)
    for part in (3, 1, 5, 2):
        assert evaluate(**jobs, part=f"{part}/5") == {}
    with pytest.raises(ValueError, match=r"1 of 5 parts are not in .*such as part 4: .*`--part 4/5`"):
        evaluate(**jobs, join=5)
    evaluate(**jobs, part="4/5")
    assert "`--join 5` follows" in capsys.readouterr().out
    joined = evaluate(**jobs, join=5)
    assert figures(joined) == pytest.approx(figures(alone), rel=1e-9) and joined["notes"] == alone["notes"]
    # Of images that changed the parts are others.
    save_npz(Path(settings["samples"]["mine"]), pixels(120, 9), np.arange(120) % 3)
    with pytest.raises(ValueError, match="mine: 5 of 5 parts are not in"):
        evaluate(**jobs, join=5)


class Interrupted(ColourMeans):
    """Ends the process, as it were, behind some images."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.left = images

    def extract(self, images: Tensor) -> Tensor:
        self.left -= len(images)
        if self.left < 0:
            raise KeyboardInterrupt
        return super().extract(images)


def test_it_goes_on_after_an_interruption(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_file, "KEPT_EVERY", 0.0)
    alone = evaluate(**{**settings, "output": f"{settings['output']} whole"})
    # 120 held-out images, and as many reconstructions from their ids and, at two rates, from perturbed ones.
    with pytest.raises(KeyboardInterrupt):
        evaluate(**{**settings, "extractor": Interrupted(240 + 4 * 120 + 100)})
    # The last batch of the samples, and four times the image that took the place of a broken held-out one.
    left = Interrupted(20 + 4)
    assert evaluate(**{**settings, "extractor": left})["rows"] == alone["rows"]
    assert left.left == 0 and not Path(settings["output"], "shares").exists()


def test_a_damaged_share_is_measured_again(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares_file, "KEPT_EVERY", 0.0)
    alone = evaluate(**{**settings, "output": f"{settings['output']} whole"})
    with pytest.raises(KeyboardInterrupt):
        evaluate(**{**settings, "extractor": Interrupted(240 + 4 * 120 + 100)})
    for file in Path(settings["output"], "shares").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert evaluate(**settings)["rows"] == alone["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": "0/4"}, r"part='0/4': accepted is `i/n`"),
        ({"part": "5/4"}, r"part='5/4': accepted is `i/n`"),
        ({"part": "1/1"}, r"part='1/1': accepted is `i/n`"),
        ({"part": "half"}, r"part='half': accepted is `i/n`"),
        ({"join": 1}, "join=1: accepted is the number of parts"),
        ({"part": "1/2", "join": 2}, "give one of them"),
    ],
)
def test_parts_that_are_none_are_refused(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**settings, **change)


def test_tallies_survive_their_file(tmp_path: Path) -> None:
    tally = Tally(
        sums={"a.b": torch.tensor([0.1, 2.0], dtype=torch.float64), "n": torch.tensor(3)},
        rows={"x": torch.zeros(0, 4)},
        facts={"kind": "exact", "token_shape": [2, 3]},
        broken={7: "no image"},
    )
    tally.save(tmp_path / "deep" / "t.npz")
    found = Tally.load(tmp_path / "deep" / "t.npz")
    assert torch.equal(found.sums["a.b"], tally.sums["a.b"]) and found.rows["x"].shape == (0, 4)
    assert (found.facts, found.broken) == (tally.facts, tally.broken)
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="it is no share of an evaluation"):
        Tally.load(tmp_path / "other.npz")
