"""Each sampler beside a tiny backbone that it serves."""

from collections.abc import Callable
from typing import Any

import pytest
from helpers.sampler_cases import CASES, SWITCHES, Case, build_backbone, build_quantizer

from discrete_lit.backbones import Transformer
from discrete_lit.samplers import OpenMAGVIT2Sampler, Sampler
from discrete_lit.tokenizers.quantizers.multi_scale import MultiScaleResidualQuantizer


@pytest.fixture
def make_case() -> Callable[[str], Case]:
    def make(name: str) -> Case:
        sampler, layout, settings = CASES[name]
        quantizer = build_quantizer(layout.vocab_size) if layout.scales else None
        return Case(name, sampler, build_backbone(layout, **SWITCHES.get(name, {})), settings, quantizer)

    return make


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """Every sampler in turn."""
    return make_case(request.param)


@pytest.fixture
def make_layout_backbone() -> Callable[..., Transformer]:
    """`make_layout_backbone(layout, spread=0.6, **switches)`."""
    return build_backbone


@pytest.fixture
def make_quantizer() -> Callable[[int], MultiScaleResidualQuantizer]:
    """`make_quantizer(vocab_size)`: scales 1 and 2, dim 3."""
    return build_quantizer


@pytest.fixture
def sampler_classes() -> list[tuple[type[Sampler], dict[str, Any]]]:
    """Every sampler class with settings for the tiny backbones, but the one that has none of its own."""
    return [(sampler, settings) for sampler, _, settings in CASES.values() if sampler is not OpenMAGVIT2Sampler]
