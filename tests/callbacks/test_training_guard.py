"""The training guard: what it measures, what it writes down, and that a skipped batch leaves no trace."""

import json
import logging
from copy import deepcopy
from functools import partial
from math import exp, log

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from discrete_lit import callbacks
from discrete_lit.callbacks import TrainingGuard, TrainingStopped
from discrete_lit.tokenizers import VQVAE
from discrete_lit.tokenizers.losses import AdversarialLoss
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder


def batches(count, broken=(), size=8):
    """Batches of four images; one image of each broken one is not a number."""
    random = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        images = torch.rand(4, 3, size, size, generator=random) * 2 - 1
        if number in broken:
            images[2, 0, 3, 3] = float("nan")
        index = torch.arange(4) + 4 * number
        made.append({"image": images, "label": index % 3, "index": index, "key": [f"key-{i}" for i in index.tolist()]})
    return made


def loader(made):
    return DataLoader(made, batch_size=None)


def make_module(**settings):
    """Everything that a batch can touch: EMA codes started by data, batch statistics, LeCam's means, Adam."""
    torch.manual_seed(0)
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    adversarial = AdversarialLoss(PatchGAN(width=4, layers=1, norm="sync"), lecam_weight=0.1)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return VQVAE(network, 16, code_dim=4, adversarial_loss=adversarial, optimizer=optimizer, **settings)


def fit(make_trainer, made, guard, module=None, **settings):
    module = module or make_module()
    callbacks = [guard, *settings.pop("callbacks", [])]
    trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **settings)
    trainer.fit(module, loader(made))
    return module, trainer


@pytest.mark.parametrize("broken", [0, 2])
def test_a_skipped_batch_leaves_no_trace(make_trainer, broken, tmp_path):
    made = batches(5, broken=[broken])
    module, trainer = fit(make_trainer, made, TrainingGuard(on_nonfinite="skip"))
    del made[broken]
    expected, other = fit(make_trainer, made, TrainingGuard(on_nonfinite="skip"))
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert module.state_dict().keys() == expected.state_dict().keys()
    mine, theirs = trainer.optimizers[0].state_dict()["state"], other.optimizers[0].state_dict()["state"]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert (trainer.global_step, other.global_step) == (5, 4)


def test_the_offending_batch_is_written_down(make_trainer, tmp_path, caplog):
    with pytest.raises(
        TrainingStopped, match=r"not finite at step 2; images with pixels .*: key-10. Its keys"
    ) as error:
        fit(make_trainer, batches(4, broken=[2]), TrainingGuard())
    (file,) = (tmp_path / "alarms").iterdir()
    report = json.loads(file.read_text())
    (of_rank,) = report["ranks"]
    assert report["step"] == 2 and str(file) in str(error.value)
    assert of_rank["key"] == ["key-8", "key-9", "key-10", "key-11"] and of_rank["index"] == [8, 9, 10, 11]
    assert of_rank["not_finite"] == ["key-10"] and of_rank["loss"] == "nan"
    assert report["terms"]["train/reconstruction"] == "nan"
    assert texts(tmp_path) == [str(error.value)] and str(error.value) in caplog.text


def texts(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "log"))
    accumulator.Reload()
    events = accumulator.Tensors("alarm/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in events]


def test_stopping_is_before_the_step(make_trainer):
    module = make_module()

    class Before(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights = deepcopy(dict(pl_module.named_parameters()))

    before = Before()
    with pytest.raises(TrainingStopped):
        fit(make_trainer, batches(4, broken=[2]), TrainingGuard(), module, callbacks=[before])
    torch.testing.assert_close(dict(module.named_parameters()), before.weights, rtol=0, atol=0)


def test_finite_images_and_a_loss_that_is_not(make_trainer):
    module = make_module()
    loss = module.loss
    module.loss = lambda images, **known: (loss(images, **known)[0] + float("inf"), *loss(images, **known)[1:])
    with pytest.raises(TrainingStopped, match="its images are finite numbers"):
        fit(make_trainer, batches(2), TrainingGuard(), module)


def breaking(module, batch):
    """Let the gradient of one batch, whose loss is finite, be infinite."""
    seen = []

    def after(weight):
        seen.append(1)
        return torch.full_like(weight, torch.inf) if len(seen) == batch + 1 else None

    next(module.network.parameters()).register_hook(after)
    return module


def test_a_gradient_that_is_not_finite_leaves_no_trace(make_trainer):
    made = batches(5)
    module, trainer = fit(make_trainer, made, TrainingGuard(on_nonfinite="skip"), breaking(make_module(), 2))
    del made[2]
    expected, other = fit(make_trainer, made, TrainingGuard(on_nonfinite="skip"))
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert (trainer.global_step, other.global_step) == (5, 4)


@pytest.mark.parametrize("last", [False, True])
def test_a_gradient_that_is_not_finite_ends_the_run_before_a_checkpoint(make_trainer, tmp_path, last):
    keeper = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(TrainingStopped, match="the gradient of a batch is not finite at step 2") as error:
        made = batches(3 if last else 6)
        module = breaking(make_module(), 2)
        fit(make_trainer, made, TrainingGuard(), module, callbacks=[keeper], enable_checkpointing=True)
    (file,) = (tmp_path / "alarms").iterdir()
    report = json.loads(file.read_text())
    assert file.name == "gradient-00000002.json" and str(file) in str(error.value)
    assert (report["step"], report["epoch"], report["batch"]) == (2, 0, 2)
    assert report["ranks"][0]["index"] == [8, 9, 10, 11]
    written = sorted((tmp_path / "checkpoints").iterdir())
    assert len(written) == 2
    for checkpoint in written:
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in weights.values())


def spiking(batch, factor):
    """A module whose loss of one batch is that of the others, times a factor."""
    module = make_module()
    module.optimizer = partial(torch.optim.SGD, lr=0.0)
    step, seen = module.training_step, []

    def training_step(given, batch_idx):
        seen.append(1)
        out = step(given, batch_idx)
        return {**out, "loss": out["loss"] * (factor if len(seen) == batch + 1 else 1)}

    module.training_step = training_step
    return module


@pytest.mark.slow
def test_a_spike_of_the_loss(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "discrete_lit")
    made = batches(100)
    fit(make_trainer, made, TrainingGuard(0.0), spiking(50, 1000.0))  # too few to compare with
    assert not (tmp_path / "alarms").exists()
    fit(make_trainer, made, TrainingGuard(0.0), spiking(80, 1.01))
    assert not (tmp_path / "alarms").exists()
    _, trainer = fit(make_trainer, made, TrainingGuard(0.0), spiking(80, 1000.0))
    (file,) = (tmp_path / "alarms").iterdir()
    report = json.loads(file.read_text())
    assert (file.name, report["what"], report["batch"]) == ("spike-00000080.json", "spike", 80)
    assert report["ranks"][0]["index"] == [320, 321, 322, 323]
    assert "the loss of a batch jumps at step 80" in caplog.text and trainer.global_step == 100
    with pytest.raises(TrainingStopped, match="jumps at step 80"):
        fit(make_trainer, made, TrainingGuard(0.0, on_spike="stop"), spiking(80, 1000.0))
    fit(make_trainer, made, TrainingGuard(0.0, spike=0, on_spike="stop"), spiking(80, 1000.0))


def test_accumulated_batches_of_a_bad_step_are_skipped_together(make_trainer):
    module = make_module(accumulation="by_micro_batch")
    guard = TrainingGuard(on_nonfinite="skip")
    _, trainer = fit(make_trainer, batches(6, broken=[2]), guard, module, accumulate_grad_batches=2)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {2} and trainer.global_step == 3


def test_many_bad_batches_in_a_row_end_the_run(make_trainer):
    guard = TrainingGuard(on_nonfinite="skip", most_skipped=3)
    with pytest.raises(TrainingStopped, match="3 bad batches in a row"):
        fit(make_trainer, batches(6, broken=[0, 2, 3, 4]), guard)
    _, trainer = fit(make_trainer, batches(6, broken=[0, 2, 3, 5]), TrainingGuard(on_nonfinite="skip", most_skipped=3))
    assert trainer.global_step == 6


class Tokens(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["tokens"].flatten())


def test_live_usage_and_perplexity(make_trainer, read_scalars):
    """Of windows of 2 batches, 128 ids of 16; logged from the end of a window on, on the logger's schedule."""
    tokens = Tokens()
    fit(make_trainer, batches(5), TrainingGuard(0.0, window=2), callbacks=[tokens], log_every_n_steps=1)
    usage, perplexity = read_scalars("train/codebook_usage"), read_scalars("train/perplexity")
    assert list(usage) == list(perplexity) == [1, 2, 3, 4]
    for step, first in ((1, 0), (2, 0), (3, 2), (4, 2)):
        ids = torch.cat(tokens.seen[first : first + 2]).tolist()
        fractions = [ids.count(token) / len(ids) for token in set(ids)]
        assert usage[step] == pytest.approx(len(fractions) / 16)
        assert perplexity[step] == pytest.approx(exp(-sum(p * log(p) for p in fractions)), rel=1e-5)


def collapsed():
    module = make_module()
    with torch.no_grad():
        for parameter in module.network.encoder.parameters():
            parameter.zero_()
    return module


def test_collapse(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "discrete_lit")
    fit(make_trainer, batches(3), TrainingGuard(0.2, window=2), collapsed())
    assert len(texts(tmp_path)) == 1
    assert "of its 16 ids 6.2% were used in the training batches up to step 2, less than" in texts(tmp_path)[0]
    assert texts(tmp_path)[0] in caplog.text
    with pytest.raises(TrainingStopped, match="the codebook collapses"):
        fit(make_trainer, batches(3), TrainingGuard(0.2, window=2, on_collapse="stop"), collapsed())


def test_a_window_waits_for_enough_ids(make_trainer, read_scalars):
    """Of 64 ids a batch, one batch cannot show a codebook of 256: a window is 16 batches."""
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    module = VQVAE(network, 256, code_dim=4, optimizer=partial(torch.optim.SGD, lr=0.0))
    guard = TrainingGuard(1.0, window=1, on_collapse="stop")
    fit(make_trainer, batches(15), guard, module)
    with pytest.raises(TrainingStopped, match="up to step 16"):
        fit(make_trainer, batches(17), guard, module)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"min_codebook_usage of TrainingGuard must lie in \[0, 1\], got 2"):
        TrainingGuard(min_codebook_usage=2)
    with pytest.raises(ValueError, match="window and most_skipped"):
        TrainingGuard(window=0)
    with pytest.raises(ValueError, match="spike of TrainingGuard must be at least 0, got -1"):
        TrainingGuard(spike=-1)


def test_the_old_name_says_the_new_one():
    with pytest.warns(DeprecationWarning, match="TrainingAlarm is now called TrainingGuard"):
        old = callbacks.TrainingAlarm
    assert old is TrainingGuard
    with pytest.raises(AttributeError, match="no attribute 'TrainingGard'"):
        callbacks.TrainingGard  # noqa: B018 - asked for to fail


def test_a_step_that_gives_no_tokens_is_not_counted(make_trainer, read_scalars):
    module = make_module()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx)["loss"]
    _, trainer = fit(make_trainer, batches(3), TrainingGuard(1.0, window=1, on_collapse="stop"), module)
    assert trainer.global_step == 3 and "train/codebook_usage" not in trainer.callback_metrics
