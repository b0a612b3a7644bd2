"""A sweep over the settings of a sampler: which are tried, what each costs and gives, and which no other one beats."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from typing import Any

from discrete_lit.core.provenance import describe
from discrete_lit.evaluation.scatter import PAGE_STYLE, scatter

Settings = dict[str, Any]
"""Name of each setting of a sampler that is swept to its value; a dot leads into an object, as in `solver.steps`."""

_GOLDEN = (sqrt(5) - 1) / 2


def with_settings(sampler: Any, changes: Mapping[str, Any]) -> Any:
    """Build a sampler like another one but for some settings.

    Raises:
        ValueError: a setting that it does not have, or a value out of its range.
    """
    names = _arguments(type(sampler))
    if lost := [name for name in names if not hasattr(sampler, name)]:
        raise ValueError(f"a {type(sampler).__name__} does not keep its {', '.join(lost)}: it cannot be swept")
    arguments = {name: getattr(sampler, name) for name in names}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        if first not in names or (rest and not hasattr(arguments.get(first), "__dict__")):
            raise ValueError(
                f"settings.{name}: a {type(sampler).__name__} has no {name}; it has {', '.join(sorted(names))}"
            )
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            arguments[first] = value
    for first, within in inner.items():
        arguments[first] = with_settings(arguments[first], within)
    return type(sampler)(**arguments)


def takes_whole_numbers(sampler: Any, name: str) -> bool:
    """Tell whether a setting of a sampler is a whole number, such as its steps."""
    *path, last = name.split(".")
    for part in path:
        sampler = getattr(sampler, part)
    return _arguments(type(sampler))[last].annotation in (int, "int")


def _arguments(kind: type) -> dict[str, inspect.Parameter]:
    """List the arguments of a class, those that it passes on to the classes it inherits from among them."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        found = {each.name: each for each in parameters if each.kind is not each.VAR_KEYWORD} | found
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            break
    return found


def configuration(sampler: Any) -> Any:
    """Describe a sampler as a configuration holds it: `{class_path, init_args}`, nested ones likewise."""
    return _nested(describe(sampler))


def _nested(described: Any) -> Any:
    if isinstance(described, list):
        return [_nested(entry) for entry in described]
    if not isinstance(described, dict):
        return described
    arguments = {name: _nested(value) for name, value in described.items() if name != "class_path"}
    return {"class_path": described["class_path"], **({"init_args": arguments} if arguments else {})}


def grid(settings: Mapping[str, Sequence[Any]]) -> Iterator[Settings]:
    """Give every combination of the values of some settings."""
    for values in product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def golden_section(
    measure: Callable[[float], float], low: float, high: float, evaluations: int
) -> list[tuple[float, float]]:
    """Find the least value of a function with one minimum in an interval, by golden section (Kiefer, 1953).

    Each evaluation after the second narrows the interval by 0.618.

    Args:
        measure: the function.
        low: lower end.
        high: upper end.
        evaluations: of the function, at least 2.

    Returns:
        Every point that was evaluated and its value, in order.
    """
    assert low < high and evaluations >= 2
    first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    tried = [(first, measure(first)), (second, measure(second))]
    (_, at_first), (_, at_second) = tried
    while len(tried) < evaluations:
        if at_first <= at_second:
            high, second, at_second = second, first, at_first
            first = high - _GOLDEN * (high - low)
            at_first = measure(first)
            tried.append((first, at_first))
        else:
            low, first, at_first = first, second, at_second
            second = low + _GOLDEN * (high - low)
            at_second = measure(second)
            tried.append((second, at_second))
    return tried


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The quality and the cost of one combination of settings."""

    settings: Settings
    distance: float
    precision: float | None
    recall: float | None
    network_calls: int
    flops_per_image: float
    accuracy: float | None = None
    """The fraction of samples that show the intended class; None where no classifier looked at them."""

    @property
    def name(self) -> str:
        """The settings in words."""
        return ", ".join(f"{name} {_short(value)}" for name, value in self.settings.items())


def best_point(points: Sequence[SweepPoint]) -> SweepPoint:
    """Choose the point of the least distance; of equal ones the cheapest."""
    return min(points, key=lambda point: (point.distance, point.network_calls))


def pareto_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Choose the points that no other one beats: none is both as near and as cheap, and better in one of the two."""
    return [
        point
        for point in points
        if not any(
            other.distance <= point.distance
            and other.network_calls <= point.network_calls
            and (other.distance, other.network_calls) != (point.distance, point.network_calls)
            for other in points
        )
    ]


def sweep_table(points: Sequence[SweepPoint], metric: str) -> list[list[str]]:
    """Write the points as a table, the nearest first, its header before them."""
    names = list(points[0].settings)
    best, front = best_point(points), pareto_front(points)
    lines = [[*names, metric, "precision", "recall", "accuracy", "network calls", "GFLOPs/image", ""]]
    for point in sorted(points, key=lambda point: point.distance):
        shares = ["" if value is None else f"{value:.3f}" for value in (point.precision, point.recall, point.accuracy)]
        mark = "best" if point is best else "Pareto" if point in front else ""
        costs = [f"{point.network_calls:,}", f"{point.flops_per_image / 1e9:,.2f}"]
        lines.append(
            [*(_short(point.settings[name]) for name in names), f"{point.distance:.3f}", *shares, *costs, mark]
        )
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def sweep_page(points: Sequence[SweepPoint], metric: str, fact: str) -> str:
    """Write one HTML page of the table and of the figure of distance against network calls."""
    header, *lines = sweep_table(points, metric)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    front = pareto_front(points)
    on_front = [number for number, point in enumerate(points) if point in front]
    named = [
        (point.name if point in front else "", float(point.network_calls), point.distance, 0.0) for point in points
    ]
    figure = scatter(named, x_name="network calls", y_name=metric, logarithmic=True, front=on_front)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Sweep</title>\n{PAGE_STYLE}</head>\n'
        f"<body><h1>Sweep</h1>\n<p>{html.escape(fact)}</p>\n{figure}<p>The line joins the settings that no other one "
        "beats in distance and network calls; the others are grey.</p>\n"
        f"<div><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div></body></html>\n"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
