"""The release: one version everywhere, and a wheel that works where there is no checkout.

The wheel is built from a copy of the tree and installed into a fresh environment. PyTorch and the other dependencies
are not downloaded again: the fresh environment has links to those of this one, and to nothing else of it.
"""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import yaml
from helpers.recipe_files import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_docs import tables
from wheels.fresh import EXTRAS, PYTHONS, build_wheel, called, commands_without_torch, first_steps, interpreter
from wheels.run import EVERY_MODULE

from discrete_lit import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "discrete_lit.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert latest and latest[1] in (__version__, "Unreleased")
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed() -> None:
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "discrete_lit").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"discrete_lit.lightning_configs"}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(expected)


def test_the_metadata_name_the_versions_of_python() -> None:
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    named = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if ":: Python :: 3." in line]
    assert tuple(named) == PYTHONS


def test_the_page_of_installation_has_every_extra() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {extra for extra, _ in tables(ROOT / "docs" / "installation.md", ["Extra", "For"])} == {
        f"`{e}`" for e in extras
    }


@pytest.mark.parametrize("version", PYTHONS)
def test_every_file_is_of_the_syntax(version: str) -> None:
    """Compile by an interpreter of the version where there is one: the syntax alone, nothing is imported."""
    found = interpreter(version)
    if not found:
        pytest.skip(f"no Python {version} on this machine")
    script = (
        "import sys, pathlib\n"
        f"assert sys.version_info[:2] == {tuple(map(int, version.split('.')))}, sys.version\n"
        "for file in pathlib.Path('discrete_lit').rglob('*.py'): compile(file.read_bytes(), str(file), 'exec')"
    )
    done = subprocess.run([found, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_oldest_version_can_parse_every_file() -> None:
    for file in (ROOT / "discrete_lit").rglob("*.py"):
        ast.parse(file.read_text(), filename=str(file), feature_version=(3, 11))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "discrete_lit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {
        f"discrete_lit/{path.relative_to(ROOT).as_posix()}"
        for pattern in ("*.yaml", "*.sbatch", "*.py")
        for path in (ROOT / "lightning_configs").rglob(pattern)
    }
    assert names == package | recipes
    assert fields["Version"] == __version__ and fields["Requires-Python"] == f">={PYTHONS[0]}"
    assert fields["License-Expression"] == "Apache-2.0"
    assert set(fields.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])


def required() -> set[str]:
    """The distributions that the wheel's dependencies bring, themselves and by theirs, without any extra of ours."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    while waiting:
        asked = waiting.pop()
        key = canonicalize_name(asked.name), frozenset(asked.extras)
        if key not in found:
            found.add(key)
            try:
                lines = map(Requirement, requires(asked.name) or [])
            except PackageNotFoundError:  # of another system
                continue
            chosen = ("", *asked.extras)
            waiting += [r for r in lines if not r.marker or any(r.marker.evaluate({"extra": e}) for e in chosen)]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, which sees its dependencies and no other package; its `bin`."""
    folder, seen = tmp_path_factory.mktemp("fresh"), tmp_path_factory.mktemp("dependencies")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    names = required()
    for installed in distributions():
        if canonicalize_name(installed.name) in names:
            for top in {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (seen / top).is_symlink():
                    (seen / top).symlink_to(Path(str(installed.locate_file(top))))
    (packages / "dependencies.pth").write_text(f"{seen}\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (packages / "discrete_lit").is_dir()
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_runs_without_a_checkout(fresh: Path, tmp_path: Path) -> None:
    program = str(fresh / "discrete-lit")
    assert called(program, "--version", folder=tmp_path).stdout == f"discrete-lit {__version__}\n"
    helped = called(program, "--help", folder=tmp_path)
    assert helped.returncode == 0 and helped.stdout.startswith("usage: discrete-lit COMMAND")

    done = called(program, "fit", "--config", "quickstart/masked.yaml", "--print_config", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    assert settings["model"]["class_path"] == "discrete_lit.generators.Masked"
    assert settings["trainer"]["max_steps"] == 800
    found = re.search(r"^recipe quickstart/masked.yaml: (.*)$", done.stderr, flags=re.MULTILINE)
    assert found and Path(found[1]).is_relative_to(fresh.parent) and "discrete_lit/lightning_configs" in found[1]

    layers = ("data/imagenet256_tokens.yaml", "generators/maskgit_imagenet256.yaml", "trainer/ddp.yaml")
    files = [word for layer in layers for word in ("--config", f"lightning_configs/{layer}")]
    done = called(program, "fit", *files, "--run_dir", "runs/a", "--print_config", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["trainer"]["strategy"]

    done = called(program, "fit", "--config", "quickstart/maskd.yaml", folder=tmp_path)
    assert done.returncode == 2 and "did you mean quickstart/masked.yaml?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_module_is_imported_without_any_extra(fresh: Path, tmp_path: Path) -> None:
    absent = "".join(
        f"assert importlib.util.find_spec({name!r}) is None\n" for name in ("diffusers", "tokenizers", "pytest")
    )
    done = called(str(fresh / "python"), "-c", EVERY_MODULE + absent, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_user_trains_and_draws(fresh: Path, tmp_path: Path) -> None:
    first_steps(fresh, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_installs_on_every_python_at_hand(version: str, wheel: Path, tmp_path: Path) -> None:
    """Without its dependencies: `make wheels` installs them too, and trains."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    environment = tmp_path / "environment"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands_without_torch(environment / "bin", tmp_path)
    asked = (
        "import importlib.resources as r, importlib.metadata as m\n"
        "assert (r.files('discrete_lit') / 'py.typed').is_file()\n"
        "assert (r.files('discrete_lit') / 'lightning_configs/quickstart/masked.yaml').is_file()\n"
        "print(m.version('discrete-lit'))"
    )
    assert called(str(environment / "bin" / "python"), "-c", asked, folder=tmp_path).stdout == f"{__version__}\n"


def test_the_extras_that_are_tried() -> None:
    assert {*EXTRAS, "dev"} == set(PROJECT["project"]["optional-dependencies"])
