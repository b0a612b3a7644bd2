"""Pictures of what a generator predicts: what is logged, that training stays the same, two ranks, bad settings."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers.several_ranks import on_ranks
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from discrete_lit.backbones import FactorisedHead, Transformer
from discrete_lit.callbacks import TokenTelemetry
from discrete_lit.generators import Autoregressive, Masked
from discrete_lit.generators.token_predictions import predictions_of
from discrete_lit.tokenizers import FSQ
from discrete_lit.tokenizers.networks import ConvAutoencoder


def test_pictures_and_means(generator, make_loader, make_trainer, read_images, read_scalars) -> None:
    telemetry = TokenTelemetry(2, count=3, layers=[0, 1], queries=[0, 9])
    trainer = make_trainer(max_steps=5, callbacks=[telemetry])
    trainer.fit(generator, make_loader(5))
    assert list(read_images("telemetry/loss_and_entropy")) == [2, 4]
    assert (
        list(read_images("telemetry/attention/layer_0")) == [2, 4] == list(read_images("telemetry/attention/layer_1"))
    )
    # A header, and three pictures one above the other: decoded ids, losses, entropies.
    assert read_images("telemetry/loss_and_entropy")[4].shape == (3, 28 + 3 * 116 - 4, 3 * 116 - 4)
    loss = read_scalars("telemetry/loss")
    assert list(loss) == [2, 4]
    quarters = (
        [read_scalars(f"telemetry/loss_by_{generator.coordinate_name}/{n}") for n in range(4)]
        if isinstance(generator, Autoregressive)
        else []
    )
    for step, mean in loss.items():
        if quarters:
            assert np.mean([quarter[step] for quarter in quarters]) == pytest.approx(mean, rel=1e-5)


def test_samples_are_the_same_all_along_and_after_a_resume(generator, make_loader, make_trainer, tmp_path) -> None:
    telemetry = TokenTelemetry(1, count=2)
    trainer = make_trainer(max_steps=2, callbacks=[telemetry])
    trainer.fit(generator, make_loader(4))
    first = next(iter(make_loader(1)))
    kept = telemetry._samples["tokens"]
    assert torch.equal(kept, generator.tokenizer.eval().encode(first["image"][:2]))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    after = TokenTelemetry(1, count=2)
    again = make_trainer(max_steps=3, callbacks=[after])
    again.fit(
        generator, DataLoader(make_loader(4).dataset, batch_size=6, shuffle=True), ckpt_path=tmp_path / "run.ckpt"
    )
    assert torch.equal(after._samples["tokens"], kept) and torch.equal(after._samples["label"], first["label"][:2])


def test_held_out_samples_where_the_run_begins_with_a_check(generator, make_loader, make_trainer) -> None:
    telemetry = TokenTelemetry(1, count=2)
    held_out = DataLoader(list(reversed(make_loader(2).dataset)), batch_size=6)
    make_trainer(max_steps=1, num_sanity_val_steps=1, callbacks=[telemetry]).fit(generator, make_loader(1), held_out)
    assert telemetry._samples["label"].tolist() == next(iter(held_out))["label"][:2].tolist()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_not_changed(generator, make_loader, make_trainer, precision) -> None:
    generator.backbone.dropout = torch.nn.Dropout(0.3)  # draws from the global generator in training
    begin = {name: value.clone() for name, value in generator.state_dict().items()}
    ends = []
    for callbacks in ([], [TokenTelemetry(1, count=2)]):
        generator.load_state_dict(begin)
        seed_everything(3, verbose=False)
        trainer = make_trainer(max_steps=4, precision=precision, accumulate_grad_batches=2, callbacks=callbacks)
        trainer.fit(generator, DataLoader(make_loader(8).dataset, batch_size=6, shuffle=True))
        ends.append({name: value.clone() for name, value in generator.state_dict().items()})
    assert any(not torch.equal(ends[0][name], begin[name]) for name in begin)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in begin)
    assert generator.backbone.training and not generator.tokenizer.training
    assert all(parameter.grad is None or parameter.requires_grad for parameter in generator.parameters())


def test_means_are_those_of_the_predictions(generator, make_loader, make_trainer, read_scalars) -> None:
    telemetry = TokenTelemetry(3, count=4)
    make_trainer(max_steps=3, callbacks=[telemetry]).fit(generator, make_loader(3))
    from discrete_lit.core.random import CounterRandom

    kept = telemetry._samples
    found = predictions_of(generator.eval(), kept["tokens"], kept["label"], CounterRandom(0, torch.arange(4)))
    assert read_scalars("telemetry/loss")[3] == pytest.approx(float(found.nats[found.predicted].mean()), rel=1e-5)
    assert read_scalars("telemetry/entropy")[3] == pytest.approx(float(found.entropy[found.predicted].mean()), rel=1e-5)


def test_a_head_of_sub_tokens_has_no_entropy(tokenizer, make_loader, make_trainer, read_images) -> None:
    head = {"token_embedding": "parts", "place_head": partial(FactorisedHead, sizes=(4, 4))}
    generator = Autoregressive(
        tokenizer,
        8,
        num_classes=4,
        backbone=partial(Transformer, width=16, depth=2, heads=2, **head),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    make_trainer(max_steps=1, callbacks=[TokenTelemetry(1, count=2)]).fit(generator, make_loader(1))
    assert read_images("telemetry/loss_and_entropy")[1].shape[2] == 2 * 116 - 4


def test_a_tokenizer_predicts_no_ids(tokenizer, make_loader, make_trainer, read_images) -> None:
    with pytest.warns(UserWarning, match="a VQVAE makes none"):
        make_trainer(max_steps=1, callbacks=[TokenTelemetry(1)]).fit(tokenizer, make_loader(1))
    assert read_images("telemetry/loss_and_entropy") == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps and count must be at least 1"),
        ({"count": 0}, "at least 1"),
        ({"layers": [1, 1]}, "layers must be different numbers"),
        ({"queries": [-1]}, "queries must be different numbers from 0"),
        ({"heads": []}, "heads and queries need a number"),
    ],
)
def test_settings_that_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTelemetry(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [2]}, r"layers=\[2\], accepted: numbers from 0 to 1"),
        ({"heads": [0, 5]}, "numbers from 0 to 1"),
        ({"queries": [16]}, "numbers from 0 to 15"),
    ],
)
def test_settings_that_the_model_does_not_have(settings, message, generator, make_loader, make_trainer) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=1, callbacks=[TokenTelemetry(**settings)]).fit(generator, make_loader(1))


def train(folder: str, strategy: str, telemetry: bool) -> dict[str, torch.Tensor]:
    """Train on two ranks, whose batches differ, and give the weights that each has."""
    import os

    rank = int(os.environ["LOCAL_RANK"])
    seed_everything(0, verbose=False)
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    generator = Masked(
        FSQ(network, levels=[4, 4]),
        8,
        num_classes=4,
        backbone=partial(Transformer, width=16, depth=2, heads=2),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    random = torch.Generator().manual_seed(rank)
    images = torch.rand(12, 3, 8, 8, generator=random) * 2 - 1
    data = [{"image": image, "label": place % 4, "index": 12 * rank + place} for place, image in enumerate(images)]
    sharded = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharded if strategy == "fsdp" else "ddp",
        max_steps=3,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version=f"log-{telemetry}"),
        callbacks=[TokenTelemetry(1, count=2)] if telemetry else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(generator, DataLoader(data, batch_size=4))
    weights = {}
    for name, value in generator.backbone.state_dict().items():
        weights[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return weights


def train_all(folder: str) -> dict[tuple[str, bool], dict[str, torch.Tensor]]:
    return {
        (strategy, telemetry): train(f"{folder}/{strategy}", strategy, telemetry)
        for strategy in ("ddp", "fsdp")
        for telemetry in (False, True)
    }


@pytest.mark.ddp
def test_two_ranks(tmp_path) -> None:
    found = on_ranks(2, train_all, tmp_path / "results", str(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for strategy in ("ddp", "fsdp"):
        for of_rank in found:
            weights, expected = of_rank[strategy, True], of_rank[strategy, False]
            assert expected and all(torch.equal(weights[name], value) for name, value in expected.items())
        events = EventAccumulator(str(tmp_path / strategy / "log-True"))
        events.Reload()
        for tag in ("telemetry/loss_and_entropy", "telemetry/attention/layer_1"):
            assert [event.step for event in events.Images(tag)] == [1, 2, 3]
