"""Published files: what is read, what is refused, and that nothing in them is executed."""

import argparse
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from discrete_lit.pretrained.reading import Averages, State, part_of, read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(zipped: bool, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_state(tmp_path / "w.pt"))


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"))


def test_wrappers_in_the_order_of_preference(tmp_path: Path) -> None:
    torch.save({"model": {"b": torch.zeros(1)}, "ema": STATE, "steps": 3}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt", ("ema", "model")))
    assert set(read_state(tmp_path / "w.pt", ("model", "ema"))) == {"b"}
    # Without a preference of the family, the averaged weights.
    assert same(read_state(tmp_path / "w.pt"))
    torch.save({"encoder": [1], "decoder": {"a": 2}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"directly nor under weights, .*: it holds encoder, decoder"):
        read_state(tmp_path / "w.pt", ("weights",))


def test_keys_of_no_known_trainer_are_prefixes(tmp_path: Path) -> None:
    torch.save({"trainer": {"vae": STATE, "optimizer": {"lr": 0.1}}, "epoch": 3}, tmp_path / "w.pt")
    state = read_state(tmp_path / "w.pt")
    assert state.keys() == {"trainer.vae.a.weight", "trainer.vae.a.bias"}
    found = part_of(state, ["a.weight", "a.bias"])
    assert found is not None and same(found)


def test_a_mapping_within_a_mapping(tmp_path: Path) -> None:
    torch.save({"trainer": {"generator": STATE, "optimizer": {}}, "epoch": 3}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt", ("trainer.generator",)))


def test_nests_within_nests(tmp_path: Path) -> None:
    torch.save({"state_dict": {"model": {"module": STATE}, "step": 3}}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"))


def test_what_wrapping_a_module_adds_to_names(tmp_path: Path) -> None:
    """Of all of it, or of a part."""
    save_file({f"module._orig_mod.module.{name}": value for name, value in STATE.items()}, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"))
    names = {"a._orig_mod.weight": "a.weight", "a._fsdp_wrapped_module._checkpoint_wrapped_module.bias": "a.bias"}
    save_file({wrapped: STATE[name] for wrapped, name in names.items()}, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "w.safetensors"))
    save_file({"module.a": torch.zeros(1), "a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has 'a' twice, once inside of a wrapper"):
        read_state(tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["first_stage_model.", "ema.", "model.", "any.other.name."])
def test_a_prefix_of_all_names(prefix: str) -> None:
    found = part_of(State({prefix + name: value for name, value in STATE.items()}, "w.pt"), ["a.weight", "a.bias"])
    assert found is not None and same(found)


def test_a_part_of_a_file() -> None:
    whole = State({f"first.{name}": value for name, value in STATE.items()} | {"other.b": torch.zeros(1)}, "w.pt")
    with pytest.warns(UserWarning, match=r"of 'w\.pt' the part first\.\* is read; the others are not: other"):
        found = part_of(whole, ["a.weight", "a.bias"])
    assert found is not None and same(found)
    assert part_of(whole, ["a.weight", "c"]) is None
    twice = State({**whole, **{f"second.{name}": value for name, value in STATE.items()}}, "w.pt")
    with pytest.raises(ValueError, match=r"in several parts, first\., second\.: save one alone"):
        part_of(twice, ["a.weight"])
    averaged = State({**whole, **{f"ema_model.{name}": value + 1 for name, value in STATE.items()}}, "w.pt")
    with pytest.warns(UserWarning, match="the part ema_model"):
        found = part_of(averaged, ["a.weight"])
    assert found is not None and torch.equal(found["a.weight"], STATE["a.weight"] + 1)


AVERAGES = Averages("ema.shadow", ("*.steps",))


def test_averages_without_names(tmp_path: Path) -> None:
    """They take the names of the parameters in their order; buffers have none."""
    own = {"a": torch.zeros(2), "b.steps": torch.ones(2), "c": torch.zeros(2)}
    averaged = [torch.full((2,), 2.0), torch.full((2,), 3.0)]
    torch.save({"model": own, "ema": {"decay": 0.99, "shadow": averaged}}, tmp_path / "w.pt")
    found = read_state(tmp_path / "w.pt", ("model",), AVERAGES)
    assert {name: value.tolist() for name, value in found.items()} == {"a": [2, 2], "b.steps": [1, 1], "c": [3, 3]}
    assert not read_state(tmp_path / "w.pt", ("model",))["c"].any()
    torch.save({"model": own}, tmp_path / "w.pt")
    assert not read_state(tmp_path / "w.pt", ("model",), AVERAGES)["c"].any()


def test_averages_of_other_parameters(tmp_path: Path) -> None:
    own = {"a": torch.zeros(2), "b.steps": torch.ones(2), "c": torch.zeros(3)}
    torch.save({"model": own, "ema": {"shadow": [torch.ones(2), torch.ones(2)]}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 averaged weights at ema.shadow for 2 parameters; .* differs is at 'c'"):
        read_state(tmp_path / "w.pt", ("model",), AVERAGES)
    torch.save({"model": own, "ema": {"shadow": [torch.ones(2)]}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"1 averaged weights at ema.shadow for 2 parameters$"):
        read_state(tmp_path / "w.pt", ("model",), AVERAGES)


# Modules of objects beside the weights.
GONE = ("pytorch_lightning", "omegaconf", "transformers")


@pytest.fixture
def trainers_objects(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Lightning checkpoints of 2020 to 2022 hold beside the weights, of modules that are gone when it is read."""
    made: dict[str, Any] = {}
    for module_name, class_name, base in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
        ("omegaconf.dictconfig", "DictConfig", object),
        ("transformers.models.gpt2.tokenization_gpt2_fast", "GPT2TokenizerFast", object),
    ):
        parts = module_name.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        kind = type(class_name, (base,), {"__module__": module_name})
        setattr(sys.modules[module_name], class_name, kind)
        made[class_name] = kind
    config = made["DictConfig"]()
    config.content = {"lr": 1.0}
    return {
        "callbacks": {made["ModelCheckpoint"]: {"best_model_score": torch.ones(1), "best_model_path": "x.ckpt"}},
        "hyper_parameters": made["AttributeDict"](config=config, folder=Path("runs"), text=made["GPT2TokenizerFast"]()),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_left_is_not_read(
    zipped: bool, trainers_objects: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numpy = pytest.importorskip("numpy")
    extra = {"best": numpy.float64(0.5), "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    extra |= {"args": argparse.Namespace(lr=1.0)}
    content = {"state_dict": STATE, **trainers_objects, **extra}
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith(GONE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])  # nothing could be imported
    assert same(read_state(tmp_path / "last.ckpt", ("state_dict",)))
    assert not [name for name in sys.modules if name.startswith(GONE)]


class Trap:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> Any:
        return self.function, ("executed",)


def write_pickle(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
@pytest.mark.parametrize("function", [Path.touch, open, print, torch.load])
def test_pickled_code_is_refused_and_does_not_run(
    function: Any, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("executed").write_text("")
    write({"state_dict": STATE, "trap": Trap(function)}, tmp_path / "trap.ckpt")
    Path("executed").unlink()
    # torch's own names are for torch to judge.
    known = write is torch.save or function is not torch.load
    message = "holds pickled code" if known else "cannot be read: it is truncated, or holds more than"
    with pytest.raises(ValueError, match=message):
        read_state("trap.ckpt", ("state_dict",))
    assert not Path("executed").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_truncated_file(name: str, share: float, tmp_path: Path) -> None:
    state = {"a": torch.zeros(3000)}
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=rf"{name}' is truncated"):
        read_state(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pt' cannot be read"):
        read_state(tmp_path / "w.pt")


def test_a_missing_file() -> None:
    with pytest.raises(ValueError, match=r"no weights at 'nowhere\.pt'"):
        read_state("nowhere.pt")


@pytest.mark.parametrize(("content", "message"), [([1, 2], "holds a list"), ({}, "it is empty")])
def test_a_file_without_tensors(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "w.pt")
