"""Which tokenizer, generator and sampler to take: recipes by what is wished for, what they cost, and what was measured.

`measured_recipes.json` beside this file says which recipe suits which wish, and what the project's own runs measured of
it, with the page, the command, the date and the machine. `advise` adds what each would cost on this machine, leaves out
what the budget does not allow, and orders the rest.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isnan
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
import yaml

from discrete_lit.core.images import ImageSize, normal_size, size_text
from discrete_lit.evaluation.draw_cost import Clock, DrawCost, count_draw, median_seconds, time_draw
from discrete_lit.evaluation.machine_speed import MachineSpeed
from discrete_lit.tokenizers import TextTokenizer

Wish = Literal["text", "speed", "quality", "likelihood", "editing"]
WISHES: dict[Wish, str] = {
    "text": "text and image in one sequence, each drawn given the other",
    "speed": "most images a second on this machine first",
    "quality": "lowest measured distance first, then lowest published FID; what has neither comes last",
    "likelihood": "-log p of held-out images: exact before bounds, then as for quality",
    "editing": "any positions may be kept while the others are drawn anew; then as for quality",
}
FACTS = Path(__file__).with_name("measured_recipes.json")
DISTANCE = "FD-EffNetLite0"
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits; None where there is none."""

    images: int = 1
    """To draw."""
    seconds: float | None = None
    """For drawing them."""
    memory_gb: float | None = None
    """Memory while a batch is drawn, in 10^9 bytes."""
    training_seconds: float | None = None
    """For training by the recipe, or as long as the measured run."""
    training_flops: float | None = None
    """The same in floating-point operations."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < inf:
                raise ValueError(f"{name} is {value}, accepted: a number above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make images that this project has a recipe for."""

    name: str
    recipe: str
    """Path of the generator's recipe below `lightning_configs`."""
    given: dict[str, str]
    """Paths of the recipes of its frozen parts, such as `tokenizer`, by the argument that takes them."""
    image_size: ImageSize
    wishes: list[Wish]
    likelihood: Literal["exact", "bound", "none"]
    training_images: int | None
    """Images of the measured run or of the recipe's whole training, counted as often as they are seen."""
    measured: dict[str, Any] | None = None
    """Figures of the project's own run, by the name of their column, and the `source` in the list of sources."""
    published: dict[str, float] | None = None
    """Figures that the recipe's opening comment quotes from the paper."""
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe, its predicted costs, and whether it keeps the budget."""

    recipe: Recipe
    tokenizer: str
    """Class of the tokenizer, or of what makes its latents."""
    generator: str
    sampler: str
    cost: DrawCost
    seconds: float
    """For one image in a batch, decoded."""
    timed: bool
    """Whether `seconds` comes from timed draws, rather than from operations at the speed of the others."""
    training_seconds: float | None
    """At least: of all operations at the speed of a large matrix product; None where they cannot be counted."""
    exceeds: dict[str, float]
    """The limits of the budget that it does not keep: how often each is exceeded."""


def read_facts(file: Path = FACTS) -> tuple[list[Recipe], dict[str, dict[str, str]]]:
    """Read the recipes, and the sources of what was measured of them by their names."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    recipes = [Recipe(**{**entry, "image_size": _size(entry["image_size"])}) for entry in facts["recipes"]]
    return recipes, facts["sources"]


def _size(given: Any) -> ImageSize:
    return normal_size(tuple(given) if isinstance(given, list) else given)


def suitable(recipes: Sequence[Recipe], wish: str, image_size: ImageSize) -> list[Recipe]:
    """Choose the recipes of a size that suit a wish.

    Raises:
        ValueError: a wish that is not known, or a size that no recipe for it has.
    """
    if wish not in get_args(Wish):
        raise ValueError(f"wish={wish!r} is not known, accepted: {', '.join(get_args(Wish))}")
    size = normal_size(image_size)
    for_wish = [recipe for recipe in recipes if wish in recipe.wishes]
    found = [recipe for recipe in for_wish if recipe.image_size == size]
    if not found:
        sizes = dict.fromkeys(size_text(recipe.image_size) for recipe in for_wish)
        raise ValueError(
            f"image_size={image_size}: no recipe for {wish} has images of this size, accepted: {', '.join(sizes)}"
        )
    return found


def whole_model(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Read the configuration of a recipe's generator, with those of its frozen parts in the place of their checkpoints.

    Args:
        recipe: it.
        folder: of the recipes, `lightning_configs`.

    Raises:
        ValueError: a file that is not there.
    """
    model = _model(folder / recipe.recipe)
    arguments = model["init_args"]
    for name, path in recipe.given.items():
        part = _model(folder / path)
        if name == "discrete":  # a generator of ids, with a tokenizer of its own
            part["init_args"]["tokenizer"] = _model(folder / "quickstart/tokenizer.yaml")
        arguments[name] = part
    if "text_tokenizer" in arguments:
        # The words of a run are learned; how many there are changes no cost.
        letters = TextTokenizer.characters("abcdefghijklmnopqrstuvwxyz ")
        arguments["text_tokenizer"] = {"class_path": "TextTokenizer", "init_args": {"file": letters.json}}
    return model


def _model(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"recipes={str(file.parents[1])!r}: there is no {file}; accepted: a folder with the recipes that "
            "`discrete-lit recipes` lists"
        ) from error
    model = deepcopy(settings["model"])
    for name in ("optimizer", "scheduler", "perceptual_loss", "adversarial_loss", "alignment_loss"):
        model["init_args"].pop(name, None)
    return model


def advise(
    wish: Wish,
    image_size: ImageSize,
    *,
    budget: Budget,
    speed: MachineSpeed,
    folder: Path,
    batch_size: int,
    device: torch.device,
    dtype: str = "float32",
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    clock: Clock | None = None,
    seconds: float = 30.0,
) -> list[Advice]:
    """Find the recipes for a wish that keep a budget, the best first.

    Operations and memory are counted for all; draws are timed from the cheapest on, until the time is over.

    Args:
        wish: a key of `WISHES`.
        image_size: of the images.
        budget: limits.
        speed: of this machine.
        folder: of the recipes.
        batch_size: images drawn at a time.
        device: to draw on.
        dtype: precision of products, a key of `speed.products`.
        precision: makes the context to draw in.
        clock: `median_seconds` by default.
        seconds: for timing draws; what does not fit is predicted from the operations.

    Raises:
        ValueError: what `suitable` refuses, or a budget that no recipe keeps: it says which comes nearest.
    """
    recipes = suitable(read_facts()[0], wish, image_size)
    clock = clock or partial(median_seconds, device=device)
    models = {recipe.name: whole_model(recipe, folder) for recipe in recipes}
    costs = {name: count_draw(model, batch_size=batch_size) for name, model in models.items()}
    timed: dict[str, float] = {}
    end = time.perf_counter() + seconds
    for name in sorted(models, key=lambda name: _operations(costs[name])):
        if timed and time.perf_counter() > end:
            break
        timed[name] = time_draw(models[name], batch_size=batch_size, clock=clock, device=device, precision=precision)
    rate = median(_operations(costs[name]) / taken for name, taken in timed.items())
    found = []
    for recipe in recipes:
        cost, model = costs[recipe.name], models[recipe.name]
        taken = timed.get(recipe.name, _operations(cost) / rate)
        training = cost.training_flops * (recipe.training_images or 0)
        known = bool(recipe.training_images) and not isnan(training)
        training_seconds = training / speed.products[dtype] if known else None
        needs = {
            "seconds": (taken * budget.images, budget.seconds),
            "memory_gb": (cost.memory / _GIGA, budget.memory_gb),
            "training_seconds": (training_seconds, budget.training_seconds),
            "training_flops": (training if known else None, budget.training_flops),
        }
        exceeds = {
            name: inf if need is None else need / limit
            for name, (need, limit) in needs.items()
            if limit is not None and (need is None or need > limit)
        }
        found.append(
            Advice(
                recipe=recipe,
                tokenizer=_class(model["init_args"]["tokenizer"]),
                generator=_class(model),
                sampler=_class(model["init_args"].get("sampler", {"class_path": "its own"})),
                cost=cost,
                seconds=taken,
                timed=recipe.name in timed,
                training_seconds=training_seconds,
                exceeds=exceeds,
            )
        )
    kept = [each for each in found if not each.exceeds]
    if not kept:
        nearest = min(found, key=lambda each: max(each.exceeds.values()))
        wrong = ", ".join(
            f"{name} {times:,.1f} times" if times < inf else f"{name}, which cannot be predicted of it"
            for name, times in nearest.exceeds.items()
        )
        raise ValueError(
            f"none of the {len(found)} recipes for {wish} at {size_text(normal_size(image_size))} keeps this budget; "
            f"the nearest, {nearest.recipe.name}, exceeds {wrong}"
        )
    return sorted(kept, key=partial(_order, wish=wish))


def _operations(cost: DrawCost) -> float:
    return cost.flops + cost.decoding_flops


def _class(settings: Mapping[str, Any]) -> str:
    return settings["class_path"].rpartition(".")[2]


def _order(advice: Advice, *, wish: Wish) -> tuple[Any, ...]:
    recipe = advice.recipe
    if wish == "speed":
        return (advice.seconds,)
    distance = mean_of(recipe.measured[DISTANCE]) if recipe.measured and DISTANCE in recipe.measured else inf
    published = (recipe.published or {}).get("FID", inf)
    exact = recipe.likelihood != "exact" if wish == "likelihood" else False
    return exact, distance, published, advice.seconds


def mean_of(figure: str) -> float:
    """Read the mean of a figure such as `35.55 ± 0.61` or `84.5%`."""
    return float(figure.partition("±")[0].strip().rstrip("%"))


# What is told.

_COLUMNS: dict[str, Callable[[Advice], str]] = {
    "recipe": lambda each: each.recipe.name,
    "tokenizer": lambda each: each.tokenizer,
    "generator": lambda each: each.generator,
    "sampler": lambda each: each.sampler,
    "passes": lambda each: f"{each.cost.sequential_passes:,.0f}",
    "calls": lambda each: f"{each.cost.network_calls:,.0f}",
    "GFLOPs/image": lambda each: f"{each.cost.flops / _GIGA:,.2f}",
    "decoding": lambda each: f"{each.cost.decoding_flops / _GIGA:,.2f}",
    "memory (MB)": lambda each: f"{each.cost.memory / 1e6:,.0f}",
    "images/s": lambda each: f"{'' if each.timed else '~'}{1 / each.seconds:,.3g}",
    "training": lambda each: "-" if each.training_seconds is None else f">= {_duration(each.training_seconds)}",
    "measured": lambda each: (each.recipe.measured or {}).get(DISTANCE, "-"),
    "published FID": lambda each: str((each.recipe.published or {}).get("FID", "-")),
}


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def table_of(advices: Sequence[Advice]) -> str:
    """Write a table for a terminal, a row for each recipe."""
    columns = {name: [cell(each) for each in advices] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def evidence_of(advices: Sequence[Advice]) -> list[str]:
    """Say which measured runs stand behind a table: page, command, date, machine, and what else there is to know."""
    sources = read_facts()[1]
    used = dict.fromkeys(each.recipe.measured["source"] for each in advices if each.recipe.measured)
    lines = [
        f"measured: {source['page']}, `{source['command']}`, {source['date']}, {source['machine']}; {source['said']}"
        for source in (sources[name] for name in used)
    ]
    without = [each.recipe.name for each in advices if not each.recipe.measured]
    if without:
        lines.append(f"no run of this project says how good these are: {', '.join(without)}")
    lines += [f"{each.recipe.name}: {each.recipe.note}" for each in advices if each.recipe.note]
    return lines
