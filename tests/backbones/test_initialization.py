"""How weights begin: the deviation of each kind of layer against the closed form of the code that it is named after."""

from functools import partial
from math import pi, sqrt
from typing import Any

import pytest
import torch

from discrete_lit.backbones import FactorisedHead, SequenceLayout, Transformer
from discrete_lit.backbones.initialization import initialise

WIDTH, DEPTH, HIDDEN = 192, 3, 512
# A normal distribution cut at twice its deviation: 1 - 2 a phi(a) / (Phi(a) - Phi(-a)) of its variance is left.
CUT = 0.02 * sqrt(1 - 4 * (sqrt(1 / (2 * pi)) * 2.718281828**-2) / 0.9544997361)


def causal(**switches: Any) -> Transformer:
    layout = SequenceLayout(256, (8, 8), num_classes=200, attention="causal")
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=4, mlp_hidden=HIDDEN, **switches)


def masked(**switches: Any) -> Transformer:
    layout = SequenceLayout(256, (8, 8), num_classes=200, attention="bidirectional", mask_token=True)
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=4, mlp_hidden=HIDDEN, **switches)


def scales(**switches: Any) -> Transformer:
    layout = SequenceLayout(
        256, (341,), num_classes=200, attention="block_causal", scales=(1, 4, 16, 64, 256), input_dim=32
    )
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=4, conditioning="prefix_adaln", **switches)


# (b^2 - a^2) / 12 of uniform numbers: +-sqrt(6 / (n + m)) have the deviation sqrt(2 / (n + m)), +-1 / sqrt(n) that of
# 1 / sqrt(3 n).
SQUARE, UP = sqrt(2 / (2 * WIDTH)), sqrt(2 / (WIDTH + HIDDEN))
BY_INPUTS, VAR, SMALL = sqrt(1 / (3 * WIDTH)), sqrt(1 / (3 * WIDTH)), sqrt(2 * DEPTH)
SWIGLU = {"mlp": "swiglu", "norm": "rms", "bias": False}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, float]]] = {
    "gpt2": (causal, {}, {"qkv": 0.02, "out": 0.02 / SMALL, "up": 0.02, "down": 0.02 / SMALL, "logits": 0.02}),
    "bert": (
        masked,
        {"norm_first": False},
        {"qkv": 0.02, "out": 0.02, "up": 0.02, "down": 0.02, "logits": 0.02, "ids": 0.02, "positions": 0.02},
    ),
    "bar": (
        causal,
        {"conditioning": "prefix_adaln", "registers": 8},
        {"qkv": 0.02, "out": 0.02, "down": 0.02, "logits": 0.02, "positions": 0.02, "start": 0.02, "gate": 0},
    ),
    "taming": (causal, {}, {"qkv": 0.02, "out": 0.02, "down": 0.02, "logits": 0.02, "positions": 0, "ids": 0.02}),
    "maskgit": (
        masked,
        {"norm_first": False},
        {"qkv": CUT, "out": CUT, "up": CUT, "down": CUT, "ids": CUT, "classes": CUT, "positions": CUT},
    ),
    "maskbit": (masked, {"norm_first": False}, {"qkv": sqrt(2 / (4 * WIDTH)), "out": 0.02, "up": 0.02, "down": 0.02}),
    "llamagen": (
        causal,
        {**SWIGLU, "positions": "rope_2d"},
        {"qkv": 0.02, "out": 0.02, "up": 0.02, "down": 0.02, "logits": 0, "ids": 0.02, "classes": 0.02},
    ),
    "ibq": (
        causal,
        {**SWIGLU, "positions": "rope_2d", "conditioning": "prefix_adaln"},
        {
            **{"qkv": 0.02, "out": 0.02, "down": 0.02, "logits": 0},
            **{"shift": 0.01, "scale": 0.01, "gate": 2e-5, "last": 0.01},
        },
    ),
    "var": (
        scales,
        {},
        {
            **{"qkv": VAR, "out": VAR / SMALL, "up": VAR, "down": VAR / SMALL, "logits": 0.02 * VAR, "classes": VAR},
            **{"shift": VAR / 2, "scale": VAR / 2, "gate": 1e-3 * VAR, "last": VAR / 2, "vectors": VAR},
        },
    ),
    "xavier": (
        masked,
        {**SWIGLU, "conditioning": "adaln", "registers": 4, "tied": True},
        {
            **{"qkv": SQUARE, "out": SQUARE, "up": UP, "down": UP, "ids": 0.02, "classes": 0.02, "start": 0.02},
            **{"positions": 0.02, "shift": 0, "scale": 0, "gate": 0, "last": sqrt(2 / (3 * WIDTH))},
        },
    ),
    "sedd": (
        masked,
        {"conditioning": "adaln", "condition_width": 128, "positions": "rope_1d", "attention_bias": "none"},
        {
            **{"qkv": BY_INPUTS, "out": BY_INPUTS, "up": BY_INPUTS, "down": sqrt(1 / (3 * HIDDEN)), "logits": 0},
            **{"ids": BY_INPUTS, "shift": 0, "scale": 0, "gate": 0, "last": 0, "up bias": BY_INPUTS},
        },
    ),
}


def weights_of(network: Transformer) -> dict[str, torch.Tensor]:
    """The weights of each kind of layer, those of all blocks together."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    blocks = range(network.depth)

    def joined(name: str) -> torch.Tensor:
        return torch.cat([parameters[f"blocks.{number}.{name}"] for number in blocks])

    found = {
        "qkv": joined("attention.query_key_value.weight"),
        "out": joined("attention.out.weight"),
        "up": joined("mlp.expand.weight"),
        "down": joined("mlp.contract.weight"),
        "classes": parameters["class_embedding.weight"],
    }
    if network.modulated:
        parts = [parameters[f"blocks.{number}.modulation.project.weight"].chunk(6) for number in blocks]
        for kind, numbers in (("shift", (0, 3)), ("scale", (1, 4)), ("gate", (2, 5))):
            found[kind] = torch.cat([rows[number] for rows in parts for number in numbers])
    optional = {
        "logits": "head.project.weight",
        "ids": "token_embedding.table.weight",
        "vectors": "token_embedding.project.weight",
        "positions": "positions.embedding",
        "start": "start",
        "last": "final_modulation.project.weight",
    }
    found |= {kind: parameters[name] for kind, name in optional.items() if name in parameters}
    if "blocks.0.mlp.expand.bias" in parameters:
        found["up bias"] = joined("mlp.expand.bias")
    return found


@pytest.mark.parametrize("kind", CASES)
def test_deviations(kind: Any) -> None:
    make, switches, expected = CASES[kind]
    torch.manual_seed(0)
    weights = weights_of(make(initialization=kind, **switches))
    for name, deviation in expected.items():
        found = float(weights[name].square().mean().sqrt())
        assert found == pytest.approx(deviation, rel=0.04, abs=1e-12), name
    if kind != "sedd":
        assert float(weights.get("up bias", torch.zeros(1)).abs().max()) == 0


def test_bounds() -> None:
    """What is uniform or cut has an end, which is where its law says."""
    torch.manual_seed(0)
    for kind, bound in (("xavier", sqrt(6 / (2 * WIDTH))), ("sedd", WIDTH**-0.5), ("maskgit", 0.04)):
        largest = float(weights_of(masked(initialization=kind))["qkv"].abs().max())
        assert 0.99 * bound < largest <= bound


def test_vectors_of_scales() -> None:
    """VAR adds a vector of the scale to the vectors of its positions, and its start token to the first: of one scale
    the positions share half of their variance."""
    torch.manual_seed(0)
    positions = scales(initialization="var").positions.embedding[0].detach()
    last = positions[21:85]  # of the fourth scale
    assert float(last.square().mean()) == pytest.approx(2 * VAR**2, rel=0.15)
    assert float((last[:32] * last[32:]).mean()) == pytest.approx(VAR**2, rel=0.35)
    assert abs(float((last[:16] * positions[5:21]).mean())) < 0.35 * VAR**2
    assert float(positions[0].square().mean()) == pytest.approx(3 * VAR**2, rel=0.35)


def test_a_modulation_that_blocks_share() -> None:
    torch.manual_seed(0)
    network = scales(initialization="var", shared_modulation=True, initial_gates=5e-6)  # as d36
    assert float(network.shared_modulation.project.weight.detach().std()) == pytest.approx(VAR, rel=0.04)
    offsets = (
        torch.stack([block.modulation_offset.detach() for block in network.blocks]).square().mean(dim=(0, 2)).sqrt()
    )
    unit = WIDTH**-0.5
    expected = torch.tensor([unit / 2, unit / 2, unit * 5e-6] * 2)
    torch.testing.assert_close(offsets, expected, rtol=0.15, atol=0.0)


def test_logits_of_a_head_of_parts() -> None:
    """Open-MAGVIT2's begin at 0, its blocks as all others."""
    head = partial(FactorisedHead, sizes=(16, 16), depth=1)
    network = causal(token_embedding="parts", place_head=head, initialization="llamagen")
    assert all(float(layer.project.weight.detach().abs().max()) == 0 for layer in network.place_head.heads)
    assert float(network.place_head.blocks[0].mlp.contract.weight.detach().std()) == pytest.approx(0.02, rel=0.04)


def test_outputs_of_zero_go_with_every_scheme() -> None:
    weights = weights_of(masked(initialization="bert", zero_outputs=True))
    assert all(float(weights[name].abs().max()) == 0 for name in ("out", "down", "logits"))
    assert float(weights["qkv"].std()) == pytest.approx(0.02, rel=0.04)


def test_a_scheme_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"initialization='kaiming' is not known, accepted: gpt2, bert, .*sedd"):
        initialise(causal(), "kaiming")  # type: ignore[arg-type]


def test_gates_of_a_scheme_without() -> None:
    with pytest.raises(ValueError, match=r"initial_gates=0\.001 is of initialization='var' and 'ibq', got 'gpt2'"):
        scales(initial_gates=1e-3)
    with pytest.raises(ValueError, match=r"initial_gates=0\.1 needs conditioning"):
        causal(initialization="ibq", initial_gates=0.1)
