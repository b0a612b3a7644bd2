"""Averaged weights: their formula, where they are used, and a resume that goes on exactly."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from discrete_lit import load
from discrete_lit.callbacks import ExponentialMovingAverage
from discrete_lit.checkpoints import instantiate
from discrete_lit.tokenizers import VQVAE
from discrete_lit.tokenizers.networks import ConvAutoencoder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Follow(Callback):
    """The weights and the loss of every step, and the weights in validation."""

    def __init__(self):
        self.raw, self.validated, self.losses = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(state(pl_module))
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append(state(pl_module))


class Count(Callback):
    """Moves an integer buffer before every batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.count += 7


def config():
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1, 2], "blocks": 1, "attention": False, "norm_groups": 2},
    }
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    settings = {"network": network, "codebook_size": 16, "code_dim": 4, "optimizer": optimizer}
    return {"class_path": "discrete_lit.tokenizers.VQVAE", "init_args": settings}


def averaged(raw, decay, warmup):
    """The definition; what is no floating-point number is the newest."""
    average = deepcopy(raw[0])
    for step, weights in enumerate(raw[1:], start=1):
        rate = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, value in weights.items():
            average[name] = average[name] * rate + value * (1 - rate) if value.is_floating_point() else value
    return average


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_of_weights_and_codebooks(tokenizer, make_loader, make_trainer, warmup):
    follow, decay = Follow(), 0.6
    tokenizer.register_buffer("count", torch.zeros((), dtype=torch.int64))
    callbacks = [ExponentialMovingAverage(decay, warmup), follow, Count()]
    trainer = make_trainer(max_steps=6, val_check_interval=3, limit_val_batches=1, callbacks=callbacks)
    trainer.fit(tokenizer, make_loader(6), make_loader(1))
    expected = averaged(follow.raw, decay, warmup)
    torch.testing.assert_close(state(tokenizer), expected)
    names = ("network.decoder", "quantizer")
    for part in names:  # the codebook is a buffer, and averaged as well
        moved = [name for name in expected if name.startswith(part) and expected[name].is_floating_point()]
        assert any(not torch.equal(expected[name], follow.raw[-1][name]) for name in moved), part
    # Validation saw the averages of its time, and training went on from the raw weights.
    torch.testing.assert_close(follow.validated[0], averaged(follow.raw[:3], decay, warmup))
    torch.testing.assert_close(follow.validated[1], expected)


def test_training_is_not_touched(make_loader, make_trainer):
    runs = []
    for callbacks in ([], [ExponentialMovingAverage(0.5)]):
        torch.manual_seed(0)
        follow = Follow()
        trainer = make_trainer(max_steps=4, val_check_interval=2, callbacks=[*callbacks, follow])
        trainer.fit(instantiate(config()), make_loader(4), make_loader(1))
        runs.append(follow.losses)
    assert runs[0] == runs[1]


def test_accumulated_batches_are_one_step(tokenizer, make_loader, make_trainer):
    follow = Follow()
    callbacks = [ExponentialMovingAverage(0.6, warmup=False), follow]
    make_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=callbacks).fit(tokenizer, make_loader(6))
    # A codebook moves at every batch, weights at every other one: the average is taken behind each step.
    torch.testing.assert_close(state(tokenizer), averaged(follow.raw[1::2], 0.6, warmup=False))


def test_a_killed_run_goes_on_exactly_and_its_checkpoint_holds_the_average(make_loader, make_trainer, tmp_path):
    def fit(steps, keeper, resume=None):
        torch.manual_seed(0)
        module, follow = instantiate(config()), Follow()
        callbacks = [ExponentialMovingAverage(0.6), follow, keeper]
        trainer = make_trainer(max_steps=steps, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=True)
        # Equal batches: a plain loader begins anew in the middle of an epoch.
        trainer.fit(module, DataLoader(list(make_loader(1)) * 6, batch_size=None), ckpt_path=resume)
        return follow, state(module)

    def keep(folder):
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")

    whole, end = fit(6, keep("whole"))
    saved = tmp_path / "whole" / "step=3.ckpt"
    torch.testing.assert_close(state(load(saved)), averaged(whole.raw[:3], 0.6, warmup=True))
    again, end_again = fit(6, keep("again"), resume=saved)
    assert again.losses == whole.losses[3:]
    for raw, expected in zip(again.raw, whole.raw[3:], strict=True):
        assert all(torch.equal(raw[name], value) for name, value in expected.items())
    assert all(torch.equal(end_again[name], value) for name, value in end.items())


def test_a_checkpoint_at_the_very_end_keeps_both(make_loader, make_trainer, tmp_path):
    class AtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    torch.manual_seed(0)
    module, follow = instantiate(config()), Follow()
    callbacks = [ExponentialMovingAverage(0.6), follow, AtTheEnd()]
    make_trainer(max_steps=3, limit_val_batches=0, callbacks=callbacks).fit(module, make_loader(3))
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    torch.testing.assert_close(dict(checkpoint["current_model_state"]), follow.raw[-1])
    torch.testing.assert_close(dict(checkpoint["state_dict"]), averaged(follow.raw, 0.6, warmup=True))


def test_an_error_in_validation_leaves_the_raw_weights(tokenizer, make_loader, make_trainer):
    class Break(Callback):
        def on_validation_batch_end(self, *arguments, **keywords):
            raise RuntimeError("broken")

    follow = Follow()
    callbacks = [ExponentialMovingAverage(0.6), follow, Break()]
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(max_steps=2, callbacks=callbacks).fit(tokenizer, make_loader(2), make_loader(1))
    torch.testing.assert_close(state(tokenizer), follow.raw[-1], rtol=0, atol=0)


def test_frozen_networks_are_not_copied(make_loader, make_trainer):
    from discrete_lit.tokenizers.losses import TimmFeatures

    loss = TimmFeatures("resnet18", "random", layers=[0], image_size=None)
    loss.prepare()
    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 2), blocks=1, attention=False, norm_groups=2)
    module = VQVAE(network, 16, code_dim=4, perceptual_loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    average = ExponentialMovingAverage(0.6)
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[average]).fit(module, make_loader(1))
    assert loss.network is not None and average.averages.keys() == module.state_dict().keys()
    assert not any("perceptual" in name for name in average.averages)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.0"):
        ExponentialMovingAverage(1.0)
    with pytest.raises(ValueError, match="must be true, false, 'inclusive' or 'every_other', got 'after'"):
        ExponentialMovingAverage(warmup="after")
    with pytest.raises(ValueError, match="every of ExponentialMovingAverage must be at least 1 step, got 0"):
        ExponentialMovingAverage(every=0)


def test_an_average_that_moves_every_third_step(tokenizer, make_loader, make_trainer):
    follow = Follow()
    callbacks = [ExponentialMovingAverage(0.6, warmup=False, every=3), follow]
    make_trainer(max_steps=7, callbacks=callbacks).fit(tokenizer, make_loader(7))
    torch.testing.assert_close(state(tokenizer), averaged(follow.raw[2::3], 0.6, warmup=False))


@pytest.mark.parametrize(
    ("warmup", "rates"), [("inclusive", [2 / 11, 3 / 12, 0.3, 0.3]), ("every_other", [0.1, 0.1, 2 / 11, 2 / 11])]
)
def test_other_counts_begin_with_the_weights_before_training(tokenizer, make_loader, make_trainer, warmup, rates):
    follow, average = Follow(), state(tokenizer)
    trainer = make_trainer(max_steps=4, callbacks=[ExponentialMovingAverage(0.3, warmup), follow])
    trainer.fit(tokenizer, make_loader(4))
    for rate, weights in zip(rates, follow.raw, strict=True):
        for name, value in weights.items():
            average[name] = average[name] * rate + value * (1 - rate) if value.is_floating_point() else value
    torch.testing.assert_close(state(tokenizer), average)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "does not support FSDPStrategy: shard by FSDP2Strategy"),
        (ModelParallelStrategy(), "of ModelParallelStrategy hold no averages: let trainer.strategy be FSDP2Strategy"),
    ],
)
def test_strategies_whose_checkpoints_would_lack_weights_are_refused(tokenizer, strategy, message):
    """The average of a part of the weights would be saved as that of all."""
    with pytest.raises(ValueError, match=message):
        ExponentialMovingAverage().setup(SimpleNamespace(strategy=strategy), tokenizer, "fit")


def test_a_validation_behind_the_training_is_of_the_averages(tokenizer, make_loader, make_trainer):
    follow = Follow()
    trainer = make_trainer(max_steps=3, limit_val_batches=1, callbacks=[ExponentialMovingAverage(0.6), follow])
    trainer.fit(tokenizer, make_loader(3), make_loader(1))
    expected, before = averaged(follow.raw, 0.6, warmup=True), len(follow.validated)
    trainer.validate(tokenizer, make_loader(1), verbose=False)
    assert len(follow.validated) == before + 1
    torch.testing.assert_close(follow.validated[-1], expected)
    torch.testing.assert_close(state(tokenizer), expected)


def test_a_second_training_begins_with_the_weights_of_its_module(tokenizer, make_loader, make_trainer):
    average = ExponentialMovingAverage(0.6)
    make_trainer(max_steps=2, limit_val_batches=0, callbacks=[average]).fit(tokenizer, make_loader(2))
    follow = Follow()
    make_trainer(max_steps=3, limit_val_batches=0, callbacks=[average, follow]).fit(tokenizer, make_loader(3))
    torch.testing.assert_close(state(tokenizer), averaged(follow.raw, 0.6, warmup=True))


class Tables(Callback):
    """Changes the shape of a saved buffer and of one that is not saved before every batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.saved = torch.full((1 + batch_idx // 2, 2), float(batch_idx))
        pl_module.unsaved = torch.full((batch_idx + 1,), float(batch_idx))


def test_buffers_whose_shape_changes(tokenizer, make_loader, make_trainer):
    tokenizer.register_buffer("saved", torch.zeros(7, 2))
    tokenizer.register_buffer("unsaved", torch.zeros(3), persistent=False)
    follow, validated = Follow(), []
    trainer = make_trainer(
        max_steps=5,
        val_check_interval=2,
        limit_val_batches=1,
        callbacks=[ExponentialMovingAverage(0.5, warmup=False), follow, Tables()],
    )
    tokenizer.on_validation_batch_start = lambda *_: validated.append((tokenizer.saved + 0, tokenizer.unsaved + 0))
    trainer.fit(tokenizer, make_loader(5), make_loader(1))
    expected = averaged([{k: v for k, v in raw.items() if k != "saved"} for raw in follow.raw], 0.5, warmup=False)
    found = state(tokenizer)
    # The mean since the shape is what it is: of batches 0 and 1, 2 and 3, and of 4 alone.
    torch.testing.assert_close(found.pop("saved"), torch.full((3, 2), 4.0))
    torch.testing.assert_close(found, expected)
    saved, unsaved = zip(*validated[-2:], strict=True)
    torch.testing.assert_close(saved, (torch.full((1, 2), 0.5), torch.full((2, 2), 2.5)))
    torch.testing.assert_close(unsaved, (torch.full((2,), 1.0), torch.full((4,), 3.0)))


def vit_config(positions: str):
    size = {"width": 16, "depth": 1, "heads": 2}
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ViTAutoencoder",
        "init_args": {"encoder": size, "decoder": size, "patch_size": 4, "positions": positions, "image_size": 8},
    }
    settings = {
        "network": network,
        "levels": [4, 3],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    return {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": settings}


@pytest.mark.parametrize("positions", ["sine_cosine", "learned"])
def test_transformers_over_patches(positions, make_loader, make_trainer, tmp_path):
    """Their tables are made for the grid that comes."""
    follow, tokenizer = Follow(), instantiate(vit_config(positions))
    trainer = make_trainer(
        max_steps=3,
        val_check_interval=2,
        limit_val_batches=1,
        callbacks=[ExponentialMovingAverage(0.5, warmup=False), follow],
    )
    trainer.fit(tokenizer, make_loader(3), make_loader(1))
    torch.testing.assert_close(state(tokenizer), averaged(follow.raw, 0.5, warmup=False))
    trainer.save_checkpoint(tmp_path / "t.ckpt")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(load(tmp_path / "t.ckpt").latents(images), tokenizer.eval().latents(images))


def test_averages_of_half_precision_are_float32(make_loader, make_trainer, tmp_path):
    """A move by a thousandth is below the last digit of bfloat16, and a validation in between rounds no average."""
    follow, tokenizer = Follow(), instantiate(config())
    ema = ExponentialMovingAverage(0.99, warmup=False)
    trainer = make_trainer(
        max_steps=8,
        precision="bf16-true",
        val_check_interval=3,
        limit_val_batches=1,
        callbacks=[ema, follow],
    )
    trainer.fit(tokenizer, make_loader(8), make_loader(1))
    expected = averaged([{k: widened(v) for k, v in raw.items()} for raw in follow.raw], 0.99, warmup=False)
    trainer.save_checkpoint(tmp_path / "t.ckpt")
    checkpoint = torch.load(tmp_path / "t.ckpt", weights_only=True)
    torch.testing.assert_close(checkpoint["state_dict"], expected, rtol=1e-5, atol=1e-7)
    assert checkpoint["state_dict"]["network.encoder.conv_in.weight"].dtype == torch.float32
    torch.testing.assert_close(checkpoint["current_model_state"], follow.raw[-1], rtol=0, atol=0, check_dtype=False)
    assert tokenizer.network.dtype == torch.bfloat16
    torch.testing.assert_close(tokenizer.state_dict(), expected, rtol=1e-2, atol=1e-3, check_dtype=False)


def widened(value):
    return value.float() if value.is_floating_point() else value


class Compiled(torch.nn.Module):
    """Stands for what `torch.compile` makes of a layer: its weights have a prefix."""

    def __init__(self, layer):
        super().__init__()
        self._orig_mod = layer

    def forward(self, x):
        return self._orig_mod(x)


def test_compiled_parts_keep_their_averages(tokenizer, make_loader, make_trainer):
    class Compile(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.network.encoder.conv_in = Compiled(pl_module.network.encoder.conv_in)

    follow = Follow()
    trainer = make_trainer(max_steps=3, callbacks=[ExponentialMovingAverage(0.5, warmup=False), follow, Compile()])
    trainer.fit(tokenizer, make_loader(3))
    assert "network.encoder.conv_in._orig_mod.weight" in tokenizer.state_dict()
    torch.testing.assert_close(state(tokenizer), averaged(follow.raw, 0.5, warmup=False))


def test_weights_that_come_late_are_refused(tokenizer, make_loader, make_trainer):
    class Late(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.late = torch.nn.Linear(1, 1)

    trainer = make_trainer(max_steps=1, callbacks=[ExponentialMovingAverage(), Late()])
    with pytest.raises(ValueError, match=r"late\.weight was not there when training began"):
        trainer.fit(tokenizer, make_loader(1))
