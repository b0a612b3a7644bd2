"""docs/training.md says what our recipes do and what the authors' code does: each row is made anew and compared.

The rows of most recipes take seconds, as their networks are built at full size without data: those are slow tests.
"""

import re

import pytest
from helpers.golden import Case
from helpers.golden_cases import cases_of
from helpers.golden_outputs import NOT_YET, kind_of
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
from training_proof.published import PUBLISHED, Golden, published
from training_proof.recipes import recipes

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
