"""MD4's text models: files of Flax, sizes, settings, the layouts that the published case does not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flax_files import write_flax
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.diffusion import NoiseLevel
from discrete_lit.pretrained import load_pretrained

NET = "classifier.Transformer_0"
Shapes = dict[str, tuple[int, ...]]
REFERENCE = {"data_shape": [6], "mlp_type": "glu", "noise_schedule_type": "linear"}


def dense(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.kernel": (inputs, outputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def shapes(narrow: int, heads: int, depth: int, ids: int, outside: bool = True, timed: bool = True) -> Shapes:
    """The names under `params`, by hand."""
    width = narrow * heads
    hidden = -(-int(8 * width / 3) // 32) * 32
    made: Shapes = {
        "classifier.Embed_0.embedding" if outside else f"{NET}.Embed_0.embedding": (
            ids + 1,
            narrow if outside else width,
        )
    }
    layers = [(narrow, width, True)] if outside else []
    layers += [(narrow, 2 * width, True)] if timed else []
    for number, (inputs, outputs, bias) in enumerate([*layers, (width, ids, False)]):
        made |= dense(f"{NET}.Dense_{number}", inputs, outputs, bias)
    if timed:
        made |= dense("classifier.CondEmbedding_0.dense0", narrow, 4 * narrow)
        made |= dense("classifier.CondEmbedding_0.Dense_0", 4 * narrow, narrow)
    else:
        made |= {f"{NET}.RMSNorm_0.scale": (width,)}
    for block in (f"{NET}.TransformerBlock_{number}" for number in range(depth)):
        for part in ("wq", "wk", "wv", "wo"):
            made |= dense(f"{block}.attention.{part}", width, width, False)
        made |= dense(f"{block}.feed_forward.w1", width, hidden, False)
        made |= dense(f"{block}.feed_forward.w3", width, hidden, False)
        made |= dense(f"{block}.feed_forward.w2", hidden, width, False)
        made |= dense(f"{block}.Dense_0", narrow, 6 * width) if timed else {}
        made |= {} if timed else {f"{block}.RMSNorm_{number}.scale": (width,) for number in range(2)}
    return made


def tensors(made: Shapes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) * 0.2 for name, shape in made.items()}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def load(state: dict[str, Tensor] | None = None, **reference: Any) -> Any:
        state = tensors(shapes(8, 2, 2, 7)) if state is None else state
        save_file({f"params.{name}": value.contiguous() for name, value in state.items()}, tmp_path / "md4.safetensors")
        given = {name: value for name, value in {**REFERENCE, **reference}.items() if value is not None}
        return load_pretrained(tmp_path / "md4.safetensors", "md4", given)

    return load


def logits(generator: Any, time: float = 0.3) -> Tensor:
    states = torch.arange(12).reshape(2, 6) % 8
    level = NoiseLevel.at(generator.denoiser().schedule, torch.full((2, 1), time))
    with torch.no_grad():
        return generator.backbone(
            states, torch.zeros(2, dtype=torch.int64), time=generator.denoiser().network_time(level)
        )


def test_the_published_size_of_text8() -> None:
    """12 layers of 12 heads of 64 channels, on 27 characters."""
    made = shapes(64, 12, 12, 27)
    assert f"{sum(torch.Size(shape).numel() for shape in made.values()) / 1e6:.0f}M" == "89M"


def test_a_file_of_flax(load: Callable[..., Any], tmp_path: Path) -> None:
    """Of two parts the averages are read."""
    state = tensors(shapes(8, 2, 2, 7))
    averaged = {name: value + 0.01 for name, value in state.items()}
    both = {
        f"{part}.{name}": value
        for part, of in (("params", state), ("ema_params", averaged))
        for name, value in of.items()
    }
    write_flax(tmp_path / "checkpoint", both)
    with pytest.warns(UserWarning, match="of .* the part ema_params.* is read; the others are not: params"):
        found = load_pretrained(tmp_path / "checkpoint", "md4", REFERENCE)
    torch.testing.assert_close(logits(found), logits(load(averaged)))


def test_an_embedding_within_is_the_same_as_one_outside(load: Callable[..., Any]) -> None:
    state = tensors(shapes(8, 2, 2, 7))
    within = {name: value for name, value in state.items() if "Embed_0" not in name and f"{NET}.Dense_" not in name}
    table = state["classifier.Embed_0.embedding"] @ state[f"{NET}.Dense_0.kernel"] + state[f"{NET}.Dense_0.bias"]
    within |= {f"{NET}.Embed_0.embedding": table, f"{NET}.Dense_1.kernel": state[f"{NET}.Dense_2.kernel"]}
    within |= {f"{NET}.Dense_0.{part}": state[f"{NET}.Dense_1.{part}"] for part in ("kernel", "bias")}
    torch.testing.assert_close(logits(load(within, outside_embed=False)), logits(load(outside_embed=True)))


def test_a_model_that_is_not_told_the_time(load: Callable[..., Any]) -> None:
    """One block by hand: RMSNorm with gains, no modulation; a head of 2 channels turns nothing at position 0."""
    state = tensors(shapes(4, 1, 1, 7, timed=False))
    generator = load(state, data_shape=[1], time_features="none")
    assert generator.denoiser().time_input == "none"
    states = torch.tensor([[3], [7]])
    block = f"{NET}.TransformerBlock_0"

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.scale"]

    x = state["classifier.Embed_0.embedding"][states] @ state[f"{NET}.Dense_0.kernel"] + state[f"{NET}.Dense_0.bias"]
    # Of one position, attention gives its value.
    values = norm(x, f"{block}.RMSNorm_0") @ state[f"{block}.attention.wv.kernel"]
    x = x + values @ state[f"{block}.attention.wo.kernel"]
    hidden = norm(x, f"{block}.RMSNorm_1")
    gate, value = (hidden @ state[f"{block}.feed_forward.{part}.kernel"] for part in ("w1", "w3"))
    x = x + (torch.sigmoid(gate) * value) @ state[f"{block}.feed_forward.w2.kernel"]
    expected = norm(x, f"{NET}.RMSNorm_0") @ state[f"{NET}.Dense_1.kernel"]
    torch.testing.assert_close(generator.backbone(states, torch.zeros(2, dtype=torch.int64)), expected)


@pytest.mark.parametrize(("kind", "gate"), [("glu", torch.sigmoid), ("swiglu", F.silu), ("geglu", None)])
def test_the_gate_stands_before_the_modulations_too(kind: str, gate: Any, load: Callable[..., Any]) -> None:
    gate = gate or (lambda x: F.gelu(x, approximate="tanh"))
    backbone = load(mlp_type=kind).backbone
    condition = torch.randn(2, 1, 8)
    torch.testing.assert_close(
        torch.cat(backbone.blocks[0].modulate(condition), dim=-1),
        backbone.blocks[0].modulation.project(gate(condition)),
    )
    hidden = torch.randn(2, 3, 16)
    first, second = backbone.blocks[0].mlp.expand(hidden).chunk(2, dim=-1)
    torch.testing.assert_close(backbone.blocks[0].mlp(hidden), backbone.blocks[0].mlp.contract(gate(first) * second))


def test_settings(load: Callable[..., Any]) -> None:
    plain = load(timesteps=10, cont_time=True)
    assert type(plain.objective).__name__ == "MaskedCrossEntropy" and plain.sampler.steps == 10
    half = torch.tensor([0.5], dtype=torch.float64)
    assert float(plain.denoiser().schedule.mask_probability(half)) == pytest.approx(0.5)
    assert float(plain.sampler.times(plain.denoiser().schedule)[5]) == pytest.approx(0.5**0.5)
    steps = load(timesteps=10, noise_schedule_type=None, noise_schedule="poly3", sampling_grid="uniform")
    assert type(steps.objective).__name__ == "DiscreteTimeBound" and not steps.objective.to_data
    assert steps.objective_kind == "not a bound" and steps.sampler.grid is None
    assert float(steps.denoiser().schedule.mask_probability(half)) == pytest.approx(1e-4 + (1 - 2e-4) / 8)
    assert load(sampler="topp", topp=0.7).sampler.top_p == 0.7 and load(sampler="mean").sampler.top_p is None
    tokens = load(timesteps=4).sample(torch.zeros(3, dtype=torch.int64))
    assert tokens.shape == (3, 6) and 0 <= int(tokens.min()) and int(tokens.max()) < 7


def test_the_loss_of_steps_is_that_of_the_paper() -> None:
    """`T (alpha_s - alpha_t) / (1 - alpha_t)` times the cross-entropy of masks, alpha_s of the first step below 1."""
    from discrete_lit.diffusion import AbsorbingProcess, LeaveOneOutHead, LinearSchedule, TruncatedSchedule
    from discrete_lit.diffusion.losses import DiscreteTimeBound

    schedule, loss = TruncatedSchedule(LinearSchedule(), lowest=0.1, highest=0.9), DiscreteTimeBound(4, to_data=False)
    level = loss.level(schedule, torch.tensor([[0.0], [0.6]]), 1)
    network = torch.randn(2, 1, 3)
    found = loss(
        network,
        torch.zeros(2, 1, dtype=torch.int64),
        head=LeaveOneOutHead(),
        states=torch.full((2, 1), 3),
        process=AbsorbingProcess(3),
        level=level,
    )
    alpha_s, alpha_t = (torch.tensor(pair) for pair in ((0.9, 0.5), (0.7, 0.3)))
    expected = -4 * (alpha_s - alpha_t) / (1 - alpha_t) * network[:, 0].log_softmax(dim=-1)[:, 0]
    torch.testing.assert_close(found[:, 0].float(), expected)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"data_shape": None}, "the tensors do not tell data_shape: give it in reference_config"),
        ({"mlp_type": None}, "the tensors do not tell mlp_type: give it in reference_config"),
        ({"data_shape": [8, 8, 3]}, r"data_shape=\[8, 8, 3\]; \[N\], the length of a text, is read"),
        ({"mlp_type": "relu"}, "mlp_type='relu'; glu and swiglu and geglu are read"),
        ({"vocab_size": 8}, "vocab_size=8, but the tensors have 7"),
        ({"num_heads": 4}, "num_heads=4, but the tensors have 2"),
        ({"outside_embed": False}, "outside_embed=False, but the tensors have True"),
        ({"time_features": "none"}, "time_features=none, but the tensors have t"),
        ({"classes": 11}, "classes=11, but every model that is read has -1"),
        ({"noise_schedule_type": "sqrt"}, "noise_schedule_type='sqrt'; linear, cosine, and poly with an exponent are"),
        ({"noise_schedule_type": "poly"}, "noise_schedule_type='poly'; linear, cosine, and poly with an exponent are"),
        ({"power_init": 1.0}, "has power_init=1.0, which is not read"),
    ],
)
def test_what_is_refused(reference: dict[str, Any], message: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load(**reference)
