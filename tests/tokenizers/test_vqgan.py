"""Adversarial training inside the Trainer: steps, groups, accumulation, clipping, checkpoints, resume."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from discrete_lit import load
from discrete_lit.callbacks import ExponentialMovingAverage, GradientNorm
from discrete_lit.checkpoints import instantiate
from discrete_lit.optimization import WarmupCosine
from discrete_lit.tokenizers import VQGAN
from discrete_lit.tokenizers.losses import AdversarialLoss
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
NETWORK = {"channels": 4, "multipliers": [1, 2], "blocks": 1, "attention": False, "norm_groups": 2}


SGD = partial(torch.optim.SGD, lr=0.1)


def make(optimizer=SGD, scheduler=None, **adversarial):
    torch.manual_seed(0)
    loss = AdversarialLoss(PatchGAN(width=4, layers=1), **{"weight": 0.5, **adversarial})
    network = partial(ConvAutoencoder, **NETWORK)
    return VQGAN(
        network, FiniteScalarQuantizer([5, 5]), adversarial_loss=loss, optimizer=optimizer, scheduler=scheduler
    )


def loader(count=6, equal=False):
    random = torch.Generator().manual_seed(0)
    made = [torch.rand(4, 3, 8, 8, generator=random) * 2 - 1 for _ in range(count)]
    images = [made[0]] * count if equal else made
    return DataLoader([{"image": batch, "label": torch.zeros(4)} for batch in images], batch_size=None)


def trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "max_epochs": 1}
    return Trainer(**(quiet | settings))


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Follow(Callback):
    """Gradients behind each backward pass, weights and loss behind each batch."""

    def __init__(self):
        self.backward, self.weights, self.losses = [], [], []

    def on_after_backward(self, trainer, pl_module):
        self.backward.append(deepcopy({name: value.grad for name, value in pl_module.named_parameters()}))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(state(pl_module))
        self.losses.append(float(outputs["loss"]))


def norms(gradients):
    """Of the autoencoder and of the discriminator."""
    parts = ([], [])
    for name, gradient in gradients.items():
        parts[name.startswith("objective.")].append(gradient.flatten())
    return tuple(float(torch.cat(part).norm()) for part in parts)


def test_a_batch_is_a_step():
    module = make(scheduler=partial(WarmupCosine, warmup_steps=2, total_steps=10))
    run = trainer(max_epochs=-1, max_steps=6)
    run.fit(module, loader())
    assert run.global_step == 6
    (scheduler,) = (config.scheduler for config in run.lr_scheduler_configs)
    assert scheduler.last_epoch == 6
    assert len(run.optimizers) == 1


def test_accumulated_batches_have_the_mean_of_their_gradients():
    follow, single = Follow(), Follow()
    run = trainer(accumulate_grad_batches=2, callbacks=[follow])
    run.fit(make(adaptive=False), loader(2))
    module = make(adaptive=False, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(callbacks=[single]).fit(module, loader(2))
    assert run.global_step == 1
    expected = {name: (single.backward[0][name] + single.backward[1][name]) / 2 for name in single.backward[0]}
    torch.testing.assert_close(follow.backward[1], expected)
    assert all(norm > 0 for norm in norms(expected))


def test_the_start_counts_optimizer_steps():
    module = make(start_step=2, adaptive=False)
    trainer(accumulate_grad_batches=2, callbacks=[follow := Follow()]).fit(module, loader(6))
    of_discriminator = [norms(gradients)[1] > 0 for gradients in follow.backward[::2]]
    assert of_discriminator == [False, False, True]


def test_clipping_acts_on_each_network_alone():
    """A discriminator with a large gradient does not shrink the autoencoder's step."""
    limit = 1e-3
    trainer(gradient_clip_val=limit, callbacks=[follow := Follow()]).fit(module := make(), loader(1))
    before, after = follow.backward[0], {name: value.grad for name, value in module.named_parameters()}
    assert norms(after) == pytest.approx((limit, limit), rel=1e-3)
    for place in (0, 1):
        assert norms(before)[place] > 2 * limit
        factor = norms(after)[place] / norms(before)[place]
        for name, gradient in before.items():
            if name.startswith("objective.") == bool(place):
                torch.testing.assert_close(after[name], gradient * factor, rtol=1e-3, atol=1e-8)


def test_clipping_by_value():
    run = trainer(gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    run.fit(module := make(), loader(1))
    for part in (module.network, module.objective):
        largest = max(float(parameter.grad.abs().max()) for parameter in part.parameters())
        assert largest == pytest.approx(1e-4)


def test_before_its_start_a_discriminator_has_no_update_of_any_kind():
    """No decay, no momentum, no step of Adam: its first step is a first step."""
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    module = make(optimizer, start_step=3)
    before = state(module.objective)
    follow = Follow()
    run = trainer(callbacks=[follow])
    run.fit(module, loader(5))
    for step in (0, 1, 2):
        for name, value in before.items():
            assert torch.equal(follow.weights[step][f"objective.{name}"], value)
    assert not torch.equal(
        follow.weights[3]["objective.adversarial.discriminator.main.0.weight"],
        before["adversarial.discriminator.main.0.weight"],
    )
    steps = {name: int(run.optimizers[0].state[value]["step"]) for name, value in module.named_parameters()}
    assert {steps[name] for name in steps if name.startswith("objective.")} == {2}
    assert {steps[name] for name in steps if not name.startswith("objective.")} == {5}


def test_idle_steps_that_count():
    """As in taming: Adam counts steps with gradients of 0, and begins without its correction of the first moments."""
    module = make(partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.9)), start_step=30, idle_steps="counted")
    name = "objective.adversarial.discriminator.main.0.weight"
    before, follow = module.state_dict()[name].clone(), Follow()
    run = trainer(callbacks=[follow], max_epochs=-1, max_steps=31)
    run.fit(module, loader(31))
    assert torch.equal(follow.weights[29][name], before)
    moved, gradient = follow.weights[30][name] - before, follow.backward[30][name]
    ratio = 0.5 / (1 - 0.5**31) / (0.1 / (1 - 0.9**31)) ** 0.5
    torch.testing.assert_close(moved, -0.01 * ratio * gradient.sign(), rtol=1e-3, atol=1e-5)
    assert ratio > 1.5  # where a first step of Adam has 1
    with pytest.raises(ValueError, match="idle_steps of the adversarial loss must be 'skipped' or 'counted', got 'no'"):
        make(idle_steps="no")


def test_parameter_groups():
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    scheduler = partial(WarmupCosine, warmup_steps=2, total_steps=10)
    module = make(optimizer, scheduler, learning_rate_factor=0.25)
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates, decays = [group["lr"] for group in groups], [group["weight_decay"] for group in groups]
    assert rates == pytest.approx([0.005, 0.005, 0.00125, 0.00125])  # halved by the first step of the warm-up
    assert decays == [0.5, 0, 0.5, 0]
    found = [{id(parameter) for parameter in group["params"]} for group in groups]
    discriminator = set(map(id, module.objective.parameters()))
    assert (
        found[2] | found[3] == discriminator
        and found[0] | found[1] == set(map(id, module.parameters())) - discriminator
    )
    convolutions = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Conv2d)}
    assert found[0] | found[2] == convolutions


def config(tmp_path, **adversarial):
    prefix = "discrete_lit.tokenizers"
    discriminator = {"class_path": f"{prefix}.losses.discriminators.PatchGAN", "init_args": {"width": 4, "layers": 1}}
    perceptual = {"model_name": "resnet18", "weights_path": str(tmp_path / "resnet18.pth"), "layers": [0]}
    settings = {
        "network": {"class_path": f"{prefix}.networks.ConvAutoencoder", "init_args": NETWORK},
        "quantizer": {
            "class_path": f"{prefix}.quantizers.VectorQuantizer",
            "init_args": {"codebook_size": 16, "dim": 4},
        },
        "reconstruction_loss": {"l1": 0.2, "l2": 1.0},
        "perceptual_loss": {
            "class_path": f"{prefix}.losses.TimmFeatures",
            "init_args": {**perceptual, "image_size": None},
        },
        "adversarial_loss": {
            "class_path": f"{prefix}.losses.AdversarialLoss",
            "init_args": {"discriminator": discriminator, "lecam_weight": 0.1, "r1_weight": 1.0, "r1_every": 2}
            | adversarial,
        },
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01, "betas": [0.5, 0.9]}},
    }
    return {"class_path": "VQGAN", "init_args": settings}


def write_weights(tmp_path):
    from timm.models import create_model

    torch.manual_seed(1)
    torch.save(create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")


def test_a_resume_goes_on_exactly_and_loading_needs_no_frozen_weights(tmp_path):
    write_weights(tmp_path)

    def fit(folder, resume=None):
        torch.manual_seed(0)
        module, follow = instantiate(config(tmp_path)), Follow()
        keeper = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [ExponentialMovingAverage(0.6), follow, keeper]
        # Equal batches: a plain loader begins anew in the middle of an epoch.
        trainer(enable_checkpointing=True, callbacks=callbacks).fit(module, loader(6, equal=True), ckpt_path=resume)
        return follow, state(module)

    whole, end = fit("whole")
    saved = tmp_path / "whole" / "step=3.ckpt"
    again, end_again = fit("again", saved)
    assert again.losses == whole.losses[3:]
    for weights, expected in zip(again.weights, whole.weights[3:], strict=True):
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert all(torch.equal(end_again[name], value) for name, value in end.items())
    assert float(whole.weights[2]["objective.adversarial.lecam.real_mean"]) != 0

    checkpoint = torch.load(saved, weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "perceptual" in name]
    (tmp_path / "resnet18.pth").unlink()
    loaded = load(saved)
    tokens = loaded.encode(torch.zeros(1, 3, 8, 8))
    assert loaded.decode(tokens).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"perceptual_loss.weights_path=.*resnet18.pth': there is no such file"):
        trainer().fit(loaded, loader(1))


def test_what_is_logged(tmp_path):
    write_weights(tmp_path)
    run = trainer(callbacks=[GradientNorm()], log_every_n_steps=1)
    run.fit(instantiate(config(tmp_path)), loader(1), loader(1))
    terms = {"loss", "reconstruction_l1", "reconstruction_l2", "perceptual", "commitment"}
    adversarial = {"generator", "discriminator", "lecam", "r1", "generator_weight"}
    adversarial |= {"discriminator_real", "discriminator_fake"}
    assert {f"train/{name}" for name in terms | adversarial} <= run.callback_metrics.keys()
    assert {f"validation/{name}" for name in terms} <= run.callback_metrics.keys()
    assert not {f"validation/{name}" for name in adversarial} & run.callback_metrics.keys()
    assert {"gradient_norm/network", "gradient_norm/objective"} <= run.callback_metrics.keys()
    parts = terms - {"loss"} | {"generator", "discriminator", "lecam", "r1"}
    total = sum(run.callback_metrics[f"train/{name}"] for name in parts)
    torch.testing.assert_close(run.callback_metrics["train/loss"], total)


def test_the_fingerprint_is_of_what_codes():
    module = make(lecam_weight=1.0)
    before = module.fingerprint()
    for value in module.objective.state_dict().values():
        value.add_(1)
    assert module.fingerprint() == before
    with torch.no_grad():
        next(module.network.parameters()).add_(1)
    assert module.fingerprint() != before


def test_images_that_are_no_numbers_are_named():
    images = torch.zeros(4, 3, 8, 8)
    images[1, 0, 2, 2], images[3, 2, 0, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"2 of 4 images have pixels that are not finite numbers; .*batch: 1, 3"):
        make().encode(images)


def test_mixed_precision():
    module = make()
    trainer(precision="bf16-mixed", callbacks=[follow := Follow()]).fit(module, loader(3))
    assert all(value.isfinite().all() for value in follow.weights[-1].values())
    assert all(norm > 0 for norm in norms(follow.backward[-1]))
