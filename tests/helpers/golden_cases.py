"""The golden cases of the folder that `DISCRETE_LIT_GOLDEN` names, as parameters of tests."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from helpers.golden import cases_in

UNSET = "DISCRETE_LIT_GOLDEN, the folder of the reference outputs, is not set"


def cases() -> list[Any]:
    """Every case of the folder, as parameters of a test; one that is skipped where no folder is named."""
    folder = os.environ.get("DISCRETE_LIT_GOLDEN")
    if not folder:
        return [pytest.param(None, marks=pytest.mark.skip(reason=UNSET))]
    return [pytest.param(case, id=str(case)) for case in cases_in(Path(folder))]


def cases_of(families: Collection[str]) -> list[Any]:
    """The cases of some families, as parameters of a test."""
    return [case for case in cases() if case.values[0] is None or case.values[0].family in families]
