"""Every file of the package: where it lies, what it is called, how its classes are built and described."""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "discrete_lit"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [file for file in FILES if file.name != "__init__.py"]
TREES = {file: ast.parse(file.read_text()) for file in FILES}
# A docstring says what the thing does or is, in a sentence; these begin a riddle.
RIDDLES = ("Of ", "Those ", "What ", "Whose ", "As ", "That ", "How ", "Where ")
MOST_POSITIONAL = 2
LONGEST_RECORD = 3
# They have the signature of a layer of torch.
LIKE_TORCH = {"CausalConvolution"}


def named(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def repeated(names: list[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def test_no_file_lies_deeper_than_three_levels() -> None:
    assert [named(file) for file in FILES if len(file.relative_to(PACKAGE).parts) > 3] == []


def test_no_two_modules_and_no_two_classes_have_one_name() -> None:
    classes = [node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)]
    assert repeated([file.name for file in MODULES]) == []
    assert repeated(classes) == []


def definitions(file: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    return [node for node in ast.walk(TREES[file]) if isinstance(node, ast.ClassDef | ast.FunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=named)
def test_docstrings_begin_with_what_the_thing_does(file: Path) -> None:
    documented = [TREES[file], *definitions(file)]
    riddles = [
        f"{getattr(node, 'name', 'the module')}: {docstring.splitlines()[0]}"
        for node in documented
        if (docstring := ast.get_docstring(node) or "").startswith(RIDDLES)
    ]
    assert riddles == []


@pytest.mark.parametrize("file", FILES, ids=named)
def test_descriptions_of_attributes_begin_with_what_they_are(file: Path) -> None:
    strings = [
        node.value.value
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert [text for text in strings if text.startswith(("Of ", "Those ", "What ", "Whose ", "As "))] == []


def positional(cls: ast.ClassDef) -> list[str]:
    """Name the arguments that a class takes by position; short records and layers like torch's may have more."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)][1:]
    dataclasses = [item for item in cls.decorator_list if "dataclass" in ast.unparse(item)]
    if not dataclasses or "kw_only=True" in ast.unparse(dataclasses[0]):
        return []
    fields = []
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation) == "KW_ONLY":
                return fields
            if node.value is None or "kw_only=True" not in ast.unparse(node.value):
                fields.append(node.target.id)
    return [] if len(fields) <= LONGEST_RECORD else fields


@pytest.mark.parametrize("file", MODULES, ids=named)
def test_constructors_take_all_but_their_first_two_arguments_by_name(file: Path) -> None:
    classes = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.ClassDef)]
    long = {cls.name: names for cls in classes if len(names := positional(cls)) > MOST_POSITIONAL}
    assert {name: names for name, names in long.items() if name not in LIKE_TORCH} == {}
