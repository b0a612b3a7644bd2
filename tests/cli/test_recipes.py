"""Recipes by name: a file of the working folder first, then one that came with the package."""

from pathlib import Path

import pytest
import yaml

from discrete_lit.cli import recipes
from discrete_lit.cli.commands import main
from discrete_lit.cli.config import files_first

NAME = "quickstart/masked.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without recipes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [NAME, f"lightning_configs/{NAME}"])
@pytest.mark.parametrize("words", [["--config", "{}"], ["--config={}"], ["-c", "{}"], ["-c{}"]])
def test_a_recipe_is_found_by_its_name(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = recipes.recipes_folder()
    assert found is not None
    arguments = files_first([*(word.format(name) for word in words), "--run_dir", "runs/a"])
    assert arguments == [f"--config={found / NAME}", "--run_dir", "runs/a"]
    assert capsys.readouterr().err == f"recipe {name}: {found / NAME}\n"


def test_a_file_of_the_working_folder_wins(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "quickstart").mkdir()
    (elsewhere / NAME).write_text("run_dir: mine\n")
    assert files_first(["--config", NAME]) == ["--config", NAME]
    assert capsys.readouterr().err == ""


def test_the_folder_inside_the_package_wins(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a wheel has it; a folder of the same name beside the package may be another project's."""
    for place in ("discrete_lit/lightning_configs", "lightning_configs"):
        (elsewhere / place / "quickstart").mkdir(parents=True)
        (elsewhere / place / NAME).write_text(f"run_dir: {place}\n")
    monkeypatch.setattr(recipes, "_PACKAGE", elsewhere / "discrete_lit")
    found = recipes.find_recipe(NAME)
    assert found is not None and yaml.safe_load(found.read_text()) == {"run_dir": "discrete_lit/lightning_configs"}
    assert recipes.recipe_names() == [NAME]


@pytest.mark.parametrize("name", ["../pyproject.toml", "quickstart", "/quickstart/masked.yaml", "", "quickstart/\0"])
def test_what_is_no_recipe(name: str) -> None:
    assert recipes.find_recipe(name) is None


def test_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstart/maskd.yaml"])
    message = capsys.readouterr().err
    assert "--config quickstart/maskd.yaml: No such file or directory, neither here nor among the recipes" in message
    assert f"did you mean {NAME}?" in message


def test_the_other_processes_of_a_launch_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    files_first(["--config", NAME])
    assert capsys.readouterr().err == ""


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.recipe_names() and len(lines) > 100
    (masked,) = (line for line in lines if line.startswith(NAME))
    assert masked.split(maxsplit=1)[1].startswith(
        "MaskGIT (Chang et al., 2022, https://arxiv.org/abs/2202.04200) on the"
    )
    assert all(len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("name", [NAME, "slurm/train.sbatch"])
def test_a_recipe_is_printed_as_it_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", name])
    found = recipes.find_recipe(name)
    assert found is not None and capsys.readouterr().out == found.read_text()


def test_what_is_no_recipe_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes", "quickstart/maskd.yaml"])
    assert "quickstart/maskd.yaml is no recipe, neither here nor among" in capsys.readouterr().err
