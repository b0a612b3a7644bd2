"""Crafted inputs of every kind: each is read rightly, or refused in one message that names it, and runs no code.

The cases are in the package `bad_input`. Those that take little time and memory are read here, in this process; all of
them, each in a process with a limit of both, are a slow test, `make bad-input`.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from bad_input import run
from bad_input.case import CANARY, Case
from helpers.recipe_files import ROOT

CASES = [case for case in run.CASES if case.quick]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_crafted_input(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case.craft(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISCRETE_LIT_READ_TIMEOUT", "2")
    try:
        fault = case.fault_of_result(case.read(tmp_path))
    except ValueError as error:
        fault = case.fault_of_message(str(error))
    assert fault is None, fault
    assert not (tmp_path / CANARY).exists(), "code was executed"


def test_there_are_three_hundred_of_them() -> None:
    names = Counter(case.name for case in run.CASES)
    assert [name for name, times in names.items() if times > 1] == []
    assert len(names) >= 300


@pytest.mark.slow
def test_all_of_them_within_a_minute_and_two_gigabytes(capfd: pytest.CaptureFixture[str]) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run([sys.executable, "-m", "bad_input.run"], env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == 0, capfd.readouterr().out[-5000:]
