"""Every tokenizer, generator and sampler in half precision, in float64 and under autocast; a table says how close.

The table's numbers are bounds: about four times what was found on one processor, with random weights, whose activations
are larger than those of trained ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.precision_cases import GENERATORS, SAMPLERS, SIDE, TOKENIZERS, make_generator, make_sampled, make_tokenizer
from torch import Tensor, nn

import discrete_lit.generators
import discrete_lit.samplers
import discrete_lit.tokenizers
from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.embeddings import rotary_table
from discrete_lit.core.modules import widened
from discrete_lit.tokenizers import PixelLevels

DTYPES = (torch.float16, torch.bfloat16, torch.float64)
WITHOUT_IMAGES = ("Characters", "TokenGrid")
LABELS = torch.arange(6) % 3
STEP = 1e-8

# In float16, bfloat16, float64: the share of ids that differ (of KLVAE the largest difference of a latent), the largest
# difference of a pixel of the same ids, in [-1, 1], and the difference of the training loss relative to its terms.
Row = tuple[float, float, float]
TOKENIZER_TABLE: dict[str, tuple[Row, Row, Row]] = {
    "VQVAE": ((0.02, 0.2, 0.02), (0.03, 0.3, 2e-05), (1e-03, 0.01, 2e-05)),
    "VQVAE on the sphere, ViT": ((0.02, 0.05, 0.02), (0.03, 0.3, 2e-05), (1e-03, 0.01, 2e-05)),
    "VQGAN": ((0.02, 0.05, 0.02), (0.2, 0.6, 4e-05), (0.02, 0.02, 2e-05)),
    "VQGAN with SimVQ": ((0.02, 0.05, 0.02), (0.06, 0.5, 2e-05), (1e-03, 0.01, 2e-05)),
    "VQGAN with IBQ": ((0.02, 0.05, 0.02), (0.09, 0.6, 3e-05), (3e-03, 0.01, 2e-05)),
    "VQGAN with Gumbel-softmax": ((0.02, 0.07, 0.02), (0.08, 0.5, 3e-05), (6e-03, 0.01, 2e-05)),
    "VQGAN with BSQ": ((0.04, 0.1, 0.02), (0.04, 0.4, 3e-05), (4e-03, 0.04, 2e-05)),
    "RQVAE": ((0.02, 0.2, 0.02), (0.04, 0.3, 2e-05), (1e-03, 0.01, 2e-05)),
    "MultiScaleVQ": ((0.02, 0.06, 0.02), (0.05, 0.4, 2e-05), (2e-03, 0.02, 2e-05)),
    "HybridVQ": ((0.02, 0.06, 0.02), (0.05, 0.4, 2e-05), (2e-03, 0.02, 2e-05)),
    "LFQ": ((0.04, 0.1, 0.02), (0.04, 0.4, 2e-05), (0.03, 0.02, 2e-05)),
    "FSQ": ((0.02, 0.2, 0.02), (0.04, 0.4, 2e-05), (1e-03, 0.05, 2e-05)),
    "DVAE": ((0.02, 0.05, 0.02), (0.03, 0.2, 2e-05), (4e-03, 0.01, 2e-05)),
    "TiTok": ((0.02, 0.05, 0.02), (0.09, 1, 3e-05), (1e-03, 0.01, 2e-05)),
    "PixelLevels": ((0.05, 0.4, 0.02), (2e-03, 0.02, 2e-05), (1e-03, 0.01, 2e-05)),
    "PixelLevels, grey": ((0.02, 0.05, 0.02), (2e-03, 0.02, 2e-05), (1e-03, 0.01, 2e-05)),
    "ColourPalette": ((0.02, 0.05, 0.02), (2e-03, 0.02, 2e-05), (1e-03, 0.01, 2e-05)),
    "KLVAE": ((0.05, 0.3, 0.02), (0.06, 0.4, 3e-05), (1e-03, 0.01, 2e-05)),
    "DimensionwiseTokenizer": ((0.02, 0.1, 0.02), (0.05, 0.4, 3e-05), (1e-03, 0.01, 2e-05)),
}
# The largest difference of the log-likelihood, in nats a token, and the relative difference of the training loss.
GENERATOR_TABLE: dict[str, tuple[Row, Row]] = {
    "Autoregressive": ((2e-03, 0.02, 2e-06), (1e-03, 0.01, 2e-05)),
    "Autoregressive, LlamaGen": ((3e-03, 0.02, 2e-06), (1e-03, 0.01, 2e-05)),
    "Autoregressive, RAR": ((3e-03, 0.04, 2e-06), (1e-03, 0.01, 2e-05)),
    "Autoregressive, Open-MAGVIT2": ((2e-03, 8e-03, 2e-06), (1e-03, 0.01, 2e-05)),
    "Autoregressive, BAR": ((1e-03, 9e-03, 2e-06), (1e-03, 0.01, 2e-05)),
    "Autoregressive, RandAR": ((9e-03, 0.05, 2e-06), (3e-03, 0.01, 2e-05)),
    "Autoregressive, BitDance": ((0.01, 0.08, 2e-05), (1e-03, 0.01, 2e-05)),
    "Autoregressive, BitDance in blocks": ((0.02, 0.08, 2e-05), (1e-03, 0.01, 2e-05)),
    "Masked": ((3e-03, 0.02, 2e-06), (1e-03, 0.01, 2e-05)),
    "Masked, BERT": ((1e-03, 8e-03, 2e-06), (1e-03, 0.01, 2e-05)),
    "Masked, MaskBit": ((3e-03, 8e-03, 2e-06), (1e-03, 0.01, 2e-05)),
    "Masked, Halton-MaskGIT": ((2e-03, 0.01, 2e-06), (1e-03, 0.01, 2e-05)),
    "NextScale": ((1e-03, 6e-03, 2e-06), (1e-03, 0.01, 2e-05)),
    "DiscreteDiffusion": ((9e-03, 0.05, 5e-05), (1e-03, 0.01, 2e-05)),
    "DiscreteDiffusion, SEDD": ((4e-03, 0.04, 2e-06), (3e-03, 0.2, 2e-05)),
    "DiscreteDiffusion, uniform": ((8e-03, 0.1, 3e-05), (2e-03, 0.03, 2e-05)),
    "DiscreteDiffusion, hybrid": ((5e-03, 0.04, 4e-05), (2e-03, 0.01, 2e-05)),
    "DiscreteDiffusion, Gaussian": ((0.02, 0.07, 6e-05), (1e-03, 0.01, 2e-05)),
}
# The share of ids that differ, of 384 and more drawn by the same random numbers.
SAMPLER_TABLE: dict[str, Row] = {
    "RasterSampler": (0.02, 0.2, 0.02),
    "BARSampler": (0.02, 0.05, 0.02),
    "RandARSampler": (0.02, 0.2, 0.02),
    "BinaryFlowSampler": (0.02, 0.05, 0.02),
    "OpenMAGVIT2Sampler": (0.02, 0.06, 0.02),
    "MaskGITSampler": (0.02, 0.1, 0.02),
    "TiTokSampler": (0.03, 0.2, 0.02),
    "MaskBitSampler": (0.03, 0.05, 0.02),
    "HaltonSampler": (0.02, 0.05, 0.02),
    "HaltonConfidenceSampler": (0.02, 0.06, 0.02),
    "RandomOrderSampler": (0.04, 0.08, 0.02),
    "NextScaleSampler": (0.02, 0.09, 0.02),
    "DiffusionSampler": (0.02, 0.2, 0.02),
    "AncestralSampler": (0.02, 0.3, 0.02),
    "EulerSampler": (0.08, 0.2, 0.02),
    "TauLeapingSampler": (0.04, 0.3, 0.02),
    "FirstHittingSampler": (0.02, 0.06, 0.02),
    "PuritySampler": (0.03, 0.1, 0.02),
    "RemaskingSampler": (0.03, 0.05, 0.02),
    "SelfCorrectionSampler": (0.02, 0.3, 0.02),
    "PredictorCorrectorSampler": (0.02, 0.3, 0.02),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this precision, as Lightning does around a step in `*-true` precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float32) * 2 - 1


def share_of_others(ids: Tensor, expected: Tensor) -> float:
    return float((ids != expected).double().mean())


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).abs() / expected.abs())


def assert_finite_gradients(module: nn.Module) -> None:
    broken = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    assert broken == []
    assert any(p.grad is not None for p in module.parameters())


def assert_close_enough(found: list[list[float]], bounds: tuple[Row, ...]) -> None:
    """`found` and `bounds`: a list for each figure, with a number for each of the dtypes."""
    too_far = [(f, b) for figures, row in zip(found, bounds, strict=True) for f, b in zip(figures, row, strict=True)]
    assert all(f <= b for f, b in too_far), found


def tokenizer_loss(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, whose gradients are taken, and the sum of its terms without their signs."""
    torch.manual_seed(0)
    loss, terms, _ = module.train().loss(images().to(dtype), step=0, index=torch.arange(2))
    loss.backward()
    return loss.detach(), torch.stack(list(terms.values())).detach().abs().sum()


def tokenizer_figures(name: str) -> list[list[float]]:
    exact = make_tokenizer(name)
    codes = exact.encode(images())
    decoded, trains = exact.decode(codes), hasattr(exact, "loss")
    loss = tokenizer_loss(deepcopy(exact), torch.float32) if trains else None
    figures: list[list[float]] = [[], [], []]
    for dtype in DTYPES:
        module = deepcopy(exact).to(dtype)
        with default_dtype(dtype):
            found, pixels = module.encode(images().to(dtype)), module.decode(codes)
            assert pixels.dtype == widened(dtype)
            if found.is_floating_point():  # latents of a KLVAE
                assert found.dtype == widened(dtype)
                figures[0].append(float((found - codes).detach().abs().max()))
            else:
                assert 0 <= found.min() and found.max() < module.vocab_size
                assert module.embed(codes).dtype == widened(dtype)
                figures[0].append(share_of_others(found, codes))
            figures[1].append(float((pixels - decoded).detach().abs().max()))
            if loss is None:
                figures[2].append(0.0)
                continue
            found, size = tokenizer_loss(module, dtype)
            figures[2].append(float((found - loss[0]).abs() / size))
        assert_finite_gradients(module)
    return figures


def generator_loss(module: Any, tokens: Tensor) -> Tensor:
    loss = module.train().loss(tokens, LABELS % 2, dropped=LABELS == module.num_classes)[0]
    loss.backward()
    return loss.detach()


def generator_figures(name: str) -> list[list[float]]:
    exact = make_generator(name)
    tokens = exact.sample(LABELS)
    nats = exact.log_likelihood(tokens, LABELS).nats
    loss = generator_loss(deepcopy(exact), tokens)
    figures: list[list[float]] = [[], []]
    for dtype in DTYPES:
        module = deepcopy(exact).to(dtype)
        with default_dtype(dtype):
            found = module.log_likelihood(tokens, LABELS).nats
            assert found.dtype == torch.float64
            figures[0].append(float((found - nats).abs().max()) / exact.length)
            of_training = generator_loss(module, tokens)
            assert of_training.dtype == widened(dtype)
            figures[1].append(relative(of_training, loss))
        assert_finite_gradients(module)
    return figures


def sampler_figures(name: str) -> list[list[float]]:
    generator, sampler = make_sampled(name)
    labels = torch.arange(64) % 3
    expected, figures = generator.sample(labels, sampler), []
    for dtype in DTYPES:
        module = deepcopy(generator).to(dtype)
        with default_dtype(dtype):
            found = module.sample(labels, sampler)
        assert 0 <= found.min() and found.max() < module.vocab_size
        figures.append(share_of_others(found, expected))
    return [figures]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in WITHOUT_IMAGES])
def test_tokenizers(name: str) -> None:
    assert_close_enough(tokenizer_figures(name), TOKENIZER_TABLE[name])


@pytest.mark.parametrize("name", GENERATORS)
def test_generators(name: str) -> None:
    assert_close_enough(generator_figures(name), GENERATOR_TABLE[name])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    assert_close_enough(sampler_figures(name), (SAMPLER_TABLE[name],))


def test_every_class_is_in_the_table() -> None:
    def classes(package: Any, names: Any) -> set[str]:
        return {name for name in package.__all__ if name in names}

    tokenizers, generators = discrete_lit.tokenizers, discrete_lit.generators
    concrete = {
        name
        for name in tokenizers.__all__
        if isinstance(getattr(tokenizers, name), type)
        and issubclass(getattr(tokenizers, name), (tokenizers.Tokenizer, tokenizers.ContinuousTokenizer))
        and not getattr(getattr(tokenizers, name), "__abstractmethods__", ())
    }
    # The others code nothing, or look codes up behind a network that is in the table.
    behind = {"LatentGrid", "CodebookLatents", "HybridLatents", "PerturbedTokenizer"}
    # These read waveforms; the table has images.
    of_waveforms = {"EnCodec", "ChunkedEnCodec", "RawFrames"}
    without_a_row = {"AutoencoderTokenizer", "RawPixels", *of_waveforms, *behind}
    assert concrete - {name.partition(",")[0] for name in TOKENIZERS} <= without_a_row
    generators_in_table = {name.partition(",")[0] for name in GENERATOR_TABLE}
    assert {"Autoregressive", "DiscreteDiffusion", "Masked", "NextScale"} == generators_in_table
    assert generators_in_table == classes(generators, generators_in_table)
    samplers = {name for name in discrete_lit.samplers.__all__ if name.endswith("Sampler")} - {"Sampler"}
    of_vectors = {"MARSampler", "CausalVectorSampler", "NextCellSampler", "DimensionwiseSampler", "HybridScaleSampler"}
    of_segments = {"SegmentSampler", "DelaySampler"}
    assert samplers - of_vectors - of_segments == set(SAMPLER_TABLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["VQGAN", "TiTok", "MultiScaleVQ", "KLVAE"])
def test_tokenizers_under_autocast(name: str, dtype: torch.dtype) -> None:
    module = make_tokenizer(name)
    with torch.autocast("cpu", dtype):
        pixels = module.decode(module.encode(images()))
        assert pixels.dtype == torch.float32 and pixels.isfinite().all()
        loss = module.train().loss(images(), step=0)[0]
    loss.backward()
    assert_finite_gradients(module)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_under_autocast(name: str) -> None:
    module = make_generator(name)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = module.sample(LABELS)
        assert 0 <= tokens.min() and tokens.max() < module.vocab_size
        assert module.log_likelihood(tokens, LABELS).nats.isfinite().all()
        loss = module.train().loss(tokens, LABELS % 2, dropped=LABELS == module.num_classes)[0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert_finite_gradients(module)


# Nothing in a float64 module is rounded to float32: its output then changes evenly with a weight, by less than float32
# could tell.


def assert_even(at: Any) -> None:
    values = [at(number * STEP) for number in range(3)]
    first, second = values[1] - values[0], values[2] - values[1]
    assert float(first.abs().max()) > 0
    assert float((first - second).abs().max()) < 1e-3 * float(first.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATORS)
def test_float64_generators_round_nothing(name: str) -> None:
    generator = make_generator(name).double()
    tokens = generator.sample(LABELS)
    weights = deepcopy(generator.backbone.state_dict())

    def at(step: float) -> Tensor:
        moved = {name: value * (1 + step) if "query_key_value" in name else value for name, value in weights.items()}
        generator.backbone.load_state_dict(moved)
        return generator.log_likelihood(tokens, LABELS).nats

    assert_even(at)


@torch.no_grad()
@pytest.mark.parametrize("name", ["VQVAE", "VQVAE on the sphere, ViT", "VQGAN", "MultiScaleVQ", "TiTok", "FSQ", "DVAE"])
def test_float64_tokenizers_round_nothing(name: str) -> None:
    tokenizer = make_tokenizer(name).double()
    pixels = images().double()
    assert_even(lambda step: tokenizer.latents(pixels + step))
    codes = tokenizer.quantizer.lookup(tokenizer.encode(pixels))
    assert codes.dtype == torch.float64
    assert_even(lambda step: tokenizer.outputs(codes + step))


def test_tables_keep_their_digits_in_every_precision() -> None:
    layout = SequenceLayout(8, (600,), num_classes=2, attention="causal")
    backbone = Transformer(layout, width=16, depth=1, heads=2, positions="rope_1d")
    exact = rotary_table(torch.arange(600)[:, None], 8, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float64):
        table = backbone.to(dtype).positions.table
        assert table is not None and table.dtype == widened(dtype)
        torch.testing.assert_close(table, exact.to(table), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_and_statistics_stay_in_float32(dtype: torch.dtype) -> None:
    module = make_tokenizer("VQVAE")
    before = deepcopy(module.quantizer.state_dict())
    module.to(dtype)
    assert module.network.dtype == dtype
    after = module.quantizer.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    assert module.to(torch.float64).quantizer.codebook.codes.dtype == torch.float64


def test_a_running_mean_moves_in_half_precision() -> None:
    """By a hundredth, which bfloat16 would round away."""
    module = make_tokenizer("VQVAE").to(torch.bfloat16).train()
    before = module.quantizer.codebook.cluster_size.clone()
    module.quantizer(module.latents(images()))
    after = module.quantizer.codebook.cluster_size
    assert after.dtype == torch.float32 and not torch.equal(before.bfloat16(), after.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_grey_levels_come_back_in_every_precision(dtype: torch.dtype) -> None:
    tokenizer = PixelLevels().to(dtype)
    ids = torch.arange(256).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids)), ids)
