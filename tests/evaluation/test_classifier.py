"""The classifier of samples: it learns, and its checkpoint alone brings it back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stored_images import save_npz

from discrete_lit.checkpoints import instantiate, record_config
from discrete_lit.cli.evaluate import evaluate
from discrete_lit.evaluation.classifier import ImageClassifier, load_classifier

CONFIG = {
    "class_path": "discrete_lit.evaluation.classifier.ImageClassifier",
    "init_args": {
        "num_classes": 3,
        "channels": [4, 8],
        "dropout": 0.0,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
    },
}


def colours(labels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 `(N, 8, 8, 3)`: noise, and the channel of the label bright."""
    images = np.random.default_rng(seed).integers(0, 100, (len(labels), 8, 8, 3), dtype=np.uint8)
    images[np.arange(len(labels)), :, :, labels] += 120
    return images


def as_floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def trained() -> ImageClassifier:
    torch.manual_seed(0)
    module = instantiate(CONFIG)
    assert isinstance(module, ImageClassifier)
    module.log = lambda *_, **__: None
    optimizer = module.configure_optimizers()
    labels = np.arange(60) % 3
    batch = {"image": as_floats(colours(labels, 0)), "label": torch.from_numpy(labels)}
    for step in range(30):
        optimizer.zero_grad()
        module.training_step(batch, step).backward()
        optimizer.step()
    return module.eval()


@pytest.fixture
def checkpoint(trained, tmp_path) -> str:
    path = tmp_path / "classifier.ckpt"
    torch.save({"state_dict": trained.state_dict(), "hyper_parameters": dict(trained.hparams)}, path)
    return str(path)


def test_learns_the_class(trained):
    labels = np.arange(30) % 3
    logits = trained(as_floats(colours(labels, 1)))
    assert logits.shape == (30, 3) and logits.dtype == torch.float32
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9


def test_validation_logs_accuracy_and_loss(trained):
    logged = {}
    trained.log_dict = lambda terms, **_: logged.update(terms)
    labels = np.arange(30) % 3
    wrong = labels.copy()
    wrong[:6] = (wrong[:6] + 1) % 3
    trained.validation_step({"image": as_floats(colours(labels, 1)), "label": torch.from_numpy(wrong)}, 0)
    assert float(logged["validation/accuracy"]) == pytest.approx(0.8, abs=0.1) and logged["validation/loss"] > 0


def test_checkpoint_alone_brings_it_back(trained, checkpoint):
    images = as_floats(colours(np.arange(5) % 3, 2))
    loaded = load_classifier(checkpoint)
    assert torch.equal(loaded(images), trained(images)) and not loaded.training


def test_other_checkpoints_are_refused(tmp_path, make_tokenizer, checkpoint):
    tokenizer = make_tokenizer()
    network = {"class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder", "init_args": {"channels": 8}}
    config = {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"levels": [4, 3], "network": network}}
    record_config(tokenizer, config)
    other = {"state_dict": tokenizer.state_dict(), "hyper_parameters": config}
    torch.save(other, tmp_path / "tokenizer.ckpt")
    with pytest.raises(ValueError, match=r"tokenizer\.ckpt' holds no usable ImageClassifier: .*FSQ does not corr"):
        load_classifier(tmp_path / "tokenizer.ckpt")
    wider = json.loads(json.dumps(CONFIG))
    wider["init_args"]["channels"] = [4, 16]
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "hyper_parameters": wider}, tmp_path / "wider.ckpt")
    with pytest.raises(ValueError, match="do not fit"):
        load_classifier(tmp_path / "wider.ckpt")


def test_label_accuracy_counts_the_intended_class(checkpoint, tmp_path):
    labels = np.arange(30) % 3
    shown = labels.copy()
    shown[labels == 2] = 0  # the generator never draws class 2
    reference = save_npz(tmp_path / "reference.npz", colours(labels, 3), labels)
    samples = save_npz(tmp_path / "samples.npz", colours(shown, 4), labels)
    from test_evaluate import Means

    arguments = {"reference": reference, "output": str(tmp_path / "report"), "image_size": 8, "extractor": Means()}
    report = evaluate(**arguments, num_images=30, samples={"mine": samples}, held_out=reference, classifier=checkpoint)
    floor, mine = report["rows"]
    assert floor["label_accuracy"] > 0.9 and floor["FD-Means"] == 0.0
    first, second, third = mine["label_accuracy_by_class"]
    assert min(first, second) > 0.8 and third == 0.0
    assert mine["label_accuracy"] == pytest.approx((first + second + third) / 3)
    assert "label accuracy" in (Path(arguments["output"]) / "report.md").read_text()


def test_classifier_of_another_number_of_classes_is_refused(checkpoint, tmp_path):
    labels = np.arange(8) % 4
    reference = save_npz(tmp_path / "reference.npz", colours(labels % 3, 3), labels)
    with pytest.raises(ValueError, match="knows 3 classes, the images have 4"):
        evaluate(
            reference, str(tmp_path), image_size=8, num_images=8, samples={"mine": reference}, classifier=checkpoint
        )


def test_a_classifier_of_grey_images() -> None:
    module = ImageClassifier(3, (4, 8), image_channels=1).eval()
    assert module(torch.rand(2, 1, 8, 12)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"have 3 channels .* this ImageClassifier was made for 1"):
        module(torch.rand(2, 3, 8, 12))
    assert module(torch.rand(2, 1, 3, 4)).isfinite().all()
    with pytest.raises(ValueError, match="halves images too often for 2x12 pixels: give it fewer channels"):
        module(torch.rand(2, 1, 2, 12))


def test_any_network_of_timm() -> None:
    torch.manual_seed(0)
    config = {"class_path": CONFIG["class_path"], "init_args": {"num_classes": 3, "network": "test_resnet"}}
    module = instantiate(config).eval()
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    grey = ImageClassifier(4, network="test_resnet", image_channels=1).eval()
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match="network='hf-hub:somebody/something' is not a network of timm"):
        ImageClassifier(3, network="hf-hub:somebody/something")
    with pytest.raises(ValueError, match=r"channels=\(4, 8\) are those of the plain network"):
        ImageClassifier(3, (4, 8), network="test_resnet")


def test_label_accuracy_by_two_classifiers(checkpoint, trained, tmp_path) -> None:
    """The second knows nothing of class 2: samples that please the first need not please it."""
    blind = json.loads(json.dumps(CONFIG))
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    state["network.10.bias"][2] = -100.0
    torch.save({"state_dict": state, "hyper_parameters": blind}, tmp_path / "blind.ckpt")
    labels = np.arange(30) % 3
    reference = save_npz(tmp_path / "reference.npz", colours(labels, 3), labels)
    samples = [save_npz(tmp_path / f"{seed}" / "s.npz", colours(labels, seed), labels) for seed in (4, 5)]
    from test_evaluate import Means

    arguments = {"image_size": 8, "num_images": 30, "extractor": Means(), "held_out": reference}
    classifiers = {"first": checkpoint, "blind": str(tmp_path / "blind.ckpt")}
    output = tmp_path / "report"
    report = evaluate(reference, str(output), samples={"mine": samples}, classifier=classifiers, **arguments)
    floor, one, two = report["rows"]
    for row in (floor, one, two):
        assert row["label_accuracy"]["first"] > 0.9 > 0.7 > row["label_accuracy"]["blind"]
        assert row["label_accuracy_by_class"]["blind"][2] == 0.0
    assert report["classifier"] == classifiers
    values = report["spread"]["mine"]["label accuracy (blind)"]["values"]
    assert values == [one["label_accuracy"]["blind"], two["label_accuracy"]["blind"]]
    text = (output / "report.md").read_text()
    assert "| label accuracy (first) |" in text and "| label accuracy (blind) |" in text
    assert f"label accuracy (blind): fraction whose class, according to {classifiers['blind']}, is the intended" in text

    other = {**CONFIG, "init_args": {"num_classes": 4, "channels": [4, 8]}}
    torch.save({"state_dict": instantiate(other).state_dict(), "hyper_parameters": other}, tmp_path / "four.ckpt")
    classifiers["four"] = str(tmp_path / "four.ckpt")
    with pytest.raises(ValueError, match="the classifiers are of different numbers of classes"):
        evaluate(samples[0], str(output), samples={"mine": samples}, classifier=classifiers, **arguments)
