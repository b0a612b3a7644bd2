"""Which samplers draw from the law of their network, and what does confidence cost? Exact laws; table, figure.

  python docs/experiments/exactness.py

The toy of `discrete-lit watch`: sixteen positions of four colours, whose conditionals are known, so that a sampler is
all that may be wrong. Its law is followed exactly, nothing is drawn. Beside the total variation from the truth stands
what a researcher would see: the entropy of the number of favoured colours, and its mean. Needs matplotlib.
"""

import argparse
from pathlib import Path

import torch
from shared import processor_minutes, stamp
from torch import Tensor

from discrete_lit.evaluation.favoured_colours import (
    FavouredColours,
    maskgit_law,
    raster_total_variation,
    total_variation,
    uniform_law,
    unmasking_law,
)

ROUNDS = (1, 2, 4, 8, 16)
MORE = (32, 64)


def bits(law: Tensor) -> float:
    """The entropy of a law in bits."""
    return float(torch.special.entr(law).sum() / torch.tensor(2.0).log())


def mean_hits(law: Tensor) -> float:
    return float((law * torch.arange(len(law))).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.1, 0.5, 1.0, 2.0, 4.5, 10.0, 100.0])
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what is written")
    given = parser.parse_args()
    law = FavouredColours()
    truth = law.count_law()
    laws: dict[str, dict[int, Tensor]] = {
        f"MaskGIT, choice temperature {tau:g}": {t: maskgit_law(law, t, tau) for t in ROUNDS}
        for tau in given.temperatures
    }
    laws["Diffusion of masks, ancestral"] = {t: unmasking_law(law, t) for t in (*ROUNDS, *MORE)}
    laws["Uniform diffusion, ancestral"] = {t: uniform_law(law, t) for t in (*ROUNDS, *MORE)}
    distances = {name: {t: total_variation(each, truth) for t, each in found.items()} for name, found in laws.items()}
    raster = "Raster order, 16 / rounds positions at once"
    distances = {raster: {t: raster_total_variation(law, t) for t in ROUNDS}, **distances}

    command = (
        f"python docs/experiments/exactness.py --temperatures {' '.join(f'{tau:g}' for tau in given.temperatures)}"
    )
    columns = (*ROUNDS, *MORE)
    lines = [
        "# Which samplers are exact, and what does confidence cost?",
        "",
        f"`{command}`, {stamp()}, {processor_minutes():.1f} minutes of processor. No number is sampled: there are no "
        "seeds.",
        "",
        "Total variation from the truth, by rounds:",
        "",
        f"| sampler | {' | '.join(map(str, columns))} |",
        f"|:--|{'--:|' * len(columns)}",
    ]
    for name, of in distances.items():
        cells = (f"{of[t]:.3f}" if t in of else "" for t in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The number of favoured colours among {law.length}: its entropy in bits and its mean, after 16 rounds. The "
        f"truth has {bits(truth):.2f} and {mean_hits(truth):.2f}.",
        "",
        "| sampler | entropy (bits) | mean |",
        "|:--|--:|--:|",
        *(f"| {name} | {bits(found[16]):.2f} | {mean_hits(found[16]):.2f} |" for name, found in laws.items()),
    ]
    picture = given.page.with_suffix(".png")
    draw_figure(distances, laws, truth, picture)
    given.page.write_text("\n".join([*lines, "", f"![]({picture.name})", ""]))
    print(f"Wrote {given.page} and {picture}")


def draw_figure(
    distances: dict[str, dict[int, float]], laws: dict[str, dict[int, Tensor]], truth: Tensor, path: Path
) -> None:
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    shown = [name for name in laws if "MaskGIT" not in name] + [
        name for name in laws if name.endswith((" 0.5", " 4.5", " 100"))
    ]
    left.plot(*zip(*sorted(next(iter(distances.values())).items()), strict=True), marker="o", color="black")
    left.lines[-1].set_label("raster order")
    for number, name in enumerate(shown):
        left.plot(list(distances[name]), list(distances[name].values()), marker="o", color=f"C{number}", label=name)
        right.plot(laws[name][16], color=f"C{number}", marker=".")
    right.plot(truth, color="black", linestyle="--", label="the truth")
    left.set(xscale="log", xlabel="rounds", ylabel="total variation from the truth", ylim=(0, 0.85))
    left.set_xticks([*ROUNDS, *MORE], [str(t) for t in (*ROUNDS, *MORE)])
    left.minorticks_off()
    left.legend(fontsize="x-small")
    right.set(xlabel="favoured colours, after 16 rounds", ylabel="probability")
    right.legend(fontsize="x-small")
    pyplot.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
