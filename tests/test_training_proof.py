"""docs/training.md says what our recipes do and what the authors' code does: each row is made anew and compared.

The rows of most recipes take seconds, as their networks are built at full size without data: those are slow tests.
"""

import re
from math import log
from typing import Any

import pytest
import torch
from helpers.golden import Case
from helpers.golden_cases import cases_of
from helpers.golden_outputs import NOT_YET, kind_of
from torch import Tensor
from training_proof import table
from training_proof.crops import (
    NoOutcomeError,
    adm_random_crop,
    compare,
    dall_e_crop,
    mirrored,
    random_crop,
    random_resized_crop,
)
from training_proof.losses import D3PM, LOSSES, d3pm
from training_proof.published import BY_FORMULA, PUBLISHED, Golden, published
from training_proof.recipes import build, model_of, recipes

from discrete_lit.checkpoints import instantiate
from discrete_lit.core.random import CounterRandom

ROWS = {row.split("]")[0].removeprefix("| ["): row for row in table.PAGE.read_text().splitlines() if row[:3] == "| ["}
QUICK = ("tokenizers/rqvae_imagenet256", "generators/llamagen_b_imagenet256", "generators/maskbit_14bit_imagenet256")
WITHOUT_NETWORKS = {"schedule": table._schedule, "EMA": table._average, "crop": table._crop}
COMMAND = "PYTHONPATH=.:tests python -m training_proof.table"


def written(recipe: str) -> str:
    """The row of the page."""
    return ROWS[recipe]


def written_cells(recipe: str) -> dict[str, str]:
    return dict(zip(table.COLUMNS, written(recipe).strip("| ").split(" | ")[1:], strict=True))


def test_the_page_has_a_row_for_each_recipe() -> None:
    page = table.PAGE.read_text()
    assert page.startswith(table.INTRODUCTION), COMMAND
    assert list(ROWS) == list(recipes()), COMMAND


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=() if recipe in QUICK else pytest.mark.slow) for recipe in recipes()]
)
def test_rows(recipe: str) -> None:
    assert table.row(recipe) == written(recipe), COMMAND


@pytest.mark.slow
@pytest.mark.parametrize("column", WITHOUT_NETWORKS)
def test_columns_that_need_no_network(column: str) -> None:
    for recipe in recipes():
        law = published(recipe)
        if law is not None:
            made, cell = WITHOUT_NETWORKS[column](recipe, law), written_cells(recipe)[column]
            assert cell == made or cell.startswith(f"{made} ("), (recipe, COMMAND)


def test_what_differs_has_a_reason() -> None:
    for recipe in recipes():
        law, cells = published(recipe), written_cells(recipe)
        differing = {column for column, cell in cells.items() if cell.startswith(table.NO)}
        assert differing == (set() if law is None else law.differs.keys()), recipe


def test_no_recipe_without_an_entry() -> None:
    assert [recipe for recipe in recipes() if published(recipe) is None] == []


def test_no_entry_without_a_recipe() -> None:
    used = [published(recipe) for recipe in recipes()]
    assert [pattern for pattern, law in PUBLISHED.items() if not any(law is one for one in used)] == []


GOLDEN = {law.golden.family: law.golden for law in PUBLISHED.values() if isinstance(law.golden, Golden)}


@pytest.mark.parametrize("case", cases_of(GOLDEN))
def test_what_the_cases_compare(case: Case) -> None:
    """The losses and as many gradients as the page says; that they are equal is tested with all other outputs."""
    said = GOLDEN[case.family]
    gradients = [name for name in case.expected if re.match(r"grad[._]", name)]
    without_place = kind_of(case.family).NO_PLACE.get(case.family, {})
    compared = [name for name in gradients if not any(re.fullmatch(pattern, name) for pattern in without_place)]
    assert case.family not in NOT_YET and set(said.losses) <= case.expected.keys()
    assert len(compared) == said.gradients
    assert not [name for name in said.losses for pattern in without_place if re.fullmatch(pattern, name)]


def test_formulas_of_all_recipes_that_name_one() -> None:
    named = {id(published(recipe)) for recipe in recipes() if BY_FORMULA in written_cells(recipe)["loss and gradient"]}
    said = {id(law) for law in PUBLISHED.values() if BY_FORMULA in str(law.golden)}
    tested = [published(recipe) for recipe in (*LOSSES, *D3PM)]
    assert named == said and {law.golden for law in PUBLISHED.values() if id(law) in said} == {
        law.golden for law in tested if law is not None
    }


def recorded_step(generator: Any, data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A training step: the loss, what the backbone read, and its logits with their gradient."""
    seen: dict[str, Tensor] = {}

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.update(read=inputs[0], logits=output)

    hook = generator.backbone.register_forward_hook(record)
    try:
        loss, _ = generator.train().loss(data, labels, CounterRandom(1, torch.arange(len(data))))
    finally:
        hook.remove()
    loss.backward()
    return loss.detach(), seen["read"], seen["logits"]


def assert_equal_losses(ours: Tensor, logits: Tensor, theirs: Any, scale: float = 1.0) -> None:
    leaf = logits.detach().double().requires_grad_()
    loss = scale * theirs(leaf)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(ours.double(), loss.detach(), rtol=1e-5, atol=0.0)
    assert logits.grad is not None and expected.abs().max() > 0
    largest = float(expected.abs().max())
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LOSSES)
def test_losses_by_formula(recipe: str) -> None:
    """Of the recipe's own settings, in a narrow network; its orders and masks are its own draws."""
    generator: Any = build(recipe, tiny=True)
    data = torch.randint(generator.vocab_size, (2, *generator.token_shape), generator=torch.Generator().manual_seed(0))
    loss, read, logits = recorded_step(generator, data, torch.tensor([0, 1]))
    ids = generator.to_sequence(data)
    if getattr(generator, "random", False):  # RAR's orders: what is read is all but the last
        ids = ids.gather(1, generator._training_orders(CounterRandom(1, torch.arange(2))))
        assert torch.equal(read, ids[:, :-1])
    masked = read == generator.backbone.layout.mask_id if read.shape == ids.shape else torch.zeros_like(ids).bool()
    assert_equal_losses(loss, logits, lambda leaf: LOSSES[recipe](leaf, ids, masked))


STEPS, LEVELS = 6, 5


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("recipe", D3PM)
def test_losses_of_d3pm_by_formula(recipe: str, step: int) -> None:
    """Of the recipe's process, schedule and loss, with fewer steps and levels; ours is T ln 2 times theirs."""
    kernels, cross_entropy_weight, masks = D3PM[recipe]
    model = model_of(recipe, tiny=True)["init_args"]
    model["tokenizer"] = {"class_path": "TokenGrid", "init_args": {"vocab_size": LEVELS, "token_shape": [4]}}
    model["backbone"]["init_args"] |= {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
    model["loss"]["init_args"]["steps"] = STEPS
    torch.manual_seed(0)
    generator: Any = instantiate({"class_path": "DiscreteDiffusion", "init_args": model})
    for parameter in generator.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = torch.randint(LEVELS, (8, 4), generator=torch.Generator().manual_seed(step))
    uniforms = torch.full((8, 1), (step + 0.5) / STEPS, dtype=torch.float64)
    level = generator.objective.level(generator.denoiser().schedule, uniforms, 4)
    generator.objective.level = lambda *_: level
    loss, noisy, logits = recorded_step(generator, data, torch.zeros(8, dtype=torch.int64))
    law = kernels(LEVELS + masks, STEPS)
    theirs = lambda leaf: d3pm(  # noqa: E731
        leaf, data, noisy, kernels=law, step=step, cross_entropy_weight=cross_entropy_weight
    )
    assert_equal_losses(loss, logits, theirs, STEPS * log(2))


RANDOM, WHOLE = {"crop": "random", "flip": False}, {"crop": "random", "flip": True}


def test_a_chi_squared_test_that_can_fail() -> None:
    """Each of these laws is near ours, and is another."""
    assert compare(RANDOM, random_crop()).chance > 0.01
    for data, law in (
        (WHOLE, random_crop()),  # a mirror image is no outcome
        ({**RANDOM, "minimum_crop": 0.8}, random_crop()),
        (RANDOM, random_crop(1.125)),
        (
            {**RANDOM, "crop": "random_resized", "crop_area": [0.7, 1.0], "crop_aspect": [1.0, 1.0]},
            random_resized_crop(0.8),
        ),
    ):
        with pytest.raises(NoOutcomeError):
            compare(data, law, ((24, 12), (22, 20)))
    assert compare(RANDOM, mirrored(random_crop())).chance < 1e-6
    assert compare(RANDOM, adm_random_crop(0.8)).chance < 1e-6
    assert compare({**RANDOM, "minimum_crop": 0.8}, adm_random_crop(0.8)).chance > 0.01
    assert compare({**RANDOM, "crop": "dall_e"}, dall_e_crop).chance > 0.01
    with pytest.raises(NoOutcomeError):
        compare(RANDOM, dall_e_crop)
