"""Parameter groups and learning-rate schedules."""

from functools import partial
from math import cos, pi

import pytest
import torch

from discrete_lit.optimization import WarmupCosine, WarmupLinear, configure_optimizers

ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)


def names_by_decay(module) -> tuple[set[str], set[str]]:
    """The names of the decayed and of the other parameters, each of which must occur exactly once."""
    optimizer = module.configure_optimizers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, others = [], []
    for group in optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.5)
        (decayed if group["weight_decay"] else others).extend(names[id(parameter)] for parameter in group["params"])
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(decayed + others) == sorted(trained)
    return set(decayed), set(others)


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_generators_decay_matrices_alone(make_generator, family: str, conditioning: str) -> None:
    generator = make_generator(family, backbone={"conditioning": conditioning}, optimizer=ADAMW)
    decayed, others = names_by_decay(generator)
    assert not [name for name in decayed | others if name.startswith("tokenizer.")]
    assert "backbone.blocks.0.attention.query_key_value.weight" in decayed and "backbone.head.project.weight" in decayed
    tables = {"token_embedding.table.weight", "class_embedding.weight", "positions.embedding"}
    if (family, conditioning) == ("autoregressive", "adaln"):
        tables.add("start")
    assert {f"backbone.{name}" for name in tables} <= others
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    matrices = {name for name, parameter in generator.backbone.named_parameters() if parameter.ndim >= 2} - tables
    assert decayed == {f"backbone.{name}" for name in matrices}


@pytest.mark.parametrize(
    ("kind", "arguments"), [("fsq", {}), ("vqvae", {}), ("vqvae", {"codebook_update": "gradient"})]
)
def test_tokenizers_decay_matrices_alone(make_tokenizer, kind: str, arguments) -> None:
    decayed, others = names_by_decay(make_tokenizer(kind, optimizer=ADAMW, **arguments))
    assert ("quantizer.codebook.codes" in others) == bool(arguments)
    assert all("norm" not in name and name.endswith("weight") for name in decayed)
    assert "network.encoder.conv_in.weight" in decayed and "network.encoder.conv_in.bias" in others


def test_a_network_without_biases_and_gains(make_generator) -> None:
    """Nothing is left for the second group but the tables; an optimizer takes it all the same."""
    switches = {"bias": False, "conditioning": "adaln", "positions": "rope_1d"}
    decayed, others = names_by_decay(make_generator("masked", backbone=switches, optimizer=ADAMW))
    assert {name for name in others if "embedding" in name} == {
        "backbone.token_embedding.table.weight",
        "backbone.class_embedding.weight",
    }
    assert decayed


def test_the_scheduler_steps_after_every_batch(make_generator) -> None:
    scheduler = partial(WarmupCosine, warmup_steps=2, total_steps=6)
    configured = make_generator("masked", optimizer=ADAMW, scheduler=scheduler).configure_optimizers()
    assert isinstance(configured["optimizer"], torch.optim.AdamW)
    assert configured["lr_scheduler"]["interval"] == "step"
    assert isinstance(configured["lr_scheduler"]["scheduler"], WarmupCosine)


def test_no_optimizer(make_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"FSQ has no optimizer: set model.init_args.optimizer, .*torch.optim.AdamW"):
        configure_optimizers(make_tokenizer(), None, None)


def rates(steps: int, schedule: type = WarmupCosine, **arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, **arguments)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_and_cosine() -> None:
    seen = rates(12, warmup_steps=4, total_steps=10, min_lr_factor=0.1)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [2 * (0.1 + 0.9 * (1 + cos(pi * step / 6)) / 2) for step in range(7)]
    assert seen[4:11] == pytest.approx(expected)
    assert seen[4] == 2.0 and seen[10] == seen[11] == pytest.approx(0.2)


def test_without_warmup() -> None:
    assert rates(3, warmup_steps=0, total_steps=2) == pytest.approx([2.0, 1.0, 0.0], abs=1e-12)


def test_vars_line() -> None:
    """Of VAR: warm-up, full rate for 5% of what is left, then linear; written out from its definition."""
    total, warmup, final = 220, 20, 0.1
    seen = rates(total + 5, WarmupLinear, warmup_steps=warmup, total_steps=total, hold_steps=10, min_lr_factor=final)
    for step in range(warmup, total):
        rest = 1 - (step - warmup) / (total - warmup)
        expected = 1.0 if rest > 0.95 else final + (1 - final) * rest / 0.95
        assert seen[step] == pytest.approx(2 * expected), step
    assert seen[:2] == pytest.approx([0.1, 0.2]) and seen[total:] == pytest.approx([0.2] * 5)


def test_cosine_over_the_last_tenth() -> None:
    """Of Halton-MaskGIT."""
    seen = rates(102, warmup_steps=5, total_steps=100, hold_steps=85)
    assert seen[4:91] == [2.0] * 87
    assert seen[90:] == pytest.approx([1 + cos(pi * min(step, 10) / 10) for step in range(12)], abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 1, "total_steps": 5, "hold_steps": 4}, "hold_steps must lie in .*, got 4 of 4"),
        ({"warmup_steps": 1, "total_steps": 5, "hold_steps": -1}, "hold_steps must lie in .*, got -1 of 4"),
        ({"warmup_steps": 5, "total_steps": 5}, "got 5 of 5"),
        ({"warmup_steps": -1, "total_steps": 5}, "got -1 of 5"),
        ({"warmup_steps": 1, "total_steps": 5, "min_lr_factor": 1.1}, r"min_lr_factor must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(1, **arguments)
