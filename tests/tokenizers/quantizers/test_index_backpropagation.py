"""IBQ: the largest dot product, and a gradient for every code."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.tokenizers import LFQ
from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.quantizers import IndexBackpropagationQuantizer, LookupFreeQuantizer, entropy


def trained(**settings: float | str) -> IndexBackpropagationQuantizer:
    quantizer = IndexBackpropagationQuantizer(40, 4, **settings)  # type: ignore[arg-type]
    torch.nn.init.normal_(quantizer.codes)
    return quantizer


def test_values_and_gradients_are_the_formulas() -> None:
    """Everything written out densely, as in the paper's code."""
    quantizer = trained(
        codebook_weight=0.3,
        entropy_weight=0.2,
        entropy_temperature=0.7,
        batch_entropy_weight=1.5,
        entropy_log_offset=1e-3,
    )
    latents = torch.randn(3, 5, 2, 4, requires_grad=True)
    codes = quantizer.codes
    rows = latents.reshape(-1, 4)
    soft = (rows @ codes.T).softmax(dim=1)
    hard = F.one_hot(soft.argmax(dim=1), 40).float()
    carried, bare = (hard - soft.detach() + soft) @ codes, hard @ codes
    sharp = (rows @ codes.T / 0.7).softmax(dim=1)
    mean = sharp.mean(dim=0)
    expected = {
        "quantization": (carried - rows).square().mean(),
        "commitment": (bare.detach() - rows).square().mean(),
        "codebook": 0.3 * (bare - rows.detach()).square().mean(),
        "sample_entropy": -0.2 * (sharp * sharp.log()).sum(dim=1).mean(),
        "batch_entropy": 1.5 * 0.2 * (mean * (mean + 1e-3).log()).sum(),
    }
    quantized = quantizer(latents)
    torch.testing.assert_close(quantized.losses, expected)
    torch.testing.assert_close(quantized.z_q.reshape(-1, 4), carried)
    assert torch.equal(quantized.tokens.flatten(), soft.argmax(dim=1))
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)
    weights = torch.randn_like(carried)
    for name, (mine, theirs) in {
        "codes": ((quantized.z_q.reshape(-1, 4) * weights).sum(), (carried * weights).sum()),
        **{name: (quantized.losses[name], expected[name]) for name in expected},
    }.items():
        found = torch.autograd.grad(mine, (latents, codes), retain_graph=True, allow_unused=True)
        wanted = torch.autograd.grad(theirs, (latents, codes), retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)
    (gradient,) = torch.autograd.grad(quantized.z_q.sum(), codes)
    assert (gradient.abs().amax(dim=1) > 0).all()  # of codes without latents too


def test_the_largest_dot_product_is_not_the_nearest() -> None:
    quantizer = IndexBackpropagationQuantizer(2, 2)
    quantizer.codes.data.copy_(torch.tensor([[1.0, 0.0], [9.0, 0.0]]))
    assert quantizer.encode(torch.tensor([[1.0, 0.0]])).tolist() == [1]


def test_no_entropy_terms_without_weight() -> None:
    assert set(trained(entropy_weight=0.0)(torch.randn(5, 4)).losses) == {"quantization", "commitment", "codebook"}


def test_autocast_does_not_change_ids() -> None:
    quantizer = trained()
    latents = torch.randn(500, 4)
    expected = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, expected.tokens) and torch.equal(quantizer.encode(latents), expected.tokens)
    torch.testing.assert_close(quantized.losses, expected.losses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "must be positive, got 8 and 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature must be above 0, got 0.0"),
        ({"codebook_weight": -1.0}, "must be >= 0, got codebook_weight=-1.0"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexBackpropagationQuantizer(**{"codebook_size": 8, "dim": 4, **arguments})


def test_first_codes() -> None:
    """Uniform in [-1 / K, 1 / K], or normal as the published ones began."""
    uniform = IndexBackpropagationQuantizer(500, 16).codes
    assert uniform.abs().max() <= 1 / 500 and uniform.std().item() == pytest.approx(1 / 500 / 3**0.5, rel=0.05)
    normal = IndexBackpropagationQuantizer(500, 16, codebook_init="normal").codes
    assert normal.std().item() == pytest.approx(1, rel=0.05) and abs(normal.mean().item()) < 0.05
    with pytest.raises(ValueError, match="codebook_init must be 'uniform' or 'normal', got 'data'"):
        IndexBackpropagationQuantizer(4, 2, codebook_init="data")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [lambda **settings: trained(**settings), lambda **settings: lookup_free(**settings)])
def test_whose_batch_entropy(make, monkeypatch) -> None:
    """The setting reaches the entropy: where a joint one meets twice the ranks, an own one does not."""
    latents = torch.randn(2, 3, 4)
    own = make(entropy_across_ranks=False)
    joint = deepcopy(own)
    joint.entropy_across_ranks = True
    assert own(latents).losses["batch_entropy"] == joint(latents).losses["batch_entropy"]
    monkeypatch.setattr(entropy, "mean_over_ranks", lambda value: value / 2 if value.ndim else value)
    expected = {name: value.detach() for name, value in own(latents).losses.items()}
    assert joint(latents).losses["batch_entropy"] != expected["batch_entropy"]
    monkeypatch.undo()
    torch.testing.assert_close({name: value.detach() for name, value in own(latents).losses.items()}, expected)


def lookup_free(**settings: bool) -> LookupFreeQuantizer:
    return LFQ(
        lambda code_dim, latent_dim: ConvAutoencoder(code_dim, channels=4, norm_groups=2), 4, **settings
    ).quantizer
