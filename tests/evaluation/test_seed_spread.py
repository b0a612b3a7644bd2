"""Mean and spread over runs, and which differences of two rows lie within them, on numbers made by hand."""

from math import inf, sqrt

import pytest
from scipy import stats

from discrete_lit.evaluation.seed_spread import (
    Difference,
    Spread,
    compare_means,
    pairs_within,
    spread_of,
    student_quantile,
)


def test_mean_and_standard_deviation() -> None:
    spread = Spread((33.0, 34.0, 38.0))
    assert spread.mean == 35.0
    assert spread.standard_deviation == pytest.approx(sqrt((4 + 1 + 9) / 2))
    assert spread.to_dict()["values"] == [33.0, 34.0, 38.0]


def test_one_run_has_no_spread() -> None:
    assert Spread((33.0,)).standard_deviation is None
    assert Spread((33.0, inf)).standard_deviation is None
    assert compare_means(Spread((33.0,)), Spread((33.0, 34.0))) is None
    assert spread_of([None, None]) is None
    assert spread_of([None, 2.0]) == Spread((2.0,))


@pytest.mark.parametrize("freedom", [1.0, 1.7, 2.0, 4.0, 30.5, 1e5])
def test_quantile_is_students(freedom: float) -> None:
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "within"),
    [
        ((1.0, 2.0, 3.0), (2.0, 3.0, 4.0), True),
        ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), False),
        ((1.0, 2.0, 3.0), (3.5, 4.5), True),  # of two runs alone
        ((1.0, 2.0, 3.0), (3.0, 3.5, 4.0, 4.5, 5.0), False),
        ((1.0, 1.0), (1.0, 1.0), True),
        ((1.0, 1.0), (1.0 + 1e-9, 1.0 + 1e-9), False),
        ((1.0, 1.0, 1.01), (0.0, 1.0, 2.0), True),
    ],
)
def test_within_the_spread_is_welchs_test(first: tuple[float, ...], second: tuple[float, ...], within: bool) -> None:
    found = compare_means(Spread(first), Spread(second))
    assert found is not None and found.within == within
    assert found.value == pytest.approx(sum(second) / len(second) - sum(first) / len(first))
    if found.margin:
        result = stats.ttest_ind(second, first, equal_var=False)
        assert (result.pvalue > 0.05) == within
        interval = result.confidence_interval(0.95)
        assert interval.low == pytest.approx(found.value - found.margin, rel=1e-4, abs=1e-6)


def test_many_pairs_are_listed_by_figure() -> None:
    near, far = Difference(value=0.5, margin=1.0), Difference(value=2.0, margin=1.0)
    differences = [("a", "b", {"FD": near, "recall": far}), ("a", "c", {"FD": far}), ("b", "c", {"FD": near})]
    assert pairs_within(differences) == [
        "FD: within the spread: a and b; b and c (2 of 3 pairs)",
        "recall: within the spread: none (0 of 1 pairs)",
    ]
