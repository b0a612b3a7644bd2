"""The table of docs/training.md: `PYTHONPATH=.:tests python -m training_proof.table` writes it.

A cell has what was measured of our recipe, and after it what the authors' law gives where that is another, with the
reason. A row is one recipe.
"""

from functools import cache
from typing import Any

from helpers.recipe_files import ROOT

from training_proof import crops, initial_weights
from training_proof.initial_weights import Sizes
from training_proof.measured import UPDATES, average_of, groups_of, schedule_of, steps_of
from training_proof.published import Golden, Published, published
from training_proof.recipes import TINY_TRANSFORMER, build, recipes, settings_of

PAGE = ROOT / "docs" / "training.md"
COLUMNS = ("loss and gradient", "schedule", "groups", "crop", "EMA", "initial deviations")
YES, NO = "✓", "✗"
# Of the peak: the first steps of a warm-up are counted from 0 or from 1.
SCHEDULE_OFF = 0.006
LEAST_CHANCE = 1e-3
DEVIATION_OFF = 0.05

INTRODUCTION = """# Recipes against the authors' training code

Each recipe that names a published number, held against the code that the authors trained with, where it is public.
`PYTHONPATH=.:tests python -m training_proof.table` makes this page, and tests/test_training_proof.py fails where it
would make another. The authors' side is written out in closed form, with the commits that it was read from, in
[tests/training_proof](../tests/training_proof/published.py); nothing of it comes from our own code.

- **Loss and gradient**: the case of reference outputs, computed by the authors' own code at tiny random weights, that
  tests/pretrained/test_golden.py compares: which losses, how many gradients. Where a case has none, what it has; equal
  logits say nothing of a loss. *By their formula*: their loss, written out in
  [tests/training_proof/losses.py](../tests/training_proof/losses.py), of the logits of our network in a training step
  of the recipe, and its gradient at these.
- **Schedule**: the peak learning rate, and the largest difference from the authors' formula at ten steps of the run and
  at its last, as a share of the peak; of one that follows the loss, on a loss that stays. Then what gradients are
  clipped at.
- **Groups**: how many trained numbers have which weight decay, of the network at its full size.
- **Crop**: Pearson's chi-squared of 2,000 training crops of each of two images against the law of the authors'
  transform, and its degrees of freedom. The images are a few pixels wide: the law depends on ratios alone. Which filter
  resizes is not compared. Where crops are stored, which one of them a step reads.
- **EMA**: the decay at update 10, 1,000 and 100,000.
- **Initial deviations**: of each kind of layer, at the recipe's own shapes, by the authors' law. Ours is measured in a
  network of width 192 and three blocks.

Small differences that no column has: both networks of a GAN tokenizer step on the same reconstructions, where taming
decodes once more for its discriminator and IBQ's discriminator steps first; the dropout inside LPIPS, which taming and
LlamaGen leave on in training, is off; VAR's vectors of positions, of scales and of the start are one table with one
state of Adam; times of SEDD are spread evenly over a batch instead of drawn apart.

✓: as the authors' code. ✗: another; then what theirs is, and why. *Not published*: the authors released no training
code, or not that part. *Our choice*: the recipe says so.

"""


def render() -> str:
    """Write the whole page."""
    head = f"| recipe | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
    return INTRODUCTION + head + "".join(f"{row(recipe)}\n" for recipe in recipes())


def row(recipe: str) -> str:
    """Write the row of a recipe."""
    name = f"[{recipe}](../lightning_configs/{recipe}.yaml)"
    return f"| {name} | {' | '.join(cells(recipe).values())} |"


@cache
def cells(recipe: str) -> dict[str, str]:
    """Give the cells of a recipe by column."""
    law = published(recipe)
    if law is None:
        return dict.fromkeys(COLUMNS, "not compared")  # a test refuses it
    made = (_golden(law), _schedule(recipe, law), _groups(recipe, law), _crop(recipe, law), _average(recipe, law))
    found = dict(zip(COLUMNS, (*made, _weights(recipe, law)), strict=True))
    return {
        column: cell + (f" ({law.differs[column]})" if column in law.differs else "") for column, cell in found.items()
    }


def _golden(law: Published) -> str:
    if not isinstance(law.golden, Golden):
        return law.golden
    parts = (
        [f"{len(law.golden.losses)} losses" if len(law.golden.losses) > 1 else "the loss"] if law.golden.losses else []
    )
    if law.golden.gradients:
        parts.append(f"{law.golden.gradients} gradients")
    if law.golden.outputs:
        parts.append(law.golden.outputs)
    return f"{YES} `{law.golden.family}`: {', '.join(parts)}"


def _schedule(recipe: str, law: Published) -> str:
    if isinstance(law.schedule, str):
        return law.schedule
    settings = settings_of(recipe)
    rate, clip = (
        settings["model"]["init_args"]["optimizer"]["init_args"]["lr"],
        settings["trainer"].get("gradient_clip_val"),
    )
    ours = schedule_of(recipe)
    off = max(abs(ours(step) - law.schedule(step)) for step in steps_of(recipe))
    same = abs(rate / law.rate - 1) < 1e-3 and off <= SCHEDULE_OFF and clip == law.clip
    theirs = "" if same else f"; theirs {law.rate:g}, clip {law.clip}"
    return f"{_sign(same)} {rate:g}, {off:.4f} off; clip {'none' if clip is None else f'{clip:g}'}{theirs}"


def _groups(recipe: str, law: Published) -> str:
    if isinstance(law.decays, str):
        return law.decays
    ours = groups_of(recipe)
    theirs = groups_of(recipe, law.decays or (lambda name, value: 0.0))
    scheduler = settings_of(recipe)["model"]["init_args"].get("scheduler") or {}
    last = scheduler.get("init_args", {}).get("final_weight_decay")
    same = ours == theirs and max(ours) == law.decay and last == law.last_decay
    goes = "" if last is None else f", at the end {last:g}"
    return f"{_sign(same)} {_counts(ours)}{goes}" + ("" if same else f"; theirs {_counts(theirs)}")


def _counts(groups: dict[float, int]) -> str:
    return ", ".join(f"{count:,} at {decay:g}" for decay, count in groups.items())


def _crop(recipe: str, law: Published) -> str:
    if isinstance(law.crop, str):
        return law.crop
    found = _chi_squared(recipe)
    if found is None:
        return f"{NO} a crop that theirs never gives"
    return f"{_sign(found.chance > LEAST_CHANCE)} χ² {found.statistic:.1f} of {found.degrees}"


_MEASURED: dict[str, crops.ChiSquared | None] = {}


def _chi_squared(recipe: str) -> crops.ChiSquared | None:
    """Measure once for all recipes of one crop and one law; None if a crop is no outcome of the law."""
    law, data = published(recipe), settings_of(recipe)["data"]["init_args"]
    assert law is not None and not isinstance(law.crop, str)
    settings = {name: data[name] for name in sorted(data) if name.startswith(("crop", "m", "flip"))}
    key = repr((settings, law.crop, law.images))
    if key not in _MEASURED:
        try:
            _MEASURED[key] = crops.compare(data, law.crop, law.images)
        except crops.NoOutcomeError:
            _MEASURED[key] = None
    return _MEASURED[key]


def _average(recipe: str, law: Published) -> str:
    if isinstance(law.average, str):
        return law.average
    ours = average_of(recipe)
    if ours is None or law.average is None:
        return f"{_sign(ours is law.average)} {'none' if ours is None else 'ours has one'}"
    mine, theirs = ([average(update) for update in UPDATES] for average in (ours, law.average))
    same = all(abs(one - other) < 5e-4 for one, other in zip(mine, theirs, strict=True))
    return f"{_sign(same)} {_figures(mine)}" + ("" if same else f"; theirs {_figures(theirs)}")


def _figures(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _weights(recipe: str, law: Published) -> str:
    if isinstance(law.weights, str):
        return law.weights
    tiny = Sizes(TINY_TRANSFORMER["width"], TINY_TRANSFORMER["depth"])
    found = initial_weights.measured(build(recipe, tiny=True), law.weights, tiny)
    theirs = initial_weights.stated(build(recipe), law.weights, _sizes(recipe))
    said = []
    for label, (least, most) in theirs.items():
        share = found[label]
        figure = f"{least:.3g}" if f"{least:.3g}" == f"{most:.3g}" else f"{least:.3g} to {most:.3g}"
        said.append(f"{label} {figure}" + ("" if abs(share - 1) < DEVIATION_OFF else f" (ours x {share:.2g})"))
    same = all(abs(share - 1) < DEVIATION_OFF for share in found.values())
    return f"{_sign(same)} {'; '.join(said)}"


def _sizes(recipe: str) -> Sizes:
    """Read the width and the depth of the network that a recipe trains."""
    arguments: dict[str, Any] = settings_of(recipe)["model"]["init_args"]
    network = (arguments.get("backbone") or arguments.get("network"))["init_args"]
    network = network.get("encoder", network)
    return Sizes(network.get("width", 1), network.get("depth", 1))


def _sign(same: bool) -> str:
    return YES if same else NO


if __name__ == "__main__":
    PAGE.write_text(render())
