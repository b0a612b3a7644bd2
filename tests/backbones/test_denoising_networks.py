"""Networks over whole latents: shapes, conditions, where they begin, and what they refuse."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch.nn import functional as F

from discrete_lit.backbones import DenoisingNetwork, DiT, LatentLayout, UNet
from discrete_lit.backbones.denoising_network import nearest_grid

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"width": 16, "depth": 2, "heads": 2},
    "lightning dit": {
        **{"width": 16, "depth": 2, "heads": 2, "norm": "rms", "mlp": "swiglu", "qk_norm": "rms"},
        **{"rotary": True, "positions": "learned", "patch_size": 1},
    },
    "unet": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [2], "heads": 2, "norm_groups": 4},
    "adm": {
        **{"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1, 2], "head_dim": 4, "norm_groups": 4},
        **{"attention_kind": "self", "class_input": "time", "modulation": "scale_shift"},
    },
}


def make(name: str, *, spread: float | None = 0.3, context: int | None = None, **changed: Any) -> DenoisingNetwork:
    torch.manual_seed(0)
    layout = LatentLayout(channels=3, grid=(4, 8), outputs=6, num_classes=2, context_channels=context)
    kind = UNet if "multipliers" in SMALL[name] else DiT
    network = kind(layout, **{**SMALL[name], **changed})
    if spread is None:
        return network.eval()
    return randomise(network, spread).eval()


def inputs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 4, 8, generator=generator)
    return x, torch.linspace(0, 900, count), torch.arange(count) % 3


@pytest.mark.parametrize("name", SMALL)
def test_time_and_label_and_every_place_count(name: str) -> None:
    network = make(name)
    x, time, labels = inputs()
    output = network(x, time, labels)
    assert output.shape == (3, 6, 4, 8)
    assert not torch.allclose(output, network(x, time + 50, labels), atol=1e-4)
    assert not torch.allclose(output, network(x, time, (labels + 1) % 3), atol=1e-4)
    moved = network(x + F.pad(torch.ones(1, 1), (7, 0, 3, 0)), time, labels)  # the last place
    assert not torch.allclose(output[..., 0, 0], moved[..., 0, 0], atol=1e-6)
    # Of samples, each by itself.
    torch.testing.assert_close(network(x[:1], time[:1], labels[:1]), output[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_training_begins_with_an_output_of_zero_and_reaches_every_parameter(name: str) -> None:
    assert not make(name, spread=None)(*inputs()).any()
    network = make(name).train()
    (network(*inputs()) * torch.randn(3, 6, 4, 8)).sum().backward()
    still = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    # One class to attend to leaves queries and keys nothing to decide.
    assert [key for key in still if not key.endswith(("cross_attention.query.weight", "cross_norm.weight"))] == [
        key for key in still if key.endswith("cross_norm.bias")
    ]


@pytest.mark.parametrize("name", SMALL)
def test_activations_computed_again_give_the_same_gradients(name: str) -> None:
    gradients = []
    for again in (False, True):
        network = make(name, activation_checkpointing=again).train()
        network(*inputs()).square().sum().backward()
        gradients.append([value.grad for value in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_context_is_read_at_the_nearest_place(name: str) -> None:
    network = make(name, context=5)
    context = torch.randn(3, 5, 1, 2)
    output = network(*inputs(), context)
    assert not torch.allclose(output, network(*inputs(), context.flip(-1)), atol=1e-4)
    upsampled = nearest_grid(context, (4, 8))
    assert upsampled[..., :4].eq(context[..., :1]).all() and upsampled[..., 4:].eq(context[..., 1:]).all()
    torch.testing.assert_close(network(*inputs(), upsampled), output, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the context has None channels, the layout has 5"):
        network(*inputs())
    with pytest.raises(ValueError, match="the context has 5 channels, the layout has None"):
        make(name)(*inputs(), context)


@pytest.mark.parametrize("name", ["dit", "lightning dit", "unet"])
def test_vectors_are_attended_to_in_no_order(name: str) -> None:
    layout = LatentLayout(channels=3, grid=(4, 8), outputs=6, num_classes=2, vectors=(4, 5))
    network = randomise((UNet if name == "unet" else DiT)(layout, **SMALL[name]), 0.3).eval()
    vectors = torch.randn(3, 4, 5)
    output = network(*inputs(), vectors=vectors)
    assert output.shape == (3, 6, 4, 8)
    torch.testing.assert_close(network(*inputs(), vectors=vectors.flip(1)), output, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(*inputs(), vectors=vectors + 1), output, atol=1e-3)
    assert network.flops(1) > make(name).flops(1)
    with pytest.raises(ValueError, match=r"the vectors are \(3, 5\) \(number, width\), the layout has \(4, 5\)"):
        network(*inputs(), vectors=vectors[:, :3])
    with pytest.raises(ValueError, match="the vectors are None"):
        network(*inputs())


READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit", {}),
    "dit, text in front": ("dit", {"context_input": "prefix"}),
    "lightning dit, text in front": ("lightning dit", {"context_input": "prefix"}),
    "unet": ("unet", {}),
    "unet, class in the time": ("unet", {"class_input": "time"}),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_text_is_attended_to(reader: str) -> None:
    name, settings = READERS[reader]
    network = make(name, context_dim=5, **settings)
    text = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    output = network(*inputs(), text=text, text_mask=mask)
    assert output.shape == (3, 6, 4, 8)
    changed = network(*inputs(), text=text + 1, text_mask=mask)
    assert not torch.allclose(changed[:2], output[:2], atol=1e-3)
    # What stands at padding, and how much there is of it, changes nothing.
    garbage = torch.where(mask[..., None], text, 1e3)
    torch.testing.assert_close(network(*inputs(), text=garbage, text_mask=mask), output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        network(*inputs(), text=F.pad(garbage, (0, 0, 0, 3), value=9.0), text_mask=F.pad(mask, (0, 3))),
        output,
        rtol=1e-4,
        atol=1e-4,
    )
    # The words have no order of their own, and no mask means that all are valid.
    every = network(*inputs(), text=text)
    torch.testing.assert_close(every, network(*inputs(), text=text.flip(1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(every[:1], output[:1], rtol=1e-4, atol=1e-4)
    # No word at all is a learned vector, not the last one that happened to stand there.
    assert not torch.allclose(every[2], output[2], atol=1e-3)
    assert network.flops(1, 8) > network.flops(1, 4) > make(name).flops(1)


@pytest.mark.parametrize("reader", READERS)
def test_a_network_that_reads_a_text_trains_all_of_itself(reader: str) -> None:
    name, settings = READERS[reader]
    assert not make(name, spread=None, context_dim=5, **settings)(*inputs(), text=torch.randn(3, 4, 5)).any()
    gradients = []
    for again in (False, True):
        network = make(name, context_dim=5, activation_checkpointing=again, **settings).train()
        text = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
        mask = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
        network(*inputs(), text=text, text_mask=mask).square().sum().backward()
        assert all(value.grad is not None and bool(value.grad.any()) for value in network.parameters())
        gradients.append([value.grad for value in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_text_that_is_not_read_or_not_given_is_refused() -> None:
    text = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match=r"the text is \(3, 4, 5\), this DiT was made without context_dim"):
        make("dit")(*inputs(), text=text)
    with pytest.raises(ValueError, match=r"the text is None, this UNet reads \(B, M, 5\)"):
        make("unet", context_dim=5)(*inputs())
    with pytest.raises(ValueError, match=r"the text is \(3, 4, 5\), this DiT reads \(B, M, 6\)"):
        make("dit", context_dim=6)(*inputs(), text=text)
    with pytest.raises(ValueError, match=r"the text_mask is \(3, 5\) for a text of \(3, 4, 5\)"):
        make("dit", context_dim=5)(*inputs(), text=text, text_mask=torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", SMALL)
def test_inputs_of_another_shape_are_refused(name: str) -> None:
    network, (x, time, labels) = make(name), inputs()
    with pytest.raises(ValueError, match=r"the latents have the shape \(3, 3, 8, 4\), this \w+ reads \(B, 3, 4, 8\)"):
        network(x.transpose(2, 3), time, labels)
    with pytest.raises(ValueError, match=r"a time and a label are needed for each of 3 latents, got \(1,\) times"):
        network(x, time[:1], labels)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_half_precision_follows_float32(name: str) -> None:
    network = make(name)
    expected = network(*inputs())
    half = network.to(torch.bfloat16)(*inputs())
    assert half.dtype == torch.bfloat16
    assert float((half - expected).norm() / expected.norm()) < 0.1
    flops = network.flops(2)
    assert flops > 0 and network.flops(4) == 2 * flops


def test_fixed_positions_have_the_column_first() -> None:
    table = make("dit").position_table
    assert table is not None
    rows = table.unflatten(0, (2, 4))
    # The first half of the channels tells columns apart, the second one rows; the slowest wave is near 0.
    assert torch.equal(rows[0, :, :8], rows[1, :, :8]) and not torch.equal(rows[:, 0, :8], rows[:, 1, :8])
    assert torch.equal(rows[:, 0, 8:], rows[:, 1, 8:])
    torch.testing.assert_close(rows[0, :, 0], torch.arange(4).sin())
    exact = make("dit").double().position_table
    assert exact is not None and exact.dtype == torch.float64
    assert float((exact.unflatten(0, (2, 4))[0, :, 0] - torch.arange(4, dtype=torch.float64).sin()).abs().max()) < 1e-15


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("dit", {"patch_size": 3}, "patch_size=3 must divide both sides"),
        ("dit", {"heads": 3}, "width=16 must be a multiple of heads=3"),
        ("dit", {"depth": 0}, "must be at least 1"),
        ("unet", {"multipliers": [1, 1, 1, 1]}, r"4 levels halve the latents 3 times, which \(4, 8\) does not allow"),
        ("unet", {"attention": [8]}, r"attention=\[8\] holds rates of down-sampling; 2 levels have 1, 2"),
        ("unet", {"head_dim": 4}, "one of heads and head_dim must be given"),
        ("unet", {"heads": 3}, "heads=3, head_dim=None must divide"),
        ("unet", {"norm_groups": 3}, "norm_groups=3 must divide every width"),
        ("unet", {"attention_kind": "self"}, "class_input='context' needs attention_kind='transformer'"),
        ("unet", {"channels": 9}, "channels=9 must be even"),
        ("dit", {"context_dim": 0}, "context_dim must be at least 1"),
        ("dit", {"context_dim": 4, "context_input": "beside"}, "context_input must be 'cross' or 'prefix'"),
        ("dit", {"context_input": "prefix"}, "context_input='prefix' says how a text enters"),
        ("adm", {"context_dim": 4}, "a text to attend to, of width context_dim, needs attention_kind='transformer'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **changed)
