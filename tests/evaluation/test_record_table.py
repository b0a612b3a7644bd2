"""Records in one table: spreads by hand, gaps that settle nothing, and two protocols that are not put together."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.means_extractor import ColourMeans
from helpers.stored_images import pixels, save_folder, save_npz

from discrete_lit.cli.compare import compare
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.evaluation.record_table import RecordTable, read_records


def record(value: float, **changes: Any) -> dict[str, Any]:
    known = {
        "value": value,
        "protocol": None,
        "metric": "FD-Means",
        "extractor": "Means",
        "extractor_sha256": "a" * 64,
        "resize": "none",
        "crop": "none",
        "quantisation": "round",
        "image_size": 8,
        "image_channels": 3,
        "apply_exif": False,
        "reference": "images",
        "reference_sha256": "b" * 64,
        "reference_count": 24,
        "count": 12,
        "labels": "no labels",
    }
    return {**known, **changes}


def write_report(folder: Path, *rows: tuple[str, dict[str, Any]], **sampling: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"name": name, "kind": "samples", "record": found, "sampling": sampling, "likelihood": None}
        for name, found in rows
    ]
    (folder / "report.json").write_text(json.dumps({"rows": lines}))
    return str(folder / "report.json")


def seeds(tmp_path: Path, name: str, values: list[list[float]], **sampling: Any) -> list[str]:
    """Reports of a row: for each checkpoint the distance of each sampling seed."""
    return [
        write_report(
            tmp_path / f"{name} {model} {seed}",
            (
                name,
                record(value, checkpoint_sha256=f"{name} {model}", images_sha256=f"{name} {model} {seed}", seed=seed),
            ),
            **sampling,
        )
        for model, own in enumerate(values)
        for seed, value in enumerate(own)
    ]


def test_spreads_over_sampling_and_over_training(tmp_path: Path) -> None:
    values = [[10.0, 11.0, 12.0], [14.0, 16.0]]
    table = RecordTable(read_records(seeds(tmp_path, "mine", values)))
    found = table.spreads["FD-Means"]["mine"]
    means = [np.mean(own) for own in values]
    assert found.mean == pytest.approx(np.mean(means))  # of checkpoints, however many draws each has
    assert found.training == pytest.approx(np.std(means, ddof=1))
    pooled = np.sqrt((2 * np.var(values[0], ddof=1) + np.var(values[1], ddof=1)) / 3)
    assert found.sampling == pytest.approx(pooled)


def test_a_gap_below_the_spread_is_inconclusive(tmp_path: Path) -> None:
    reports = [
        *seeds(tmp_path, "first", [[10.0], [11.0], [12.0]]),
        *seeds(tmp_path, "near", [[10.5], [11.5], [12.5]]),
        *seeds(tmp_path, "far", [[30.0], [31.0], [32.0]]),
        *seeds(tmp_path, "alone", [[10.9]]),
    ]
    table = RecordTable(read_records(reports))
    verdicts = {name: table.verdict("FD-Means", name) for name in table.rows}
    assert verdicts == {
        "first": "spread unknown",
        "near": "spread unknown",
        "far": "spread unknown",
        "alone": "best",
    }
    table = RecordTable(read_records(reports[:-1]))
    assert {name: table.verdict("FD-Means", name) for name in table.rows} == {
        "first": "best",
        "near": "inconclusive",
        "far": "worse",
    }


def test_reconstructions_are_no_rivals_of_samples(tmp_path: Path) -> None:
    """One tokenizer, of a lower distance than all samples of its ids, left every gap between these unknown."""
    reports = [*seeds(tmp_path, "a", [[10.0], [11.0], [12.0]]), *seeds(tmp_path, "b", [[30.0], [31.0], [32.0]])]
    made = [write_report(tmp_path / f"made {value}", (f"made {value}", record(value))) for value in (2.0, 3.0)]
    for path in made:
        report = json.loads(Path(path).read_text())
        report["rows"][0]["kind"] = "reconstructions"
        Path(path).write_text(json.dumps(report))
    table = RecordTable(read_records([*reports, *made]))
    gaps = {name: table.gap("FD-Means", name) for name in table.rows}
    assert gaps == {"a": "best", "b": "+20.00 worse", "made 2.0": "best", "made 3.0": "+1.00 spread unknown"}


def test_sampling_seeds_of_one_checkpoint_judge_what_they_can(tmp_path: Path) -> None:
    reports = [*seeds(tmp_path, "a", [[10.0, 10.1, 10.2]]), *seeds(tmp_path, "b", [[10.1, 10.2, 10.3]])]
    table = RecordTable(read_records(reports))
    assert table.verdict("FD-Means", "b") == "inconclusive" and table.spreads["FD-Means"]["a"].training is None
    assert any("over sampling seeds where each row has one checkpoint" in fact for fact in table.facts())


@pytest.mark.parametrize(
    "change",
    [
        {"reference_sha256": "c" * 64},
        {"count": 13},
        {"resize": "antialiased"},
        {"quantisation": "truncate"},
        {"image_size": 16},
        {"protocol": "gfid_adm50k"},
        {"crop": "another"},
        {"extractor_sha256": "d" * 64},
    ],
)
def test_two_protocols_never_stand_in_one_column(tmp_path: Path, change: dict[str, Any]) -> None:
    first = write_report(tmp_path / "a", ("a", record(1.0, images_sha256="1")))
    second = write_report(tmp_path / "b", ("b", record(2.0, images_sha256="2", **change)))
    (name,) = change
    with pytest.raises(ValueError, match=f"the column FD-Means would hold two protocols: {name} is .*'a'.*'b'"):
        RecordTable(read_records([first, second]))
    other = write_report(tmp_path / "c", ("b", record(2.0, images_sha256="2", **change, metric="gfid_adm50k")))
    assert RecordTable(read_records([first, other])).metrics == ["FD-Means", "gfid_adm50k"]


def test_runs_of_other_samplers_and_other_labels_are_said(tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", ("mine", record(1.0, images_sha256="1", sampler={"steps": 8})))
    second = write_report(tmp_path / "b", ("mine", record(2.0, images_sha256="2", sampler={"steps": 9}, labels="even")))
    facts = RecordTable(read_records([first, second])).facts()
    assert "mine: its runs differ in their sampler, so their spread is not that of seeds" in facts
    assert "FD-Means: the labels of the rows differ: even; no labels" in facts
    assert not any("differ in" in fact for fact in RecordTable(read_records([first])).facts())


def test_the_same_images_of_two_reports_count_once(tmp_path: Path) -> None:
    paths = [write_report(tmp_path / name, ("real", record(3.0, images_sha256="same"))) for name in "ab"]
    assert len(read_records(paths)) == 1
    assert len(read_records([str(tmp_path)])) == 1


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag


def test_from_reports_of_evaluate_to_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 3)
    for name, calls in (("<slow>", 64), ("fast", 8)):
        for seed in range(2):
            folder = tmp_path / name / str(seed)
            path = save_npz(folder / "samples.npz", pixels(12, seed + calls) // (1 if calls > 8 else 2))
            run = {"network_calls": calls, "images_per_second": 100 / calls, "parameters": 5e6, "seed": seed}
            run |= {"checkpoint": "g.ckpt", "checkpoint_sha256": name, "sampler": {"steps": calls}, "commit": "abc"}
            (folder / "run.json").write_text(json.dumps(run))
            evaluate(
                reference=str(tmp_path / "reference"),
                output=str(tmp_path / "reports" / f"{calls} {seed}"),
                samples={name: path},
                image_size=8,
                num_images=12,
                extractor=ColourMeans(),
                accelerator="cpu",
            )
    first = json.loads((tmp_path / "reports" / "64 0" / "report.json").read_text())["rows"][0]["record"]
    assert (first["seed"], first["checkpoint_sha256"], first["sampled_by_commit"]) == (0, "<slow>", "abc")
    assert first["sampler"] == {"steps": 64} and len(first["images_sha256"]) == 64 and "evaluated_by_commit" in first
    found = compare([str(tmp_path / "reports")], str(tmp_path / "out"))
    assert [(row["name"], row["runs"], row["costs"]["network calls"]) for row in found["rows"]] == [
        ("<slow>", 2, 64.0),
        ("fast", 2, 8.0),
    ]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert "± sampling" in text.split("\n\n")[0] and "± training" not in text.split("\n\n")[0]
    header, _, slow, fast = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].split("\n")
    )
    assert dict(zip(header, fast, strict=True))["parameters (M)"] == "5.00"
    assert dict(zip(header, slow, strict=True))["gap to best"] == "best"
    page = (tmp_path / "out" / "comparison.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.seen.count("svg") == 3 and "&lt;slow&gt;" in page and "<slow>" not in page
    assert "<title>FD-Means against network calls</title>" in page and not re.search(r'(src|href)="', page)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'missing' is no report"):
        read_records(["missing"])
    with pytest.raises(ValueError, match="there are no reports"):
        read_records([])
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "has no rows"),
        ('{"rows": [{"name": "old", "FD-Means": 1.0}]}', "its row 'old' has no record of how it was measured"),
        (json.dumps({"rows": [{"name": "a", "record": record(0.0) | {"value": None}}]}), "of its row 'a' is no number"),
    ):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_records([str(tmp_path / "report.json")])
