import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings

import discrete_lit
from discrete_lit.checkpoints import instantiate, load, read_checkpoint, save
from discrete_lit.generators import Masked
from discrete_lit.tokenizers import FSQ, from_checkpoint


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    run("fit", "--config", write_settings(folder / "settings.yaml", TOKENIZER), "--run_dir", folder)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def generator_file(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a generator whose tokenizer's file is no longer there."""
    folder = tmp_path_factory.mktemp("generator")
    tokenizer = folder / "tokenizer.ckpt"
    tokenizer.write_bytes(tokenizer_file.read_bytes())
    settings = generator_settings(tokenizer)
    run("fit", "--config", write_settings(folder / "settings.yaml", settings), "--run_dir", folder)
    tokenizer.unlink()
    return folder / "checkpoints" / "last.ckpt"


def rewritten(file: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint after `change(contents)`."""
    contents = torch.load(file, weights_only=True)
    change(contents)
    torch.save(contents, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_a_fitted_tokenizer_loads_from_its_file_alone(tokenizer_file: Path) -> None:
    tokenizer = discrete_lit.load(tokenizer_file)
    assert isinstance(tokenizer, FSQ)
    assert not tokenizer.training
    saved = torch.load(tokenizer_file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in tokenizer.state_dict().items())
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_a_fitted_generator_loads_without_its_tokenizer_file(generator_file: Path, tokenizer_file: Path) -> None:
    generator = load(generator_file)
    assert isinstance(generator, Masked)
    assert generator.tokenizer.fingerprint() == from_checkpoint(str(tokenizer_file)).fingerprint()
    assert not any(parameter.requires_grad for parameter in generator.tokenizer.parameters())
    assert generator.sample(torch.tensor([0, 1])).shape == (2, 4, 4)


def test_what_was_loaded_can_be_saved_and_loaded_again(generator_file: Path) -> None:
    generator = load(generator_file)
    again = instantiate(dict(generator.hparams))
    again.load_state_dict(generator.state_dict())
    labels = torch.tensor([0, 1])
    assert isinstance(again, Masked)
    assert torch.equal(again.eval().sample(labels), generator.sample(labels))


def test_a_missing_file() -> None:
    with pytest.raises(ValueError, match=r"no checkpoint at 'nowhere\.ckpt'"):
        load("nowhere.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file(share: float, tokenizer_file: Path, tmp_path: Path) -> None:
    whole = tokenizer_file.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut\.ckpt' is not a readable checkpoint"):
        load(tmp_path / "cut.ckpt")


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_refused_and_does_not_run(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write({"state_dict": {}, "trap": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load(tmp_path / "trap.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds no 'state_dict'"):
        load(tmp_path / "weights.pt")


def test_a_generator_is_no_tokenizer(generator_file: Path) -> None:
    with pytest.raises(ValueError, match="holds a Masked, which is not a Tokenizer"):
        from_checkpoint(str(generator_file))


def test_another_fingerprint(tokenizer_file: Path) -> None:
    with pytest.raises(ValueError, match="expected sha256=0000"):
        from_checkpoint(str(tokenizer_file), sha256="0000")


def test_missing_unexpected_and_reshaped_weights(tokenizer_file: Path, tmp_path: Path) -> None:
    def change(contents: dict[str, Any]) -> None:
        weights = contents["state_dict"]
        del weights["network.encoder.conv_in.bias"]
        weights["network.extra"] = torch.zeros(1)
        weights["network.encoder.conv_in.weight"] = torch.zeros(2, 3, 3, 3)

    with pytest.raises(ValueError, match="do not fit this FSQ") as refused:
        load(rewritten(tokenizer_file, tmp_path, change))
    assert "network.encoder.conv_in.bias is missing" in str(refused.value)
    assert "network.extra is unexpected" in str(refused.value)
    assert "network.encoder.conv_in.weight has shape (2, 3, 3, 3) instead of (4, 3, 3, 3)" in str(refused.value)


def test_an_unknown_class_and_a_wrong_argument(tokenizer_file: Path, tmp_path: Path) -> None:
    def rename(contents: dict[str, Any]) -> None:
        contents["hyper_parameters"]["class_path"] = "discrete_lit.tokenizers.Gone"

    def extend(contents: dict[str, Any]) -> None:
        contents["hyper_parameters"]["init_args"]["level"] = 3

    with pytest.raises(ValueError, match=r"discrete_lit\.tokenizers\.Gone"):
        load(rewritten(tokenizer_file, tmp_path, rename))
    with pytest.raises(ValueError, match="level"):
        load(rewritten(tokenizer_file, tmp_path, extend))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("optimizer", {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1, "of_tomorrow": True}}, "of_tomorrow"),
        ("optimizer", {"class_path": "my_optimizers.Lion", "init_args": {"lr": 0.1}}, "my_optimizers"),
        ("weight_decay_rule", "of_tomorrow", "weight_decay_rule"),
    ],
)
def test_what_only_training_reads_keeps_no_checkpoint_from_being_read(
    name: str, value: Any, said: str, generator_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = rewritten(
        generator_file, tmp_path, lambda contents: contents["hyper_parameters"]["init_args"].update({name: value})
    )
    generator = load(file)
    assert torch.equal(generator.sample(torch.tensor([0, 1])), load(generator_file).sample(torch.tensor([0, 1])))
    assert generator.optimizer is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said in warning and "built without what only training reads" in warning


def test_what_only_training_reads_may_not_be_anything(generator_file: Path, tmp_path: Path) -> None:
    optimizer = {"class_path": "os.system", "init_args": {"command": "true"}}
    file = rewritten(
        generator_file, tmp_path, lambda held: held["hyper_parameters"]["init_args"].update({"optimizer": optimizer})
    )
    with pytest.raises(ValueError, match="may not build"):
        load(file)


def test_a_module_of_another_kind(tokenizer_file: Path, tmp_path: Path) -> None:
    def change(contents: dict[str, Any]) -> None:
        contents["hyper_parameters"] = {
            "class_path": "discrete_lit.evaluation.classifier.ImageClassifier",
            "init_args": {"num_classes": 2},
        }

    with pytest.raises(ValueError, match="not a Tokenizer, a ContinuousTokenizer or a Generator"):
        load(rewritten(tokenizer_file, tmp_path, change))


def test_a_module_that_was_not_built_from_a_configuration(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not say how to build its module"):
        load(rewritten(tokenizer_file, tmp_path, lambda contents: contents.pop("hyper_parameters")))


def test_reading_leaves_nothing_open_that_a_later_save_would_change(tokenizer_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(tokenizer_file.read_bytes())
    tokenizer = load(copy)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_the_configuration_is_plain_data_with_every_default(tokenizer_file: Path) -> None:
    config = read_checkpoint(tokenizer_file)["hyper_parameters"]
    assert config["class_path"] == "discrete_lit.tokenizers.FSQ"
    assert config["init_args"]["levels"] == [4, 3]
    assert config["init_args"]["reconstruction_loss"] == "l2"
    assert config["init_args"]["optimizer"]["init_args"]["betas"] == [0.9, 0.999]


def test_saving_without_a_trainer(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = instantiate(TOKENIZER["model"])
    file = tmp_path / "new folder" / "tokenizer.ckpt"
    save(tokenizer, file)
    again = load(file)
    assert again.hparams == tokenizer.hparams and list(file.parent.iterdir()) == [file]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())
    with pytest.raises(ValueError, match="does not say how to build its module"):
        save(make_tokenizer(), tmp_path / "direct.ckpt")
    assert not list(tmp_path.glob("direct*"))
