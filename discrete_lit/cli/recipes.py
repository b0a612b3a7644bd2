"""Find the recipes that come with the package, so that a configuration can be named without a checkout.

A checkout has them in its `lightning_configs`; a wheel holds that folder inside the package.
"""

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path

FOLDER = "lightning_configs"
_PACKAGE = Path(__file__).parents[1]


def recipes_folder() -> Path | None:
    """Return the folder of the recipes: inside an installed package, beside the package in a checkout, else None."""
    return next((place for place in (_PACKAGE / FOLDER, _PACKAGE.parent / FOLDER) if place.is_dir()), None)


def recipe_names() -> list[str]:
    """List the recipes by name, such as `quickstart/masked.yaml`, in alphabetical order."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")) if folder else []


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe, None where there is none of this name.

    Args:
        name: a path below the folder of recipes, such as `quickstart/masked.yaml`; `lightning_configs/` in front of it,
            as the recipes' own comments write it, may stay.
    """
    folder, parts = recipes_folder(), Path(name).parts
    if folder is None or os.path.isabs(name) or ".." in parts or "\0" in name:
        return None
    found = folder.joinpath(*parts[1:] if parts[:1] == (FOLDER,) else parts)
    return found if found.is_file() else None


def locate_configuration(name: str) -> str:
    """Return a configuration's path: a file of the working folder as it is named, else the recipe of that name.

    The path of a recipe is also written to the standard error of the first process. A name that is neither, and a
    configuration that is given in place of a name, are returned as they are.
    """
    if name.lstrip().startswith("{") or "\0" in name or os.path.lexists(name):
        return name
    found = find_recipe(name)
    if found is None:
        return name
    if all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "SLURM_PROCID")):
        print(f"recipe {name}: {found}", file=sys.stderr)
    return str(found)


def where_recipes_are(name: str) -> str:
    """Say where a name that is no file was looked for, and which recipe is nearest to it, as the end of a message."""
    folder = recipes_folder()
    if folder is None or os.path.isabs(name):
        return ""
    nearest = get_close_matches(name.removeprefix(f"{FOLDER}/"), recipe_names(), n=1)
    guess = f"; did you mean {nearest[0]}?" if nearest else ""
    return f", neither here nor among the recipes of {folder}{guess}"


def first_sentence(recipe: Path) -> str:
    """Return the sentence that follows the command in the comment that a recipe opens with."""
    comment = re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8"))
    lines = comment[0].splitlines() if comment else []
    while lines and lines[0].endswith("\\"):  # the command
        del lines[0]
    said = " ".join(line.removeprefix("#").strip() for line in lines[1:])
    return re.split(r"(?<=\.)\s+(?=[A-Z0-9`])", said)[0].removesuffix(".")


def recipes(*, name: str | None = None) -> None:
    """List the recipes that come with the package, or print one, to change it: `recipes NAME > mine.yaml`.

    Args:
        name: the one to print, such as `quickstart/masked.yaml`, or the job script `slurm/train.sbatch`.

    Raises:
        ValueError: there is none of this name.
    """
    folder = recipes_folder()
    if folder is None:
        raise ValueError(f"no {FOLDER} lies in or beside {_PACKAGE}, so there are no recipes")
    if name is None:
        width = max(map(len, recipe_names()))
        print("\n".join(f"{each:<{width}}  {first_sentence(folder / each)}" for each in recipe_names()))
        return
    found = find_recipe(name)
    if found is None:
        raise ValueError(f"{name} is no recipe{where_recipes_are(name)}")
    print(found.read_text(encoding="utf-8"), end="")
