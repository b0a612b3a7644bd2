"""pFID of an evaluation: by hand, at rate 0, in the table, the records and `compare`, and where it cannot be measured.

That ranks, batches and parts do not change it stands in test_shares.py, with everything else that is measured there.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.stored_images import pixels, save_folder
from helpers.tiny_runs import TOKENIZER

from discrete_lit.checkpoints import instantiate, load, save
from discrete_lit.cli.compare import compare
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.core.images import from_uint8, to_uint8
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import FeatureMoments, Moments
from discrete_lit.tokenizers import PerturbedTokenizer


def checkpoint(path: Path, family: str, **settings: Any) -> str:
    torch.manual_seed(0)
    network = TOKENIZER["model"]["init_args"]["network"]
    init_args = {"network": copy.deepcopy(network), **settings}
    save(instantiate({"class_path": f"discrete_lit.tokenizers.{family}", "init_args": init_args}), path)
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """12 held-out images, of which an FSQ of 12 ids and a KL-VAE make reconstructions."""
    return {
        "reference": save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3),
        "held_out": save_folder(tmp_path / "held_out", pixels(12, 1), np.zeros(12, int)),
        "reconstructions": {
            "fsq": checkpoint(tmp_path / "fsq.ckpt", "FSQ", levels=[4, 3]),
            "kl": checkpoint(tmp_path / "kl.ckpt", "KLVAE", latent_channels=2, kl_weight=1e-6),
        },
        "output": str(tmp_path / "report"),
        "image_size": 8,
        "batch_size": 5,
        "extractor": ColourMeans(),
        "accelerator": "cpu",
        "perturbed_neighbours": 3,
    }


def moments(images: torch.Tensor) -> Moments:
    metric = FeatureMoments(ColourMeans())
    metric.update(ColourMeans()(images))
    return metric.moments()


def test_the_distance_at_each_rate(settings: dict[str, Any]) -> None:
    report = evaluate(**settings, perturbed=[0.0, 0.3, 1.0])
    floor, fsq, kl = report["rows"]
    assert floor["perturbed"] == kl["perturbed"] == []
    assert [found["rate"] for found in fsq["perturbed"]] == [0.0, 0.3, 1.0]
    assert fsq["perturbed"][0]["value"] == fsq["FD-Means"]  # to the bit: no id is another

    images = torch.from_numpy(pixels(12, 1)).movedim(-1, 1)
    tokenizer = load(settings["reconstructions"]["fsq"])
    reference = moments(torch.from_numpy(pixels(24, 0)).movedim(-1, 1))
    for found in fsq["perturbed"][1:]:
        perturbed = PerturbedTokenizer(tokenizer, found["rate"], neighbours=3)
        rebuilt = to_uint8(perturbed.decode(perturbed.encode(from_uint8(images))))
        assert found["value"] == pytest.approx(frechet_distance(moments(rebuilt), reference), rel=1e-6)
    assert len({found["value"] for found in fsq["perturbed"]}) == 3

    assert any(
        "kl is not measured with perturbed ids: a KLVAE has no ids with codes" in note for note in report["notes"]
    )
    table, text = Path(settings["output"], "report.md").read_text().split("\n\n", 1)
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert cells["fsq"]["pFD-Means 0.3"] == f"{fsq['perturbed'][1]['value']:.2f}" and cells["kl"]["pFD-Means 0.3"] == ""
    assert "one of the 3 ids whose codes are nearest" in text
    record = fsq["perturbed"][1]["record"]
    assert record["metric"] == "pFD-Means 0.3" and record["value"] == fsq["perturbed"][1]["value"]
    assert record["perturbation"] == {"rate": 0.3, "neighbours": 3, "seed": 0}
    assert record["checkpoint_sha256"] == fsq["record"]["checkpoint_sha256"] and "perturbation" not in fsq["record"]


def test_compare_has_a_column_for_each_rate(settings: dict[str, Any], tmp_path: Path) -> None:
    report = evaluate(**settings, perturbed=[0.1, 0.3])
    settings |= {"reconstructions": {"again": settings["reconstructions"]["fsq"]}, "output": str(tmp_path / "others")}
    evaluate(**settings, perturbed=[0.3])
    table = compare([str(tmp_path / "report"), settings["output"]], str(tmp_path / "table"))
    assert table["metrics"] == ["FD-Means", "pFD-Means 0.1", "pFD-Means 0.3"]
    rows = {row["name"]: row for row in table["rows"]}
    perturbed = {name: set(row["metrics"]) for name, row in rows.items()}
    assert perturbed["fsq"] == set(table["metrics"]) and perturbed["kl"] == {"FD-Means"}
    assert perturbed["again"] == {"FD-Means", "pFD-Means 0.3"} and rows["fsq"]["runs"] == 1
    assert rows["fsq"]["metrics"]["pFD-Means 0.3"]["mean"] == report["rows"][1]["perturbed"][1]["value"]
    assert any("0.3, by one of the 3 ids of the nearest codes" in fact for fact in table["facts"])

    evaluate(**{**settings, "perturbed_neighbours": 4}, perturbed=[0.3])
    with pytest.raises(ValueError, match=r"pFD-Means 0\.3 would hold two protocols: perturbation is .*'neighbours': 3"):
        compare([str(tmp_path / "report"), settings["output"]], str(tmp_path / "table"))
    json.loads(Path(settings["output"], "report.json").read_text())


def test_rates_that_cannot_be_measured_are_refused(settings: dict[str, Any]) -> None:
    fsq, kl = settings["reconstructions"].items()
    for rates in ([-0.1], [1.5], [float("nan")], [0.1, 0.1], []):
        with pytest.raises(ValueError, match=r"accepted are rates in \[0, 1\], each once"):
            evaluate(**settings, perturbed=rates)
    with pytest.raises(ValueError, match=r"perturbed=\[0.1\] is of the ids of reconstructions: give some"):
        evaluate(**{**settings, "reconstructions": None}, perturbed=[0.1])
    with pytest.raises(ValueError, match=r"perturbed=\[0.1\] can be measured of no row: kl is not measured"):
        evaluate(**{**settings, "reconstructions": dict([kl])}, perturbed=[0.1])
    with pytest.raises(ValueError, match=r"fsq is not measured .*count must be in \[1, 12\).*got 12"):
        evaluate(**{**settings, "reconstructions": dict([fsq]), "perturbed_neighbours": 12}, perturbed=[0.1])
    with pytest.raises(ValueError, match="perturbed_neighbours=3 has no effect: give the rates"):
        evaluate(**settings)
