"""A training step of every family leaves the host free to run ahead of a GPU; a table says where it must wait, and why.

After a warm-up, a step by Lightning's Trainer is run on a CPU, and `CountedWaits` counts what would wait on a GPU.
"""

import logging
from collections.abc import Iterator
from functools import partial
from traceback import extract_stack
from typing import Any

import pytest
import torch
from helpers.host_waits import CountedWaits
from helpers.precision_cases import GENERATORS, SIDE, TOKENIZERS, make_generator, make_tokenizer
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from discrete_lit.callbacks import ExponentialMovingAverage, GradientNorm, Throughput, TrainingGuard

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:You have overridden `on_before_batch_transfer` in `LightningModule`",
)

# What stays on the host, or waits for nothing that is still to do.
HARMLESS = {
    "nonzero at generators/training.py:check_labels": "labels before the transfer; on a device they are not looked at",
    "tolist at generators/training.py:check_labels": "likewise",
    "tolist at core/host_copies.py:values": "it waits for what came before the copy, not for what was queued since",
    "_local_scalar_dense at callbacks/ema.py:_move": "the counter of the steps lies on the host",
    "nonzero at generators/masked.py:_cross_entropies": "on a CPU alone: `token_losses` asks for it there",
}
# How often a step waits, of the families that have to.
WAITS = {
    # Of wide logits, those of tokens that the noise left are not worth two passes more than a wait costs.
    "DiscreteDiffusion": {"nonzero at diffusion/losses.py:__call__": 1},
    "DiscreteDiffusion, SEDD": {"nonzero at diffusion/losses.py:__call__": 1},
    # A process without a closed form: a matrix for each level, doubled as often as its noise needs, kept for the loss.
    "DiscreteDiffusion, Gaussian": {
        "_local_scalar_dense at diffusion/dense_processes.py:_by_level": 2,
        "equal at diffusion/dense_processes.py:_kernels": 2,
    },
    # With `revive_below`: whether there are dead codes, at each depth.
    "VQVAE": {"nonzero at tokenizers/quantizers/codebook.py:_revive": 1},
    "RQVAE": {"nonzero at tokenizers/quantizers/codebook.py:_revive": 2},
}
TRAINED = [name for name in TOKENIZERS if hasattr(make_tokenizer(name), "objective")]


class OneStep(Callback):
    """Counts the waits of one optimizer step that is not the first, from its first batch to the end of the last."""

    def __init__(self, first: int, batches: int) -> None:
        self.waits = CountedWaits()
        self.first, self.last = first, first + batches - 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self.waits.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.last:
            self.waits.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def waits_of(module: LightningModule, batch: dict[str, Any], *, callbacks: Any = (), **settings: Any) -> dict[str, int]:
    together = settings.get("accumulate_grad_batches", 1)
    module.optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)  # type: ignore[assignment]
    module.accumulation = "by_micro_batch"  # type: ignore[assignment]
    counting = OneStep(first=2 * together, batches=together)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1000,
        # The last to be called, so that it sees the others' hooks behind a batch.
        callbacks=[*callbacks, counting],
        **settings,
    )
    trainer.fit(module.train(), DataLoader([batch] * 4 * together, batch_size=None))
    assert trainer.global_step == 4
    return {place: count for place, count in counting.waits.found.items() if place not in HARMLESS}


def tokens_of(generator: Any) -> dict[str, Any]:
    tokens = torch.randint(generator.vocab_size, (4, *generator.token_shape))
    return {"tokens": tokens, "label": torch.tensor([0, 1, 1, 0]), "index": torch.arange(4)}


def images() -> dict[str, Any]:
    return {
        "image": torch.rand(4, 3, SIDE, SIDE) * 2 - 1,
        "label": torch.tensor([0, 1, 1, 0]),
        "index": torch.arange(4),
    }


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name: str) -> None:
    generator = make_generator(name)
    assert waits_of(generator, tokens_of(generator)) == WAITS.get(name, {})


@pytest.mark.parametrize("name", TRAINED)
def test_tokenizers(name: str) -> None:
    assert waits_of(make_tokenizer(name), images()) == WAITS.get(name, {})


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
@pytest.mark.parametrize("make", [partial(make_generator, "NextScale"), partial(make_tokenizer, "VQGAN")])
def test_callbacks_micro_batches_clipping_and_images(make: Any, settings: dict[str, Any], tmp_path) -> None:
    """A generator that encodes its images, and a tokenizer with a discriminator."""
    callbacks = [TrainingGuard(), ExponentialMovingAverage(), Throughput(), GradientNorm()]
    assert waits_of(make(), images(), callbacks=callbacks, default_root_dir=tmp_path, **settings) == {}


def test_no_step_waits_at_a_barrier_of_ranks(monkeypatch) -> None:
    """Every term that is logged would, if Lightning averaged it over ranks."""
    callers: list[set[str]] = []
    monkeypatch.setattr(
        torch.distributed, "barrier", lambda *_, **__: callers.append({frame.name for frame in extract_stack()})
    )
    try:
        for module in (make_generator("NextScale"), make_tokenizer("VQGAN")):
            assert waits_of(module, images(), strategy=DDPStrategy(process_group_backend="gloo"), devices=1) == {}
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert callers and not any("training_step" in names for names in callers)


def test_broken_images_end_a_run_before_the_optimizer_steps() -> None:
    """The check that is looked at late is not too late, and outside of a Trainer it is not late at all."""
    generator, batch = make_generator("NextScale").train(), images()
    before = {name: value.clone() for name, value in generator.backbone.named_parameters()}
    batch["image"][2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 4 images have pixels that are not finite numbers.*the batch: 2"):
        waits_of(generator, batch)
    assert all(torch.equal(value, before[name]) for name, value in generator.backbone.named_parameters())
    with pytest.raises(ValueError, match="not finite"):
        generator.tokenizer.encode(batch["image"])
    generator = make_generator("NextScale").train()
    with pytest.raises(ValueError, match="not finite"):
        generator.training_step(batch, 0)


@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x.long().bincount(), "bincount"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.repeat_interleave(torch.ones_like(x).long()), "repeat_interleave"),
        (lambda x: x + torch.tensor(1.0, device=x.device), "lift_fresh"),
    ],
)
def test_what_waits_is_counted(waits: Any, operation: str) -> None:
    with CountedWaits() as found:
        waits(torch.arange(4.0))
    assert [place.split(" at ")[0] for place in found.found] == [operation]


def test_what_does_not_wait_is_not_counted() -> None:
    x = torch.arange(4.0, requires_grad=True)
    with CountedWaits() as waits:
        y = x[torch.arange(2)].where(x[:2] > 0, 0.0) + x.new_full((), 2.0)
        y.masked_fill(y > 1, 0).repeat_interleave(torch.full((2,), 2), output_size=4).sum().backward()
    assert not waits.found
