"""Records of many evaluations in one table: quality against cost, with the spread over seeds, and what it leaves open.

A record is one row of a `report.json`, which says all that its distance depends on. Records of one name are the runs of
one row. Their spread has two parts: over sampling seeds of one checkpoint, and over checkpoints, which is training
seeds. Two protocols never stand in one column, and a gap below the spread is marked as inconclusive.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import sqrt
from pathlib import Path
from typing import Any

from discrete_lit.core.bounded_reading import read_json
from discrete_lit.core.files import atomic_write_text
from discrete_lit.evaluation.scatter import PAGE_STYLE, scatter
from discrete_lit.evaluation.seed_spread import Difference, Spread, compare_means, spread_of

# Where these differ, two numbers of one metric are of two protocols.
_IDENTITY = (
    *("protocol", "extractor_sha256", "resize", "crop", "quantisation", "image_size", "image_channels", "apply_exif"),
    *("reference_sha256", "reference_count", "count"),
)
# And where these do, in the records that have them.
_FURTHER_IDENTITY = ("perturbation",)
_COSTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], float, str]] = {
    "network calls": ("sampling", lambda found: found.get("network_calls"), 1, ",.0f"),
    "images/s": ("sampling", lambda found: found.get("images_per_second"), 1, ",.1f"),
    "GFLOPs/image": ("sampling", lambda found: found.get("flops_per_image"), 1e9, ",.2f"),
    "parameters (M)": ("sampling", lambda found: found.get("parameters"), 1e6, ",.2f"),
    "-log p (nats)": ("likelihood", lambda found: found.get("nats"), 1, ",.1f"),
}
# Before -log p: a bound on log p makes it an upper bound.
_SIGNS = {"bound": "≤ ", "estimate": "≈ "}


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One row of one report."""

    name: str
    kind: str
    report: str
    """Path of the report."""
    record: dict[str, Any]
    sampling: dict[str, Any]
    likelihood: dict[str, Any]

    @property
    def metric(self) -> str:
        return self.record["metric"]

    @property
    def value(self) -> float:
        return self.record["value"]

    @property
    def model(self) -> str:
        """Tell checkpoints apart; samples that do not say theirs are each of their own."""
        return str(self.record.get("checkpoint_sha256") or self.record.get("images_sha256") or self.report)

    def cost(self, header: str) -> float | None:
        """Give one of the costs, in the unit of its column."""
        place, read, unit, _ = _COSTS[header]
        found = read(getattr(self, place))
        return found / unit if isinstance(found, int | float) and not isinstance(found, bool) else None


def read_records(paths: Iterable[str]) -> list[ImageRecord]:
    """Read the records of reports: files, folders that hold a `report.json`, or run folders with some inside.

    The same images that were measured alike twice, as those of a held-out set in several reports, count once.

    Raises:
        ValueError: nothing there, no report, or one of a version without records.
    """
    found: dict[tuple[str, ...], ImageRecord] = {}
    for given in paths:
        path = Path(given).expanduser()
        files = [path] if path.is_file() else sorted(path.rglob("report.json")) if path.is_dir() else []
        if not files:
            raise ValueError(f"{given!r} is no report: accepted are a report.json, and folders that hold some")
        for file in files:
            for record in _read_report(file):
                same = json.dumps([record.record.get(name) for name in ("metric", *_IDENTITY, *_FURTHER_IDENTITY)])
                what = record.record.get("images_sha256") or record.record.get("checkpoint_sha256") or str(file)
                found.setdefault((record.name, same, str(what)), record)
    if not found:
        raise ValueError("there are no reports: give at least one report.json")
    return list(found.values())


def _read_report(file: Path) -> list[ImageRecord]:
    try:
        report = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{str(file)!r} has no rows: it is no report of `discrete-lit evaluate`")
    records = []
    for row, record in chain.from_iterable(map(_records_of, rows)):
        if not isinstance(record, dict) or any(name not in record for name in ("metric", "value", *_IDENTITY)):
            raise ValueError(
                f"{str(file)!r}: its row {row.get('name') if isinstance(row, dict) else row!r} has no record of how it "
                "was measured, as reports of earlier versions: evaluate again"
            )
        if not isinstance(record["value"], int | float):
            raise ValueError(f"{str(file)!r}: the {record['metric']} of its row {row.get('name')!r} is no number")
        records.append(
            ImageRecord(
                name=str(row.get("name")),
                kind=str(row.get("kind")),
                report=str(file),
                record=record,
                sampling=row.get("sampling") or {},
                likelihood=row.get("likelihood") or {},
            )
        )
    return records


def _records_of(row: Any) -> list[tuple[Any, Any]]:
    """Pair a row with each of its records: that of its distance, and those at each rate of perturbed ids."""
    if not isinstance(row, dict):
        return [(row, None)]
    return [(row, row.get("record")), *((row, found.get("record")) for found in row.get("perturbed") or [])]


@dataclass(frozen=True, kw_only=True)
class SeedSpread:
    """The mean of one figure over the runs of a row, and what it varies by."""

    mean: float
    models: Spread
    """The mean of each checkpoint."""
    sampling: float | None
    """Standard deviation over sampling seeds of one checkpoint, pooled over checkpoints; None of one draw of each."""
    draws: Spread
    """Every value."""

    @staticmethod
    def of(records: Sequence[ImageRecord]) -> SeedSpread:
        """Gather the distances of one row."""
        by_model: dict[str, list[float]] = {}
        for record in records:
            by_model.setdefault(record.model, []).append(record.value)
        spreads = [Spread(tuple(values)) for values in by_model.values()]
        several = [(spread.standard_deviation, len(spread.values) - 1) for spread in spreads]
        known = [(deviation, freedom) for deviation, freedom in several if deviation is not None]
        sampling = None
        if known:
            sampling = sqrt(sum(d**2 * freedom for d, freedom in known) / sum(freedom for _, freedom in known))
        models = Spread(tuple(spread.mean for spread in spreads))
        return SeedSpread(
            mean=models.mean, models=models, sampling=sampling, draws=Spread(tuple(record.value for record in records))
        )

    @property
    def training(self) -> float | None:
        """Standard deviation over the means of checkpoints; None of one alone."""
        return self.models.standard_deviation

    def gap_to(self, other: SeedSpread) -> Difference | None:
        """Compare two means by Welch's t-test over checkpoints, or over draws where each row has one checkpoint."""
        if len(self.models.values) == len(other.models.values) == 1:
            return compare_means(self.draws, other.draws)
        return compare_means(self.models, other.models)


class RecordTable:
    """Compare records of many evaluations.

    Args:
        records: of any number of reports.

    Raises:
        ValueError: two protocols in one column.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self.records = list(records)
        self.metrics = list(dict.fromkeys(record.metric for record in records))
        for metric in self.metrics:
            _check_one_protocol([record for record in records if record.metric == metric])
        self.rows: dict[str, list[ImageRecord]] = {}
        for record in records:
            self.rows.setdefault(record.name, []).append(record)
        self.spreads = {
            metric: {
                name: SeedSpread.of(own)
                for name, runs in self.rows.items()
                if (own := [record for record in runs if record.metric == metric])
            }
            for metric in self.metrics
        }

    def best(self, metric: str, kind: str) -> str:
        """Name the row of the lowest mean among those of one kind: samples, reconstructions, or real images."""
        found = self.spreads[metric]
        return min((name for name in found if self._kind(name) == kind), key=lambda name: found[name].mean)

    def _kind(self, name: str) -> str:
        return self.rows[name][0].kind

    def runs(self, name: str) -> int:
        """Count the runs of a row, each of which may be measured by several metrics."""
        return max(len(found[name].draws.values) for found in self.spreads.values() if name in found)

    def verdict(self, metric: str, name: str) -> str:
        """Say how a row stands to the best one of its kind: `best`, `worse`, `inconclusive`, or `spread unknown`.

        A gap is inconclusive where the 95% interval around it, by the spread over runs, holds 0. Of real images nothing
        is said: they are the floor.
        """
        if self._kind(name) == "real":
            return ""
        best = self.best(metric, self._kind(name))
        if name == best:
            return "best"
        gap = self.spreads[metric][best].gap_to(self.spreads[metric][name])
        return "spread unknown" if gap is None else "inconclusive" if gap.within else "worse"

    def gap(self, metric: str, name: str) -> str:
        """Write the gap of a row to the best one of its kind, and what the spread says of it."""
        verdict = self.verdict(metric, name)
        if verdict in ("", "best"):
            return verdict
        best = self.spreads[metric][self.best(metric, self._kind(name))]
        return f"+{_number(self.spreads[metric][name].mean - best.mean)} {verdict}"

    def cost(self, header: str, name: str) -> float | None:
        """Average one of the costs over the runs of a row."""
        spread = spread_of([record.cost(header) for record in self.rows[name]])
        return None if spread is None else spread.mean

    def cells(self) -> list[list[str]]:
        """Write the table, its header first, without columns that are empty in every row."""
        columns: list[list[str]] = [["images of", *self.rows]]
        columns.append(["runs", *(str(self.runs(name)) for name in self.rows)])
        for metric in self.metrics:
            found = self.spreads[metric]
            columns.append([metric, *(_number(found[name].mean) if name in found else "" for name in self.rows)])
            for header in ("sampling", "training"):
                values = [getattr(found[name], header) if name in found else None for name in self.rows]
                columns.append([f"± {header}", *("" if value is None else _number(value) for value in values)])
            columns.append(["gap to best", *(self.gap(metric, name) if name in found else "" for name in self.rows)])
        for header, (_, _, _, form) in _COSTS.items():
            values = [self.cost(header, name) for name in self.rows]
            signs = [
                _SIGNS.get(runs[0].likelihood.get("kind", ""), "") if "log p" in header else ""
                for runs in self.rows.values()
            ]
            columns.append(
                [
                    header,
                    *("" if v is None else sign + format(v, form) for v, sign in zip(values, signs, strict=True)),
                ]
            )
        kept = [column for column in columns if any(column[1:])]
        return [list(line) for line in zip(*kept, strict=True)]

    def facts(self) -> list[str]:
        """Say what each column is of, and what limits it."""
        facts = []
        for metric in self.metrics:
            own = next(record.record for record in self.records if record.metric == metric)
            facts.append(
                f"{metric}: lower is better; {own['count']:,} images a row of {own['image_size']} pixels against "
                f"{own['reference']} (sha256 {str(own['reference_sha256'])[:16]}); extractor {own.get('extractor')}, "
                f"weights sha256 {str(own['extractor_sha256'])[:16]}; {own['resize']}; {own['quantisation']}; "
                f"{own['crop']}{_perturbation(own)}"
            )
            labels = {record.record.get("labels") for record in self.records if record.kind == "samples"}
            if len(labels) > 1:
                facts.append(f"{metric}: the labels of the rows differ: {'; '.join(sorted(map(str, labels)))}")
        facts.append(
            "± sampling: standard deviation over sampling seeds of one checkpoint; ± training: over the means of "
            "checkpoints, such as training seeds; none where there is one alone"
        )
        facts.append(
            "gap to best: of samples among samples, of reconstructions among reconstructions; inconclusive where the "
            "means differ by less than t · √(s₁²/n₁ + s₂²/n₂), Welch's 95% interval over checkpoints, or over sampling "
            "seeds where each row has one checkpoint (the spread over training seeds is then not in it)"
        )
        for name, runs in self.rows.items():
            if any(run.record.get("sampler") != runs[0].record.get("sampler") for run in runs):
                facts.append(f"{name}: its runs differ in their sampler, so their spread is not that of seeds")
        tokenizers: dict[str, list[str]] = {}
        for name, runs in self.rows.items():
            fingerprint = runs[0].likelihood.get("tokenizer_fingerprint")
            if fingerprint:
                tokenizers.setdefault(fingerprint, []).append(name)
        if len(tokenizers) > 1:
            groups = "; ".join(", ".join(names) for names in tokenizers.values())
            facts.append(f"-log p is comparable within one tokenizer alone, which these have in common: {groups}")
        return facts

    def markdown(self) -> str:
        """Write the table and what it is of, as Markdown."""
        header, *lines = self.cells()
        table = [f"| {' | '.join(header)} |", f"|:--|{'--:|' * (len(header) - 1)}"]
        table += [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join(table) + "\n\n" + "\n".join(f"- {fact}" for fact in self.facts()) + "\n"

    def page(self) -> str:
        """Write one HTML page of the table, and of figures of each metric against each cost; it needs no other file."""
        header, *lines = self.cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
        figures = "".join(
            figure for metric in self.metrics for cost in _COSTS if (figure := self._figure(metric, cost)) is not None
        )
        facts = "".join(f"<li>{html.escape(fact)}</li>\n" for fact in self.facts())
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>\n'
            f"{PAGE_STYLE}</head>\n<body><h1>Comparison</h1>\n<div>"
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n<ul>{facts}</ul>\n{figures}"
            "</body></html>\n"
        )

    def _figure(self, metric: str, cost: str) -> str | None:
        """Draw a metric against a cost as SVG, ± its spread; None where fewer than two rows have both."""
        points = []
        for name, spread in self.spreads[metric].items():
            place = self.cost(cost, name)
            if place is not None and (place > 0 or "log p" in cost):
                points.append((name, place, spread.mean, spread.training or spread.sampling or 0.0))
        if len(points) < 2:
            return None
        return scatter(points, x_name=cost, y_name=metric, logarithmic="log p" not in cost)

    def to_dict(self) -> dict[str, Any]:
        """Give every figure as data that JSON holds."""
        return {
            "metrics": self.metrics,
            "rows": [
                {
                    "name": name,
                    "runs": self.runs(name),
                    "reports": sorted({record.report for record in runs}),
                    "metrics": {
                        metric: {
                            "mean": found[name].mean,
                            "sampling": found[name].sampling,
                            "training": found[name].training,
                            "values": list(found[name].draws.values),
                            "gap_to_best": self.verdict(metric, name),
                        }
                        for metric, found in self.spreads.items()
                        if name in found
                    },
                    "costs": {header: self.cost(header, name) for header in _COSTS},
                }
                for name, runs in self.rows.items()
            ],
            "facts": self.facts(),
        }

    def write(self, folder: Path) -> None:
        """Write `comparison.md`, `comparison.html` and `comparison.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        atomic_write_text(folder / "comparison.json", text)
        atomic_write_text(folder / "comparison.md", self.markdown())
        atomic_write_text(folder / "comparison.html", self.page())


def _check_one_protocol(records: Sequence[ImageRecord]) -> None:
    first = records[0]
    for record in records[1:]:
        for name in (*_IDENTITY, *_FURTHER_IDENTITY):
            own, other = first.record.get(name), record.record.get(name)
            if other != own:
                raise ValueError(
                    f"the column {first.metric} would hold two protocols: {name} is {own!r} for {first.name!r} in "
                    f"{first.report!r} and {other!r} for {record.name!r} in {record.report!r}; compare them apart, or "
                    "evaluate them alike"
                )


def _perturbation(record: dict[str, Any]) -> str:
    """Say how ids were perturbed, where they were."""
    found = record.get("perturbation")
    if not found:
        return ""
    return (
        f"; each id replaced, with probability {found['rate']:g}, by one of the {found['neighbours']} ids of the "
        "nearest codes"
    )


def _number(value: float) -> str:
    """Write a distance with as many digits as say something."""
    return f"{value:,.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
