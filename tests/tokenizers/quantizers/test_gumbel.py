"""Gumbel-softmax: deterministic ids, relaxed training, noise that belongs to a step and a row."""

import copy

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import GumbelQuantizer, gumbel


def test_evaluation_takes_the_largest_logit() -> None:
    quantizer = GumbelQuantizer(12, 3, latent_dim=5).eval()
    latents = torch.randn(2, 4, 6, 5)
    quantized = quantizer(latents)
    assert quantizer.latent_dim == 5 and quantizer.dim == 3
    assert torch.equal(quantized.tokens, quantizer.to_logits(latents).argmax(dim=-1))
    assert torch.equal(quantized.tokens, quantizer.encode(latents))
    assert torch.equal(quantized.z_q, quantizer.lookup(quantized.tokens)) and quantized.z_q.shape == (2, 4, 6, 3)
    assert torch.equal(quantizer(latents).z_q, quantized.z_q) and not quantizer.steps


@pytest.mark.parametrize("hard", [False, True])
def test_given_noise_is_the_formula(hard: bool) -> None:
    quantizer = GumbelQuantizer(7, 3, temperature=0.6, hard=hard)
    latents, noise = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 7)
    quantized = quantizer(latents, noise=noise)
    soft = ((quantizer.to_logits(latents) + noise) / 0.6).softmax(dim=-1)
    one_hot = F.one_hot(soft.argmax(dim=-1), 7).float()
    expected = (one_hot - soft.detach() + soft if hard else soft) @ quantizer.codes
    torch.testing.assert_close(quantized.z_q, expected)
    assert torch.equal(quantized.tokens, soft.argmax(dim=-1))
    leaves = (latents, quantizer.codes, quantizer.to_logits.weight)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((quantized.z_q * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
    )


def test_divergence_from_the_uniform_prior() -> None:
    quantizer = GumbelQuantizer(6, 3, kl_weight=0.5)
    latents = torch.randn(20, 3)
    q = quantizer.to_logits(latents).softmax(dim=1)
    expected = 0.5 * (q * (q * 6).log()).sum(dim=1).mean()
    torch.testing.assert_close(quantizer(latents).losses["kl"], expected)
    torch.nn.init.zeros_(quantizer.to_logits.weight)
    torch.nn.init.zeros_(quantizer.to_logits.bias)
    assert quantizer(latents).losses["kl"].item() == pytest.approx(0, abs=1e-6)


def test_drawn_ids_follow_the_softmax() -> None:
    quantizer = GumbelQuantizer(4, 2).train()
    torch.nn.init.zeros_(quantizer.to_logits.weight)
    quantizer.to_logits.bias.data.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    frequencies = quantizer(torch.zeros(20_000, 2)).tokens.bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.015)


def test_noise_belongs_to_the_step_and_the_seed_and_outlives_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.zeros(50, 2)
    first = GumbelQuantizer(30, 2).train()
    resumed = GumbelQuantizer(30, 2).train()
    drawn = [first(latents).tokens for _ in range(2)]
    assert not torch.equal(*drawn) and len(drawn[0].unique()) > 10
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.rand(5)
    assert torch.equal(resumed(latents).tokens, first(latents).tokens)
    again, other = GumbelQuantizer(30, 2).train(), GumbelQuantizer(30, 2, seed=1).train()
    for quantizer in (again, other):
        quantizer.load_state_dict({**first.state_dict(), "steps": torch.tensor(0)})
    monkeypatch.setattr(gumbel, "_DRAWN_AT_ONCE", 70)
    once_more = again(latents).tokens
    again.load_state_dict({**first.state_dict(), "steps": torch.tensor(0)})
    monkeypatch.undo()
    assert torch.equal(once_more, again(latents).tokens)
    assert not torch.equal(other(latents).tokens, once_more)


def test_rows_of_a_rank_draw_as_in_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = GumbelQuantizer(30, 2).train()
    whole = quantizer(torch.zeros(40, 2)).tokens
    for rank in (0, 1):
        quantizer.steps.zero_()
        monkeypatch.setattr(gumbel, "rank", lambda rank=rank: rank)
        assert torch.equal(quantizer(torch.zeros(20, 2)).tokens, whole[20 * rank : 20 * (rank + 1)])


def test_a_low_temperature_sharpens_the_mixture() -> None:
    quantizer = GumbelQuantizer(8, 2).train()
    latents, noise = torch.randn(100, 2), torch.randn(100, 8)
    distances = []
    for quantizer.temperature in (2.0, 0.5, 0.01):
        quantized = quantizer(latents, noise=noise)
        distances.append(F.mse_loss(quantized.z_q, quantizer.lookup(quantized.tokens)).item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.01


def test_autocast_does_not_change_ids() -> None:
    quantizer = GumbelQuantizer(512, 8).eval()
    latents = torch.randn(500, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized, ids = quantizer(latents), quantizer.encode(latents)
    assert torch.equal(quantized.tokens, quantizer(latents).tokens) and torch.equal(ids, quantized.tokens)
    assert quantized.z_q.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0}, "must be positive, got 0, 4 and None"),
        ({"latent_dim": 0}, "must be positive, got 8, 4 and 0"),
        ({"kl_weight": -1.0}, "kl_weight must be >= 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GumbelQuantizer(**{"codebook_size": 8, "dim": 4, **arguments})


def test_noise_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape of the logits, \(3, 8\), got \(3, 4\)"):
        GumbelQuantizer(8, 4)(torch.randn(3, 4), noise=torch.randn(3, 4))
