import pytest
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from discrete_lit.callbacks import Throughput

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
    (share,) = read_scalars("throughput/data_wait").values()
    assert 0 < share < 1
