import logging
import resource
from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers.counted_operations import counted
from helpers.precision_cases import GENERATORS, make_generator
from helpers.segment_layouts import Words
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from discrete_lit.backbones import SegmentTransformer, Transformer
from discrete_lit.callbacks import Throughput
from discrete_lit.callbacks import throughput as throughput_file
from discrete_lit.callbacks.throughput import peak_memory, peak_of
from discrete_lit.generators import Autoregressive, Masked, TextVideoAudio
from discrete_lit.generators.counted_step import count_step
from discrete_lit.tokenizers import VQVAE, TokenGrid
from discrete_lit.tokenizers.losses import AdversarialLoss
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder

BATCH = 6


class Clock:
    """A clock that moves only when told: its reading is in seconds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow:
    """A loader whose every batch takes `seconds`."""

    def __init__(self, loader, clock, seconds):
        self.loader, self.clock, self.seconds = loader, clock, seconds

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.clock.now += self.seconds
            yield batch


class Work(Callback):
    """Lets time pass in a training step, in a validation and before a checkpoint."""

    def __init__(self, clock, step, validation=0.0, checkpoint=0.0):
        self.clock, self.step, self.validation, self.checkpoint = clock, step, validation, checkpoint

    def on_before_backward(self, trainer, pl_module, loss):
        self.clock.now += self.step

    def on_validation_epoch_end(self, trainer, pl_module):
        self.clock.now += self.validation

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.clock.now += self.checkpoint


def test_windows_of_a_generator(generator, make_loader, make_trainer, read_scalars):
    clock = Clock()
    callbacks = [Work(clock, step=3.0), Throughput(clock)]
    trainer = make_trainer(max_steps=6, log_every_n_steps=2, callbacks=callbacks)
    trainer.fit(generator, Slow(make_loader(6), clock, seconds=1.0))
    # The wait before the first batch does not count: 2 batches in 3 + 1 + 3 seconds, then in 1 + 3 + 1 + 3.
    images = read_scalars("throughput/images_per_second")
    assert images == pytest.approx({1: 2 * BATCH / 7, 3: 2 * BATCH / 8, 5: 2 * BATCH / 8})
    tokens = read_scalars("throughput/tokens_per_second")
    assert tokens == pytest.approx({step: value * generator.length for step, value in images.items()})
    assert read_scalars("throughput/data_wait") == pytest.approx({1: 1 / 7, 3: 2 / 8, 5: 2 / 8})


def test_accumulated_batches_belong_to_one_step(generator, make_loader, make_trainer, read_scalars):
    clock = Clock()
    callbacks = [Work(clock, step=3.0), Throughput(clock)]
    trainer = make_trainer(max_steps=2, log_every_n_steps=1, accumulate_grad_batches=3, callbacks=callbacks)
    trainer.fit(generator, Slow(make_loader(6), clock, seconds=1.0))
    images = read_scalars("throughput/images_per_second")
    assert images == pytest.approx({0: 3 * BATCH / 11, 1: 3 * BATCH / 12})


def test_validation_and_checkpoints_do_not_count(tokenizer, make_loader, make_trainer, read_scalars, tmp_path):
    clock = Clock()
    work = Work(clock, step=3.0, validation=100.0, checkpoint=1000.0)
    keeper = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2)
    trainer = make_trainer(
        max_steps=4,
        log_every_n_steps=4,
        val_check_interval=3,
        enable_checkpointing=True,
        callbacks=[work, Throughput(clock), keeper],
    )
    trainer.fit(tokenizer, Slow(make_loader(4), clock, seconds=1.0), make_loader(1))
    assert clock.now > 1100
    # Of the three gaps between four batches only the first holds neither.
    assert read_scalars("throughput/images_per_second") == pytest.approx({3: 4 * BATCH / 13})
    assert read_scalars("throughput/data_wait") == pytest.approx({3: 1 / 13})
    tokens_of_an_image = 4 * 4
    assert read_scalars("throughput/tokens_per_second") == pytest.approx({3: 4 * BATCH * tokens_of_an_image / 13})


def test_real_time(generator, make_loader, make_trainer, read_scalars):
    make_trainer(max_steps=2, log_every_n_steps=2, callbacks=[Throughput()]).fit(generator, make_loader(2))
    (fraction,) = read_scalars("throughput/data_wait").values()
    assert 0 < fraction < 1


@pytest.fixture(params=["masked", "autoregressive", "tokenizer", "adversarial"])
def module(request, tokenizer):
    if request.param == "tokenizer":
        return tokenizer.train()
    if request.param == "adversarial":
        network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
        adversarial = AdversarialLoss(PatchGAN(width=4, layers=1))
        optimizer = partial(torch.optim.SGD, lr=0.1)
        return VQVAE(network, 16, code_dim=4, adversarial_loss=adversarial, optimizer=optimizer).train()
    backbone = partial(Transformer, width=16, depth=2, heads=2)
    kind = Masked if request.param == "masked" else Autoregressive
    return kind(tokenizer, 8, num_classes=4, backbone=backbone, optimizer=partial(torch.optim.SGD, lr=0.1)).train()


def test_a_step_without_data_counts_as_much_as_a_real_one(module, make_loader):
    module.log_dict = lambda *_, **__: None
    (batch,) = make_loader(1)
    before, random = deepcopy(module.state_dict()), torch.get_rng_state()
    measured = count_step(module, batch)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    if isinstance(module, Masked):
        # How many tokens are masked is data: all of them count.
        module._draw_masks = lambda random: torch.ones(len(batch["label"]), module.length, dtype=torch.bool)
    assert measured == counted(module, batch) > 0


def test_utilisation(module, make_loader, make_trainer, read_scalars):
    """A batch takes 3 seconds and its loader 1: operations in 4 seconds, as a fraction of the peak."""
    clock = Clock()
    callbacks = [Work(clock, step=3.0), Throughput(clock, peak_flops=1e9)]
    make_trainer(max_steps=4, log_every_n_steps=2, callbacks=callbacks).fit(
        module, Slow(make_loader(4), clock, seconds=1.0)
    )
    (batch,) = make_loader(1)
    each = count_step(module, batch)
    assert read_scalars("throughput/mfu") == pytest.approx({1: 2 * each / 7 / 1e9, 3: each / 4 / 1e9})
    teraflops = read_scalars("throughput/teraflops_per_device")
    assert teraflops == pytest.approx({1: 2 * each / 7 / 1e12, 3: each / 4 / 1e12})


@pytest.mark.parametrize("name", GENERATORS)
def test_a_step_of_every_generator_is_counted(name: str) -> None:
    generator = make_generator(name).train()
    tokens = torch.zeros(4, *generator.token_shape, dtype=torch.int64)
    assert count_step(generator, {"tokens": tokens, "label": torch.zeros(4, dtype=torch.int64)}) > 0


def test_a_generator_over_segments_says_what_its_steps_computed(make_trainer, read_scalars):
    model = TextVideoAudio(
        TokenGrid(2, (2, 1, 1)),
        TokenGrid(2, (1, 2)),
        image_size=(3, 4, 4),
        audio_length=8,
        text_tokenizer=Words(("dark", "bright")),
        text_length=4,
        backbone=partial(SegmentTransformer, width=8, depth=1, heads=2),
        voice_share=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    rows = [
        {
            "tokens": torch.zeros(2, 1, 1, dtype=torch.int64),
            "audio_tokens": torch.zeros(1, 2, dtype=torch.int64),
            "caption": "dark",
        }
    ]
    clock = Clock()
    trainer = make_trainer(max_steps=1, log_every_n_steps=1, callbacks=[Work(clock, step=4.0), Throughput(clock)])
    trainer.fit(model, DataLoader(rows * BATCH, batch_size=BATCH))
    assert model.step_flops() > 0
    assert read_scalars("throughput/teraflops_per_device") == pytest.approx({0: model.step_flops() / 4 / 1e12})


def test_each_kind_of_step_is_counted_once(module, make_loader, make_trainer, monkeypatch):
    made = []

    def counting(*arguments):
        made.append(arguments)
        return count_step(*arguments)

    monkeypatch.setattr(throughput_file, "count_step", counting)
    make_trainer(max_steps=4, log_every_n_steps=2, callbacks=[Throughput()]).fit(module, make_loader(4))
    assert len(made) == 1


def test_an_unknown_peak_leaves_utilisation_out(generator, make_loader, make_trainer, read_scalars):
    make_trainer(max_steps=2, log_every_n_steps=2, callbacks=[Throughput()]).fit(generator, make_loader(2))
    assert read_scalars("throughput/teraflops_per_device")[1] > 0
    with pytest.raises(KeyError):
        read_scalars("throughput/mfu")


def test_a_step_that_needs_data_is_not_counted(tokenizer, make_loader, make_trainer, read_scalars, caplog):
    class NeedsData(type(tokenizer)):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return outputs if outputs["loss"].item() > 0 else {"loss": outputs["loss"] * 2}

    tokenizer.__class__ = NeedsData
    with caplog.at_level(logging.INFO):
        callbacks = [Throughput(peak_flops=1e9)]
        make_trainer(max_steps=4, log_every_n_steps=2, callbacks=callbacks).fit(tokenizer, make_loader(4))
    said = [record for record in caplog.records if "cannot be counted" in record.message]
    assert len(said) == 1 and "NeedsData" in said[0].message
    assert read_scalars("throughput/images_per_second")[3] > 0
    for missing in ("mfu", "teraflops_per_device"):
        with pytest.raises(KeyError):
            read_scalars(f"throughput/{missing}")


def test_activation_checkpointing_is_no_work_of_the_model(generator, make_loader):
    (batch,) = make_loader(1)
    before = count_step(generator.train(), batch)
    generator.backbone.activation_checkpointing = True
    assert count_step(generator, batch) == before
    assert generator.backbone.activation_checkpointing


def test_peak_memory(generator, make_loader, make_trainer, read_scalars):
    make_trainer(max_steps=2, log_every_n_steps=2, callbacks=[Throughput()]).fit(generator, make_loader(2))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory(torch.device("cpu")) >= held * 1024
    assert read_scalars("throughput/peak_memory_gib")[1] == pytest.approx(held / 2**20, rel=0.1)


def test_peaks_of_known_devices(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_of("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.5e12
    assert peak_of("NVIDIA H100 PCIe", "16-mixed") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_of("NVIDIA A100-SXM4-80GB", "32-true") == 156e12
    assert peak_of("NVIDIA A10G", "bf16-true") is None
    assert peak_of("NVIDIA H200", "64-true") is None


def test_a_peak_is_positive():
    with pytest.raises(ValueError, match="peak_flops must be positive"):
        Throughput(peak_flops=0)
