"""`discrete-lit watch`: samplers that fill one grid side by side, as one HTML page."""

import html
import json
from importlib.resources import files
from math import log2
from pathlib import Path
from typing import Any

import torch

from discrete_lit.checkpoints import load
from discrete_lit.cli.drawn_steps import draw_steps, frames_of, same_grid
from discrete_lit.cli.toy_law import ToyLaw, distances, toy_samplers
from discrete_lit.core.files import atomic_write_text
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Generator

LARGEST_PAGE = 5_000_000  # bytes
# The toy: a row to watch, and one short enough to enumerate. Wong's palette keeps apart for the colour-blind.
WATCHED, ENUMERATED, COLOURS, ROUNDS = 16, 4, 3, (2, 4, 8, 16)
PALETTE = ("#0072b2", "#e69f00", "#009e73")
# A curve's colour and its dashes, which tell it apart without the colour.
_CURVES = (("var(--curve-0)", ""), ("var(--curve-1)", "7 3"), ("var(--curve-2)", "2 3"), ("var(--curve-3)", "9 3 2 3"))


def watch(
    output: str,
    checkpoints: dict[str, str] | None = None,
    *,
    labels: list[int] | None = None,
    seeds: list[int] | None = None,
) -> dict[str, Any]:
    """Write one HTML page on which samplers fill the same grid side by side, pass by pass.

    The page needs no network and no other file. Its first tab is a toy whose true conditionals are known, with the
    exact distance of each sampler's law from the truth; its second shows draws of the checkpoints, each by its own
    sampler. The pictures are those that `discrete-lit sample` draws with these labels and seed.

    Args:
        output: the file to write, as `watch.html`.
        checkpoints: a name and a path for each generator, as `{masked: a.ckpt, autoregressive: b.ckpt}`; the toy alone
            without any.
        labels: the classes to choose from; the first four by default.
        seeds: the seeds to choose from; 0 and 1 by default.

    Returns:
        What the page shows.

    Raises:
        ValueError: a path that is no generator's checkpoint, checkpoints of different grids, generators of text or of
            latents, an unknown class, a repeated or negative seed, or a page of more than 5 MB.
    """
    seeds = [0, 1] if seeds is None else seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers >= 0, at least one, got {seeds}")
    file = Path(output)
    if file.is_dir():
        raise ValueError(f"output={output!r} is a folder, accepted: the path of the page, as watch.html")
    tabs = [_toy(seeds)]
    if checkpoints:
        tabs.append(_drawn(checkpoints, labels, seeds))
    elif labels is not None:
        raise ValueError(f"labels={labels} are classes of checkpoints: give checkpoints too")
    page = {"palette": PALETTE, "tabs": tabs}
    text = _filled(page, distances(ToyLaw(ENUMERATED, COLOURS)))
    if len(text.encode("utf-8")) > LARGEST_PAGE:
        raise ValueError(
            f"the page would take {len(text.encode('utf-8')) / 1e6:.1f} MB, more than {LARGEST_PAGE / 1e6:.0f}: give "
            f"fewer labels or seeds than {len(tabs[-1]['choices'])} and {len(seeds)}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, text)
    print(f"Page: {file}")
    return page


@torch.no_grad()
def _toy(seeds: list[int]) -> dict[str, Any]:
    """The tab of the toy; what is chosen there is the number of rounds."""
    law = ToyLaw(WATCHED, COLOURS)
    draws: dict[str, dict[str, Any]] = {}
    for rounds in ROUNDS:
        for name, (backbone, sampler) in toy_samplers(law, rounds).items():
            for seed in seeds:
                random = CounterRandom(seed, torch.zeros(1, dtype=torch.int64))
                denoiser = backbone.denoiser()
                output = sampler(backbone, torch.zeros(1, dtype=torch.int64), random, denoiser=denoiser, trace=True)
                frames = frames_of(output, (1, WATCHED), COLOURS)[0]
                draws.setdefault(name, {})[f"{rounds}/{seed}"] = frames
    return {
        "name": "Toy",
        "choice": "Rounds",
        "choices": [{"value": str(rounds), "name": str(rounds)} for rounds in ROUNDS],
        "first": str(ROUNDS[2]),
        "seeds": seeds,
        "favoured": law.favoured.tolist(),
        "panels": [{"name": name, "detail": _TOY_DETAILS[name], "draws": each} for name, each in draws.items()],
    }


_TOY_DETAILS = {
    "autoregressive": "One cell a pass, left to right. Exact, and always 16 passes.",
    "MaskGIT": "Draws every masked cell, keeps the most confident, masks the rest again.",
    "masked diffusion": "Each masked cell is revealed by chance, then stays; a round that reveals none costs no pass.",
    "uniform diffusion": "Starts from random colours and edits any cell at any step.",
}


def _drawn(checkpoints: dict[str, str], labels: list[int] | None, seeds: list[int]) -> dict[str, Any]:
    """The tab of the checkpoints; what is chosen there is the class."""
    generators: dict[str, Generator] = {}
    for name, path in checkpoints.items():
        generator = load(path)
        if not isinstance(generator, Generator):
            raise ValueError(
                f"checkpoints: {name}={path!r} holds a {type(generator).__name__}, accepted: a Generator of ids"
            )
        generators[name] = generator.eval()
    same_grid(generators)
    classes = next(iter(generators.values())).num_classes
    labels = list(range(min(4, classes))) if labels is None else labels
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be different classes in [0, {classes}), at least one, got {labels}")
    panels = []
    for name, generator in generators.items():
        draws = {}
        for seed in seeds:
            for label, frames in zip(labels, draw_steps(generator, labels, seed), strict=True):
                draws[f"{label}/{seed}"] = frames
        detail = f"{type(generator).__name__}, {type(generator.sampler).__name__}"
        panels.append({"name": name, "detail": detail, "draws": draws})
    return {
        "name": "Checkpoints",
        "choice": "Class",
        "choices": [{"value": str(label), "name": str(label)} for label in labels],
        "first": str(labels[0]),
        "seeds": seeds,
        "favoured": None,
        "panels": panels,
    }


# The page.


def _filled(page: dict[str, Any], curves: dict[str, list[tuple[int, float]]]) -> str:
    """Put the data, the figure and what is shown without JavaScript into the template."""
    template = (files("discrete_lit.cli") / "watch.html").read_text(encoding="utf-8")
    data = json.dumps(page, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"FIGURE": _figure(curves), "TABLE": _table(curves), "STILL": _stills(page), "DATA": data}
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def _figure(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Draw total variation against rounds, on logarithmic scales of rounds, as SVG."""
    width, height, left, bottom = 640, 300, 68, 44
    most = max(distance for points in curves.values() for _, distance in points)
    top = 0.1 * (int(most * 10) + 1)

    def x(rounds: float) -> float:
        return left + (width - left - 16) * log2(rounds) / 4

    def y(distance: float) -> float:
        return 12 + (height - bottom - 12) * (1 - distance / top)

    lines = []
    for tick in range(round(top * 10) + 1):
        at = y(tick / 10)
        lines.append(f'<line class="rule" x1="{left}" x2="{width - 16}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>')
    for rounds in (1, 2, 4, 8, 16):
        lines.append(f'<text x="{x(rounds):.1f}" y="{height - 24}" text-anchor="middle">{rounds}</text>')
    lines.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">rounds</text>')
    middle = (height - bottom) / 2
    lines.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">total variation</text>'
    )
    for (_, points), (colour, dashes) in zip(curves.items(), _CURVES, strict=True):
        path = " ".join(f"{x(rounds):.1f},{y(distance):.1f}" for rounds, distance in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dashes}"/>')
        lines += [
            f'<circle cx="{x(rounds):.1f}" cy="{y(distance):.1f}" r="3.5" fill="{colour}"/>'
            for rounds, distance in points
        ]
    return (
        f'<svg class="figure" viewBox="0 0 {width} {height}" role="img" aria-label="Total variation from the true law '
        f'against rounds; the table below has the numbers">{"".join(lines)}</svg>'
    )


def _table(curves: dict[str, list[tuple[int, float]]]) -> str:
    """The numbers of the figure at 1, 2, 3, 4, 8 and 16 rounds, and the legend, as an HTML table."""
    shown = (1, 2, 3, 4, 8, 16)
    head = "".join(f'<th scope="col">{rounds}</th>' for rounds in shown)
    rows = []
    for (name, points), (colour, dashes) in zip(curves.items(), _CURVES, strict=True):
        of_rounds = dict(points)
        cells = "".join(
            f"<td>{of_rounds[rounds]:.4f}</td>" if rounds in of_rounds else "<td>–</td>" for rounds in shown
        )
        key = (
            f'<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><line x1="0" x2="28" y1="4" y2="4" '
            f'stroke="{colour}" stroke-dasharray="{dashes}"/></svg>'
        )
        rows.append(f'<tr><th scope="row">{key}{html.escape(name)}</th>{cells}</tr>')
    return f'<table><thead><tr><th scope="col">Rounds</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _stills(page: dict[str, Any]) -> str:
    """The last frame of the first draw of every panel, and what it cost, for a browser without JavaScript."""
    parts = []
    for tab in page["tabs"]:
        rows = []
        for panel in tab["panels"]:
            last = panel["draws"][f"{tab['first']}/{tab['seeds'][0]}"][-1]
            if last["picture"]:
                picture = f'<img src="{last["picture"]}" width="96" alt="the image that was drawn">'
            else:
                cells = "".join(
                    f'<rect x="{place * 12}" width="11" height="16" fill="{PALETTE[number]}"/>'
                    for place, number in enumerate(last["ids"])
                )
                picture = f'<svg width="192" height="16" role="img" aria-label="the cells drawn">{cells}</svg>'
            rows.append(
                f"<tr><th scope='row'>{html.escape(panel['name'])}</th><td>{picture}</td>"
                f"<td>{last['passes']}</td><td>{last['calls']}</td></tr>"
            )
        parts.append(
            f"<h2>{html.escape(tab['name'])}: {tab['choice'].lower()} {tab['first']}, seed {tab['seeds'][0]}</h2>"
            f"<table><thead><tr><th>Sampler</th><th>Drawn</th><th>Passes</th><th>Network calls</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )
    return "".join(parts)
