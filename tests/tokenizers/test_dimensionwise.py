"""Dimension-wise quantisation: the levels of the normal law, and any continuous tokenizer as a discrete one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden import Case, difference
from helpers.golden_cases import cases_of
from scipy.stats import norm

from discrete_lit import load
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.tokenizers import DimensionwiseTokenizer, Tokenizer
from discrete_lit.tokenizers.quantizers.normal_levels import NormalLevels

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": False, "norm_groups": 4},
}


def klvae(**settings: Any) -> Any:
    torch.manual_seed(0)
    init_args = {"network": NETWORK, "latent_channels": 3, "kl_weight": 1e-6, "scale_factor": 2.0, **settings}
    return instantiate({"class_path": "discrete_lit.tokenizers.KLVAE", "init_args": init_args}).eval()


def unit(levels: int) -> NormalLevels:
    """Levels of the standard normal law, which nothing is mapped to."""
    return NormalLevels(levels, low=-3.0, high=3.0)


@pytest.mark.parametrize("levels", [2, 3, 8, 64])
def test_cells_have_equal_probability_and_values_are_their_means(levels: int) -> None:
    found = unit(levels)
    inner = found.boundaries[1:-1].double().numpy()
    mass = norm.cdf([-math.inf, *inner, math.inf])
    torch.testing.assert_close(torch.tensor(mass).diff(), torch.full((levels,), 1 / levels, dtype=torch.float64))
    assert found.boundaries[[0, -1]].tolist() == [-3, 3]
    for cell in range(levels):
        low, high = found.boundaries[cell : cell + 2].tolist()
        mean = norm.expect(lambda x: x, lb=low, ub=high, conditional=True)
        assert float(found.values[cell]) == pytest.approx(mean, abs=1e-5)
    assert bool((found.values.diff() > 0).all())
    torch.testing.assert_close(found.values, -found.values.flip(0), atol=1e-6, rtol=0)


def test_every_number_takes_the_nearest_level_of_equal_ones_the_first() -> None:
    levels, numbers = NormalLevels(16), torch.linspace(-8, 8, 4001)
    expected = (numbers[:, None] - levels.values).abs().argmin(dim=1)
    found = levels(numbers)
    assert torch.equal(found, expected) and bool((found.diff() >= 0).all()) and set(found.tolist()) == set(range(16))
    assert torch.equal(levels(levels.lookup(torch.arange(16))), torch.arange(16))
    assert int(unit(2)(torch.zeros(1))) == 0


@pytest.mark.parametrize("levels", [2, 8, 32])
def test_the_error_on_the_normal_law_is_the_closed_form(levels: int) -> None:
    """sum_k of E[(x - v_k)^2; x in the cell of v_k], whose moments are those of the truncated normal law."""
    found = unit(levels)
    values = found.values.double().numpy()
    edges = [-math.inf, *((values[1:] + values[:-1]) / 2), math.inf]
    expected = 0.0
    for value, low, high in zip(values, edges[:-1], edges[1:], strict=True):
        mass, first = norm.cdf(high) - norm.cdf(low), norm.pdf(low) - norm.pdf(high)
        ends = [edge * norm.pdf(edge) if math.isfinite(edge) else 0.0 for edge in (low, high)]
        expected += mass + ends[0] - ends[1] - 2 * value * first + value**2 * mass
    # A million numbers at the midpoints of cells of equal probability.
    numbers = torch.special.ndtri((torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6)
    error = float((numbers - found.double().lookup(found(numbers))).square().mean())
    assert error == pytest.approx(expected, rel=1e-3)
    assert error < {2: 0.37, 8: 0.06, 32: 0.01}[levels]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, "levels must be at least 2"),
        ({"levels": 4, "low": 2.0, "high": 1.0}, "low must lie below high"),
        ({"levels": 4, "std_range": 0.0}, "std_range must be above 0"),
        ({"levels": 8, "std_range": 1.0}, "leaves no room for the outermost of 8 levels"),
    ],
)
def test_levels_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalLevels(**settings)


@torch.no_grad()
def test_a_continuous_tokenizer_as_a_discrete_one() -> None:
    inner, images = klvae(), torch.rand(4, 3, 8, 8) * 2 - 1
    tokenizer = DimensionwiseTokenizer(inner, 32)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size == 32 and tokenizer.token_shape(8) == (2, 2, 3)
    ids, latents = tokenizer.encode(images), inner.encode(images)
    assert ids.shape == (4, 2, 2, 3) and ids.dtype == torch.int64
    assert torch.equal(ids, tokenizer.quantizer(latents).movedim(1, -1))
    codes = tokenizer.embed(ids)
    assert codes.shape == latents.shape
    # The error of a number is at most half the distance of two levels, inside the outermost.
    inside = latents.abs() < tokenizer.quantizer.values[-1]
    assert float((codes - latents)[inside].abs().max()) <= float(tokenizer.quantizer.values.diff().max()) / 2
    assert torch.equal(tokenizer.decode(ids), inner.decode(codes))
    assert torch.equal(tokenizer.quantizer(codes).movedim(1, -1), ids)
    fine = DimensionwiseTokenizer(inner, 512)
    torch.testing.assert_close(fine.decode(fine.encode(images)), inner.decode(latents), atol=0.05, rtol=0)


def test_a_checkpoint_holds_the_continuous_tokenizer(tmp_path: Path) -> None:
    save(klvae(), tmp_path / "klvae.ckpt")
    inner = {
        "class_path": "discrete_lit.tokenizers.continuous_from_checkpoint",
        "init_args": {"checkpoint": str(tmp_path / "klvae.ckpt")},
    }
    arguments = {"tokenizer": inner, "levels": 16, "low": -4.0}
    config = {"class_path": "discrete_lit.tokenizers.DimensionwiseTokenizer", "init_args": arguments}
    tokenizer: Any = instantiate(config)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.train().tokenizer.training
    save(tokenizer, tmp_path / "ids.ckpt")
    (tmp_path / "klvae.ckpt").unlink()
    loaded, images = load(tmp_path / "ids.ckpt"), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    others = [
        DimensionwiseTokenizer(klvae(), 16),
        DimensionwiseTokenizer(klvae(), 8, low=-4.0),
        DimensionwiseTokenizer(klvae(scale_factor=1.0), 16, low=-4.0),
    ]
    assert len({loaded.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_a_discrete_tokenizer_is_refused() -> None:
    fsq = {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"network": NETWORK, "levels": [4, 4]}}
    with pytest.raises(ValueError, match="quantises the latents of a ContinuousTokenizer; a FSQ has none"):
        DimensionwiseTokenizer(instantiate(fsq))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases_of(["tokenbridge"]))
def test_levels_and_ids_of_tokenbridge(case: Case) -> None:
    """The tokenizer's side of the case: tables and ids; the published file also holds its table."""
    given = {name: case.constructor[name] for name in ("quant_min", "quant_max", "std_range")}
    low, high, std_range = given.values()

    def levels(count: int, low: float, high: float) -> NormalLevels:
        return NormalLevels(count, low=low, high=high, std_range=std_range)

    counts = [int(match[1]) for match in case.matching(r"values_(\d+)").values()]
    assert len(counts) >= 2
    for count in counts:
        unmapped, mapped = levels(count, -std_range, std_range), levels(count, low, high)
        ids = mapped(case.inputs["x"])
        for name, found in {
            "boundaries": unmapped.boundaries,
            "values": unmapped.values,
            "indices": ids,
            "dequant": mapped.lookup(ids),
        }.items():
            assert difference(f"{name}_{count}", found, case.expected[f"{name}_{count}"]).within(1e-4)
    published = levels(case.constructor["quant_levels"], low, high)
    ids = published(case.inputs["latents"]).flatten(2).transpose(1, 2)
    assert difference("quant_indices", ids, case.expected["quant_indices"]).within(0.0)
    assert difference("quant_values", published.lookup(ids), case.expected["quant_values"]).within(1e-4)
    table = levels(case.constructor["quant_levels"], -std_range, std_range).values
    assert difference("reconstruction_values", table, case.state["reconstruction_values"]).within(1e-4)


@pytest.mark.parametrize("family", ["Masked", "Autoregressive"])
def test_a_generator_on_the_ids(family: str, tmp_path: Path) -> None:
    save(klvae(), tmp_path / "klvae.ckpt")
    inner = {
        "class_path": "discrete_lit.tokenizers.continuous_from_checkpoint",
        "init_args": {"checkpoint": str(tmp_path / "klvae.ckpt")},
    }
    tokenizer = {"class_path": "discrete_lit.tokenizers.DimensionwiseTokenizer", "init_args": {"tokenizer": inner}}
    backbone = {"class_path": "discrete_lit.backbones.Transformer", "init_args": {"width": 16, "depth": 1, "heads": 2}}
    arguments = {"tokenizer": tokenizer, "image_size": 8, "num_classes": 3, "backbone": backbone}
    generator: Any = instantiate({"class_path": f"discrete_lit.generators.{family}", "init_args": arguments}).eval()
    assert generator.token_shape == (2, 2, 3) and generator.length == 12 and generator.vocab_size == 64
    labels = torch.arange(2)
    save(generator, tmp_path / "generator.ckpt")
    (tmp_path / "klvae.ckpt").unlink()
    with torch.no_grad():
        ids = load(tmp_path / "generator.ckpt").sample(labels)
        assert torch.equal(ids, generator.sample(labels)) and ids.shape == (2, 2, 2, 3)
        assert generator.tokenizer.decode(ids).shape == (2, 3, 8, 8)
