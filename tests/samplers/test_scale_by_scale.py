"""Next-scale sampling follows its exact law, scale by scale, and costs one pass a scale."""

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.random_weights import randomise
from torch._subclasses.fake_tensor import FakeTensorMode

from discrete_lit.backbones import ScaleLayout, ScaleTransformer, SequenceLayout, TokenDiffusionHead
from discrete_lit.backbones.execution import outline
from discrete_lit.core.random import CounterRandom
from discrete_lit.core.synchronisation import Checks, HostWaits, has_data
from discrete_lit.diffusion.solvers import DDPM
from discrete_lit.generators.hybrid_next_scale import HybridPyramid
from discrete_lit.samplers import HybridScaleSampler, NextScaleSampler
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer


@pytest.fixture
def model(make_layout_backbone, make_quantizer):
    """A backbone over 3 ids at scales 1 and 2, and its quantizer."""
    layout = SequenceLayout(3, (5,), num_classes=2, attention="block_causal", scales=(1, 4), input_dim=3)
    switches = {"conditioning": "prefix_adaln", "qk_norm": "unit", "attention_bias": "query_value"}
    return make_layout_backbone(layout, 0.4, **switches), make_quantizer(3)


@torch.no_grad()
def draw(model, sampler: NextScaleSampler, label: int, count: int, **arguments):
    backbone, quantizer = model
    random = CounterRandom(3, torch.arange(count))
    return sampler(backbone, torch.full((count,), label), random, quantizer=quantizer, **arguments)


@torch.no_grad()
def log_law(model, label: int, scales: list[float], top_k: int | None = None, top_p: float | None = None):
    """`(243,)`: both scales' factors from one pass over the whole teacher-forced input, without a cache."""
    backbone, quantizer = model
    sequences = all_sequences(3, 5)
    inputs = quantizer.teacher_forcing(sequences)
    p, q = (backbone(inputs, torch.full((243,), given)).double().log_softmax(dim=-1) for given in (label, 2))
    scale = torch.tensor([scales[0], *[scales[1]] * 4], dtype=torch.float64)[:, None]
    logits = filter_logits(q + scale * (p - q), top_k, top_p)
    return logits.log_softmax(dim=-1).gather(-1, sequences[..., None]).sum(dim=(1, 2))


@pytest.mark.parametrize("label", [0, 1])
def test_law_over_all_243_sequences(model, label: int) -> None:
    numbers = sequence_numbers(draw(model, NextScaleSampler(), label, 12_000).tokens, 3)
    law = log_law(model, label, [1.0, 1.0]).exp()
    assert float(law.sum()) == pytest.approx(1)
    assert chi_square_p_value(numbers, law) > 1e-3
    assert chi_square_p_value(numbers, log_law(model, 1 - label, [1.0, 1.0]).exp()) < 1e-6


def test_law_with_guidance_and_filters(model) -> None:
    """The first scale is not guided, the last one with the whole scale; top-k, then top-p."""
    sampler = NextScaleSampler(guidance_scale=2.5, top_k=2, top_p=0.9)
    numbers = sequence_numbers(draw(model, sampler, 1, 12_000).tokens, 3)
    assert chi_square_p_value(numbers, log_law(model, 1, [1.0, 2.5], 2, 0.9).exp()) > 1e-3


def test_a_given_first_scale_is_conditioned_on(model) -> None:
    known = torch.tensor([2, -1, -1, -1, -1]).expand(12_000, -1)
    tokens = draw(model, NextScaleSampler(), 0, 12_000, known=known).tokens
    law = log_law(model, 0, [1.0, 1.0]).exp() * (all_sequences(3, 5)[:, 0] == 2)
    assert chi_square_p_value(sequence_numbers(tokens, 3), law / law.sum()) > 1e-3


def test_greedy_over_three_scales_agrees_with_teacher_forcing(make_layout_backbone) -> None:
    """Every scale's input is the sum of what all scales before it contribute."""
    quantizer = randomise(MultiScaleResidualQuantizer(7, 3, scales=(1, 2, 3)), 0.8).eval()
    layout = SequenceLayout(7, (14,), num_classes=2, attention="block_causal", scales=(1, 4, 9), input_dim=3)
    backbone = make_layout_backbone(layout, 0.6, conditioning="adaln")
    tokens = draw((backbone, quantizer), NextScaleSampler(top_k=1), 1, 1).tokens
    with torch.no_grad():
        logits = backbone(quantizer.teacher_forcing(tokens), torch.ones(1, dtype=torch.int64))
    assert torch.equal(tokens, logits.argmax(dim=-1))


@pytest.mark.parametrize(
    ("settings", "rows", "calls"),
    [
        ({}, [4, 4], 2),
        ({"guidance_scale": 2.0}, [8, 8], 4),  # the null rows' keys are needed from the first scale on
        ({"guidance_scale": 2.0, "guidance_schedule": "constant", "guidance_interval": (0, 1)}, [8, 4], 3),
    ],
)
def test_what_it_runs(model, settings: dict, rows: list[int], calls: int) -> None:
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    output = draw(model, NextScaleSampler(**settings), 0, 4)
    assert seen == [(rows[0], 0, 3), (rows[1], 4, 3)]
    assert (output.network_calls, output.sequential_passes) == (calls, 2)


def test_quantizers_that_do_not_fit(model, make_quantizer) -> None:
    backbone, _ = model
    with pytest.raises(ValueError, match="give quantizer"):
        draw((backbone, None), NextScaleSampler(), 0, 1)
    with pytest.raises(
        ValueError, match=r"of another tokenizer: .* \(\(1, 4\), 3, 4\), the generator's \(\(1, 4\), 3, 3"
    ):
        draw((backbone, make_quantizer(4)), NextScaleSampler(), 0, 1)


# --- Ids with residuals; its law is tested with its generator ---


@pytest.fixture
def hybrid():
    """A network over 7 ids at scales 1, 2 and 3, a head, and the quantizer."""
    quantizer = randomise(MultiScaleResidualQuantizer(7, 3, scales=(1, 2, 3)), 0.8).eval()
    layout = ScaleLayout(dim=3, sizes=tuple(quantizer.sizes), num_classes=2, vocab_size=7)
    network = randomise(ScaleTransformer(layout, width=16, depth=1, heads=2, mlp_hidden=16), 0.4)
    return network.eval(), TokenDiffusionHead(3, 16, width=16, depth=1, solver=DDPM(2)).eval(), quantizer


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "top_k": 5, "top_p": 0.9, "last_steps": 3}])
def test_a_draw_with_residuals_waits_once(hybrid, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; of the head's solver, whose times are computed on the host, the noise alone is drawn here."""
    asked: list[int] = []
    monkeypatch.setattr(Checks, "raise_noted", lambda self, flags=None: asked.append(len(self._noted)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, head, quantizer = (outline(module, device="cuda") for module in hybrid)
        head.sample = lambda z, start, *, noise, **_: start + noise(0)
        labels, indices = torch.zeros(5, dtype=torch.int64, device="cuda"), torch.arange(5, device="cuda")
        sampler, random = HybridScaleSampler(**settings), CounterRandom(0, indices)
        with HostWaits() as mode:
            drawn = sampler(network, head, labels, random, pyramid=HybridPyramid(quantizer))
    assert drawn.latents.device.type == "cuda" and not has_data(drawn.latents)
    assert mode.seen == [] and sum(number > 0 for number in asked) == 1


def test_bad_settings_of_draws_with_residuals(hybrid) -> None:
    network, head, quantizer = hybrid
    random, labels = CounterRandom(0, torch.arange(2)), torch.zeros(2, dtype=torch.int64)

    def draw_with(**settings) -> None:
        HybridScaleSampler(**settings)(network, head, labels, random, pyramid=HybridPyramid(quantizer))

    for settings, message in (
        ({"temperature": 0}, "temperature must be > 0"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"top_k": [3, 0, 3]}, "top_k at least 1"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\]"),
        ({"last_steps": 0}, "last_steps must be at least 1"),
        ({"last_steps": 10}, "last_steps=10 exceeds the 9 places of the last scale"),
        ({"top_k": [3, 3]}, "top_k has 2 numbers for 3 scales"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_with(**settings)
