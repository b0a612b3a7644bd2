"""Checkpoints that earlier code wrote: each loads, and gives the outputs of the code that wrote it.

`old_checkpoints/` holds, of each: `NAME.ckpt`; `NAME.safetensors`, its outputs (`old_checkpoint_outputs.py`); and of
those that `discrete-lit fit` wrote, `NAME.yaml`, the settings that a run resumes them with.
"""

import importlib
import inspect
from pathlib import Path

import lightning  # noqa: F401 (its log handler must not hold the captured stream of the first test)
import pytest
import torch
from helpers.old_checkpoint_outputs import outputs_of, read_outputs

import discrete_lit
from discrete_lit.cli import main
from discrete_lit.core.configuration import current_class_path

FOLDER = Path(__file__).parent / "old_checkpoints"
CHECKPOINTS = sorted(FOLDER.glob("*.ckpt"))
FITTED = [file for file in CHECKPOINTS if file.with_suffix(".yaml").is_file()]
CLASS_PATHS = (FOLDER / "class_paths.txt").read_text().split()


def name_of(file: Path) -> str:
    return file.stem


def resolve(class_path: str) -> object:
    """What a class path of a configuration names today."""
    module, _, name = current_class_path(class_path).rpartition(".")
    return getattr(importlib.import_module(module), name)


def class_paths_in(value: object) -> set[str]:
    """Every class path of this package in nested dictionaries and lists."""
    if isinstance(value, str):
        return {value} if value.startswith("discrete_lit.") else set()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(class_paths_in, items))


def test_there_are_checkpoints() -> None:
    assert len(CHECKPOINTS) >= 50 and len(FITTED) >= 4 and len(CLASS_PATHS) >= 150


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=name_of)
def test_an_old_checkpoint_gives_its_old_outputs(checkpoint: Path) -> None:
    expected, words, samplers = read_outputs(checkpoint)
    found, found_words = outputs_of(discrete_lit.load(checkpoint), samplers)
    assert found_words == words
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            # What is small beside the largest of its tensor has the rounding of sums of large terms.
            scale = float(value.abs().max())
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("checkpoint", FITTED, ids=name_of)
def test_an_old_run_goes_on(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    before = torch.load(checkpoint, weights_only=True)
    step = before["global_step"] + 1
    settings = ("--config", f"{checkpoint.stem}.yaml", "--run_dir", str(tmp_path), "--ckpt_path", checkpoint.name)
    main(["fit", *settings, f"--trainer.max_steps={step}"])
    after = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert after["global_step"] == step
    # Each state was read: the optimizer's moments have seen every step, and each part's state has its old name.
    assert {int(state["step"]) for state in after["optimizer_states"][0]["state"].values()} == {step}
    assert after["callbacks"].keys() >= before["callbacks"].keys()
    assert {key for key in before if key[0].isupper()} <= after.keys()
    assert any(not torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())


@pytest.mark.parametrize("class_path", CLASS_PATHS)
def test_an_old_class_path_names_a_class(class_path: str) -> None:
    found = resolve(class_path)
    assert inspect.isclass(found) or inspect.isfunction(found)
    # A renamed class may have another name, which is then the table's to say.
    assert found.__module__.startswith("discrete_lit.")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=name_of)
def test_the_list_has_every_class_path_of_a_checkpoint(checkpoint: Path) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    written = class_paths_in(contents["hyper_parameters"]) | class_paths_in(contents.get("tokenizer_config", {}))
    assert written <= set(CLASS_PATHS)


def test_modules_of_earlier_versions_say_their_new_names() -> None:
    from discrete_lit.core.random import CounterRandom
    from discrete_lit.diffusion.losses import ScoreEntropy

    with pytest.warns(FutureWarning, match="discrete_lit.processes is now discrete_lit.diffusion and"):
        processes = importlib.reload(importlib.import_module("discrete_lit.processes"))
    assert processes.CounterRandom is CounterRandom
    with pytest.warns(FutureWarning, match="discrete_lit.processes.losses is now discrete_lit.diffusion.losses"):
        losses = importlib.import_module("discrete_lit.processes.losses")
    assert losses.ScoreEntropy is ScoreEntropy
    with pytest.raises(ImportError, match="Nothing"):
        from discrete_lit.processes import Nothing  # noqa: F401  # pyright: ignore
