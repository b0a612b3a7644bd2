"""Gradient norms against plain ones."""

import pytest
import torch
from lightning import Callback

from discrete_lit.callbacks import GradientNorm


class PlainNorm(Callback):
    """The norm over all gradients as one vector, at every optimizer step."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))


def test_norms_before_clipping_on_the_loggers_schedule(generator, make_loader, make_trainer, read_scalars):
    plain = PlainNorm()
    trainer = make_trainer(
        max_steps=4,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
        callbacks=[plain, GradientNorm()],
    )
    trainer.fit(generator, make_loader(8))
    total = read_scalars("gradient_norm/total")
    assert list(total) == [1, 3]
    assert list(total.values()) == pytest.approx([plain.norms[1], plain.norms[3]], rel=1e-5)
    assert min(plain.norms) > 1e-2


def test_other_steps_cost_nothing(tokenizer, make_loader, make_trainer, monkeypatch):
    computed, compute = [], torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: computed.append(1) or compute(gradients))
    make_trainer(max_steps=6, log_every_n_steps=3, callbacks=[GradientNorm()]).fit(tokenizer, make_loader(6))
    encoder_and_decoder = 2
    assert len(computed) == 2 * encoder_and_decoder


def test_parts_add_up_to_the_total(generator, make_loader, make_trainer, read_scalars):
    make_trainer(max_steps=1, log_every_n_steps=1, callbacks=[GradientNorm()]).fit(generator, make_loader(1))
    names = {name for name, _ in generator.backbone.named_children()} - {"dropout"}
    parts = [read_scalars(f"gradient_norm/backbone.{name}")[0] for name in names]
    assert torch.tensor(parts).norm() == pytest.approx(read_scalars("gradient_norm/total")[0], rel=1e-5)


def test_a_tokenizer_is_split_below_its_network(tokenizer, make_loader, make_trainer, read_scalars):
    make_trainer(max_steps=1, log_every_n_steps=1, callbacks=[GradientNorm()]).fit(tokenizer, make_loader(1))
    parts = [read_scalars(f"gradient_norm/network.{half}")[0] for half in ("encoder", "decoder")]
    assert torch.tensor(parts).norm() == pytest.approx(read_scalars("gradient_norm/total")[0], rel=1e-5)
