"""The rows of a run as lines on a screen and as a page of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]

_VERDICT = {True: "ok", False: "WRONG", None: "-"}
_MET = {True: "met", False: "missed", None: "-"}


def number(value: Any) -> str:
    """Three digits that count, or what stands for a number that is not finite."""
    if not isinstance(value, int | float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def of_check(row: Values) -> list[str]:
    """Verdict, name, case, error, tolerance, measure, note."""
    error, tolerance = ("" if row[key] is None else number(row[key]) for key in ("error", "tolerance"))
    return [_VERDICT[row["ok"]], row["name"], row["case"], error, tolerance, row["what"], row["note"]]


def of_measurement(row: Values) -> list[str]:
    """Verdict, name, case, value, floor with the share of it, peer with the ratio to it, target, note."""
    floor, peer = row["floor"], row["peer"]
    return [
        _MET[row["met"]],
        row["name"],
        row["case"],
        f"{number(row['value'])} {row['unit']}",
        f"{_percent(row['share'])} of {number(floor['value'])} ({floor['what']})" if floor else "",
        f"{number(row['times_the_peer'])}x {peer['name']} ({number(peer['value'])})" if peer else "",
        row["target"],
        row["note"],
    ]


def line(row: Values) -> str:
    """A row on a screen."""
    if "unit" not in row:
        verdict, name, case, error, tolerance, what, note = of_check(row)
        found = f"{error} of at most {tolerance}" if error and tolerance else error
        parts = [f"{name}, {case}" if case else name, f"{found} ({what})" if found and what else found or what, note]
    else:
        verdict, name, case, value, floor, peer, target, note = of_measurement(row)
        parts = [f"{name}, {case}" if case else name, value, floor, peer, target and f"wanted: {target}", note]
    return f"  {verdict:6s} {'; '.join(part for part in parts if part)}"


def markdown(run: Values) -> str:
    """The page of a run: where and when, then a table of each part."""
    facts = {
        "Device": f"{run['machine']['name']}, {run['machine']['memory'] / 2**30:.0f} GiB" if run["machine"] else "",
        "Driver": run["driver"],
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "Commit": run["commit"] or "not known",
        "Date": run["date"],
        "Command": f"`{run['command']}`",
    }
    if run["machine"]:
        rates = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in run["machine"]["rates"].items())
        facts["Measured limits"] = f"{run['machine']['bandwidth'] / 1e9:,.0f} GB/s copied; TFLOP/s: {rates}"
    lines = ["# Run of `benchmarks/gpu.py`", "", *(f"- {name}: {text}" for name, text in facts.items() if text)]
    if not run["judged"]:
        lines += ["", "Not a run at full size on a GPU: no speed below means anything."]
    for kind, title in {"right": "Right", "fast": "Fast"}.items():
        parts = [part for part in run["parts"] if part["kind"] == kind]
        if parts:
            lines += ["", f"## {title}"]
        for part in parts:
            lines += ["", f"### {part['name']}: {part['what']}", ""]
            lines.append(f"{part['status'][0].upper()}{part['status'][1:]} ({part['seconds']:.0f} s).")
            if part["rows"]:
                lines += ["", *_table(part["rows"])]
            if part["log"]:
                lines += ["", "```", part["log"], "```"]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Values]) -> list[str]:
    measured = "unit" in rows[0]
    header = ["", "What", "Case", "Value", "Share of the floor", "Against", "Wanted", "Note"]
    if not measured:
        header = ["", "What", "Case", "Error", "Tolerance", "Measure", "Note"]
    cells = [(of_measurement if measured else of_check)(row) for row in rows]
    written = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *cells)]
    lines = [f"| {' | '.join(row)} |" for row in written]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _percent(share: Any) -> str:
    return f"{100 * share:.0f}%" if isinstance(share, int | float) else str(share)
