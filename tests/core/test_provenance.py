"""The commit that a result names."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "discrete_lit"
PRINT = "from discrete_lit.core.provenance import git_commit; print(git_commit())"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@here")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit_named_by(packages: Path) -> str:
    """What a copy of the package in a folder of packages says."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT], cwd="/", env={"PYTHONPATH": str(packages)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with one commit, and in it a copy of the package that git does not know."""
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "mine")
    (tmp_path / "packages" / "discrete_lit").mkdir(parents=True)
    for name in ("__init__.py", "core/__init__.py", "core/provenance.py"):
        target = tmp_path / "packages" / "discrete_lit" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(PACKAGE / name, target)
    # What is asked of git needs no torch, which takes seconds to import.
    (tmp_path / "packages" / "torch.py").write_text("device = object\n")
    return tmp_path


def test_a_package_inside_anothers_repository_is_not_of_it(copy: Path) -> None:
    assert commit_named_by(copy / "packages") == "None"


def test_a_source_tree_names_its_commit_and_changes(copy: Path) -> None:
    git(copy, "add", "packages/discrete_lit")
    git(copy, "commit", "-q", "-m", "the package")
    assert commit_named_by(copy / "packages") == git(copy, "rev-parse", "HEAD")
    with (copy / "packages/discrete_lit/core/provenance.py").open("a") as file:
        file.write("# changed\n")
    assert commit_named_by(copy / "packages") == git(copy, "rev-parse", "HEAD") + "-dirty"


def test_a_package_that_pip_installed_from_git_names_its_commit(copy: Path) -> None:
    info = copy / "packages" / "discrete_lit-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: discrete-lit\nVersion: 1.0\n")
    commit = "0123456789" * 4
    (info / "direct_url.json").write_text(
        f'{{"url": "https://host/discrete-lit", "vcs_info": {{"vcs": "git", "commit_id": "{commit}"}}}}'
    )
    assert commit_named_by(copy / "packages") == commit
