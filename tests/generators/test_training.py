"""Training of every generator: batches, dropped labels, logs, predictions, the frozen tokenizer, data that misfit."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from discrete_lit.core.random import CounterRandom

each_family = pytest.mark.parametrize("family", ["masked", "autoregressive"])


def record(generator, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the generator logs from now on, and the labels and samples that its objective is given."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(generator, "log_dict", lambda values, **_: seen.update(values))
    original = generator.token_losses

    def token_losses(tokens, labels, random):
        seen.update(labels=labels, indices=random.indices, tokens=tokens)
        return original(tokens, labels, random)

    monkeypatch.setattr(generator, "token_losses", token_losses)
    return seen


def batch_of(count: int, **more: Any) -> dict[str, Any]:
    return {"tokens": torch.randint(4, (count, 3)), "label": torch.arange(count) % 2, **more}


@each_family
def test_fraction_of_dropped_labels(make_generator, monkeypatch, family: str) -> None:
    generator = make_generator(family, label_dropout=0.3).train()
    seen = record(generator, monkeypatch)
    batch = batch_of(4000, index=torch.arange(4000))
    loss = generator.training_step(batch, 0)
    assert loss.requires_grad and seen["train/loss"] is loss
    dropped = seen["labels"] == 2
    assert abs(dropped.double().mean() - 0.3) < 4 * (0.21 / 4000) ** 0.5
    assert torch.equal(seen["labels"][~dropped], batch["label"][~dropped])
    generator.training_step({name: value[100:200] for name, value in batch.items()}, 7)
    assert torch.equal(seen["labels"] == 2, dropped[100:200])  # it belongs to the sample, not to the batch


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 50)])
def test_no_and_every_label_dropped(make_generator, monkeypatch, probability: float, expected: int) -> None:
    generator = make_generator("autoregressive", label_dropout=probability).train()
    seen = record(generator, monkeypatch)
    generator.training_step(batch_of(50, index=torch.arange(50)), 0)
    assert int((seen["labels"] == 2).sum()) == expected


@each_family
@torch.no_grad()
def test_validation_drops_no_label_and_logs_a_profile(make_generator, monkeypatch, family: str) -> None:
    generator = make_generator(family, label_dropout=0.9, spread=0.3)
    seen = record(generator, monkeypatch)
    batches = [batch_of(40, index=torch.arange(40) + 40 * part) for part in range(2)]
    total = weight = 0.0
    for batch_idx, batch in enumerate(batches):
        generator.validation_step(batch, batch_idx)
        assert torch.equal(seen["labels"], batch["label"])
        losses = generator.token_losses(batch["tokens"], batch["label"], CounterRandom(0, batch["index"]))
        total += float((losses.values * losses.weights).sum())
        weight += float(losses.weights.sum())
    generator.on_validation_epoch_end()
    assert float(seen["validation/loss"]) == pytest.approx(total / weight, rel=1e-5)
    bins = [name for name in seen if name.startswith(f"validation/loss_by_{generator.coordinate_name}/")]
    # Ratios 1/3, 2/3, 1 and positions 1/6, 1/2, 5/6: three of the four bins.
    assert [name.rsplit("/")[-1] for name in bins] == (
        ["0.25-0.50", "0.50-0.75", "0.75-1.00"] if family == "masked" else ["0.00-0.25", "0.50-0.75", "0.75-1.00"]
    )


@each_family
def test_samples_without_an_index_are_told_apart(make_generator, monkeypatch, family: str) -> None:
    """A loader of the user's own, its last batch smaller: every epoch, batch and row is a sample of its own."""
    generator = make_generator(family).train()
    seen, indices = record(generator, monkeypatch), []
    for epoch in range(3):
        monkeypatch.setattr(type(generator), "current_epoch", epoch)
        for batch_idx, count in enumerate((8, 8, 5)):
            generator.training_step(batch_of(count), batch_idx)
            indices.append(seen["indices"])
    together = torch.cat(indices)
    assert len(together.unique()) == len(together) == 63
    generator.eval()
    generator.validation_step(batch_of(8), 1)
    assert torch.equal(seen["indices"], indices[1])  # validation masks as in its first epoch, in every epoch


@each_family
def test_prediction_draws_every_sample_anew(make_generator, family: str) -> None:
    generator = make_generator(family, token_shape=(12,), seed=3)
    labels = torch.zeros(5, dtype=torch.int64)
    first, second = (generator.predict_step({"label": labels}, batch_idx) for batch_idx in range(2))
    assert first.shape == (5, 3, 1, 12) and float(first.min()) >= -1 and float(first.max()) <= 1
    assert len(torch.cat((first, second)).flatten(1).unique(dim=0)) == 10
    indexed = generator.predict_step({"label": labels, "index": torch.arange(5)}, 4)
    expected = generator.tokenizer.decode(generator.sample(labels, seed=3))
    assert torch.equal(indexed, expected)


@each_family
def test_images_and_their_tokens_are_the_same_batch(make_generator, make_tokenizer, monkeypatch, family: str) -> None:
    tokenizer = make_tokenizer()
    generator = make_generator(family, tokenizer=tokenizer, image_size=8)
    seen = record(generator, monkeypatch)
    images, labels = torch.rand(6, 3, 8, 8) * 2 - 1, torch.zeros(6, dtype=torch.int64)
    rest = {"label": labels, "index": torch.arange(6)}
    losses = []
    for batch in ({"image": images}, {"tokens": tokenizer.encode(images)}):
        losses.append(generator.training_step({**batch, **rest}, 0))
        assert seen["tokens"].shape == (6, 4)
    assert torch.equal(losses[0], losses[1])
    with pytest.raises(ValueError, match=r"token grids \(4, 4\), this generator models \(2, 2\): .*image_size is 8"):
        generator.training_step({"image": torch.rand(6, 3, 16, 16), **rest}, 0)


@each_family
def test_training_never_changes_the_tokenizer(make_generator, make_tokenizer, monkeypatch, family: str) -> None:
    """A codebook of running means would move if the tokenizer followed the generator into training mode."""
    generator = make_generator(
        family,
        tokenizer=make_tokenizer("vqvae").train(),
        image_size=8,
        optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
    ).train()
    record(generator, monkeypatch)
    assert generator.training and generator.backbone.training
    assert not any(module.training for module in generator.tokenizer.modules())
    before, backbone = generator.tokenizer.fingerprint(), copy.deepcopy(generator.backbone.state_dict())
    optimizer = generator.configure_optimizers()
    for step in range(2):
        images = torch.rand(4, 3, 8, 8) * 2 - 1
        generator.training_step({"image": images, "label": torch.zeros(4, dtype=torch.int64)}, step).backward()
        optimizer.step()
    assert generator.tokenizer.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in generator.tokenizer.parameters())
    assert any(not torch.equal(value, backbone[name]) for name, value in generator.backbone.state_dict().items())


def attach(generator, **data: Any) -> None:
    generator._trainer = SimpleNamespace(datamodule=SimpleNamespace(**data) if data else None)


@each_family
def test_data_that_do_not_fit(make_generator, family: str) -> None:
    generator = make_generator(family)
    asked: list[str] = []
    for fits in ({}, {"check_tokenizer": asked.append, "num_classes": 2}, {"num_classes": 1}):
        attach(generator, **fits)
        generator.setup("fit")
    assert asked == [generator.tokenizer.fingerprint()]
    attach(generator, num_classes=3)
    with pytest.raises(ValueError, match=r"the data has 3 classes, model.init_args.num_classes is 2"):
        generator.setup("fit")


@each_family
def test_training_without_an_optimizer(make_generator, family: str) -> None:
    with pytest.raises(ValueError, match=r"has no optimizer: set model.init_args.optimizer"):
        make_generator(family).configure_optimizers()


@each_family
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(make_generator, monkeypatch, family: str, dtype: torch.dtype) -> None:
    generator = make_generator(family, token_shape=(12,))
    seen = record(generator, monkeypatch)
    batch = {"tokens": torch.randint(4, (6, 12)), "label": torch.arange(6) % 2}
    expected = generator.loss(batch["tokens"], batch["label"])[0]
    assert torch.equal(generator.loss(batch["tokens"], batch["label"].to(dtype))[0], expected)
    drawn = generator.sample(batch["label"])
    assert torch.equal(generator.sample(batch["label"].to(dtype)), drawn)
    converted = generator.on_before_batch_transfer({**batch, "label": batch["label"].to(dtype)}, 0)
    assert converted["label"].dtype == torch.int64 and torch.equal(converted["label"], batch["label"])
    generator.validation_step({**batch, "label": batch["label"].to(dtype)}, 0)
    assert seen["labels"].dtype == torch.int64 and torch.equal(seen["labels"], batch["label"])


@each_family
@pytest.mark.parametrize("label", [2, 3, -1])
def test_a_label_that_is_no_class_is_named(make_generator, family: str, label: int) -> None:
    generator = make_generator(family).train()
    batch = batch_of(4, key=["a", "b", "c", "d"])
    batch["label"] = torch.tensor([0, 1, label, 1])
    for use in (
        lambda: generator.on_before_batch_transfer(batch, 0),
        lambda: generator.training_step(batch, 0),
        lambda: generator.validation_step(batch, 0),
    ):
        with pytest.raises(ValueError, match=rf"label {label} of sample 'c'; they must be whole numbers in 0\.\.1"):
            use()
    with pytest.raises(ValueError, match=rf"label {label} of sample 2"):
        generator.loss(batch["tokens"], batch["label"])
    with pytest.raises(ValueError, match=rf"label {label} of sample 42"):
        generator.labels_of({"label": batch["label"], "index": torch.arange(4) + 40})
    for wrong in (torch.tensor([0.5, 1, 0, 1]), torch.zeros(4, 1, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"the labels are torch\..*; they must be whole numbers in 0\.\.1, one for"
        ):
            generator.labels_of({"label": wrong})
    for wrong in (torch.tensor([1]), torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)):
        for use in (
            lambda wrong=wrong: generator.training_step({**batch, "label": wrong}, 0),
            lambda wrong=wrong: generator.loss(batch["tokens"], wrong),
        ):
            with pytest.raises(ValueError, match=r"one for each of 4 samples"):
                use()
        with pytest.raises(ValueError, match=r"one is needed for each of 4 sequences"):
            generator.eval().log_likelihood(batch["tokens"], wrong)
    for wrong in (torch.tensor(1), torch.tensor([[0], [1]])):
        with pytest.raises(ValueError, match=r"they must be whole numbers in 0\.\.2, one for each sample"):
            generator.sample(wrong)


def test_data_without_labels_is_refused_by_the_models_name(make_generator) -> None:
    generator = make_generator("masked")
    with pytest.raises(ValueError, match=r"holds tokens and no label: Masked models 2 classes and needs labels"):
        generator.training_step({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, 0)
    generator.trainer = SimpleNamespace(datamodule=SimpleNamespace(num_classes=0))
    with pytest.raises(ValueError, match=r"Masked models 2 classes and needs labels, which this data has not"):
        generator.setup("fit")


def test_a_model_of_one_class_needs_no_labels(make_generator, monkeypatch) -> None:
    generator = make_generator("masked", num_classes=1, label_dropout=0.0).train()
    seen = record(generator, monkeypatch)
    generator.training_step({"tokens": torch.randint(4, (5, 3))}, 0)
    assert seen["labels"].tolist() == [0] * 5
    generator.trainer = SimpleNamespace(datamodule=SimpleNamespace(num_classes=0))
    generator.setup("fit")
