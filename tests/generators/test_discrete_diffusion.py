"""Discrete diffusion: every combination trains, is saved and sampled; likelihoods; choices that do not fit."""

import copy
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exact_laws import all_sequences, order_log_laws
from helpers.random_weights import randomise
from helpers.tiny_runs import generator_settings, run, write_settings

from discrete_lit.backbones import Transformer
from discrete_lit.checkpoints import instantiate, load, save
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import (
    AbsorbingProcess,
    CosineSchedule,
    DiscretizedGaussianProcess,
    GeometricSchedule,
    Head,
    HybridProcess,
    LeaveOneOutHead,
    LinearSchedule,
    LogLinearSchedule,
    LogSinSchedule,
    MaskSchedule,
    PosteriorHead,
    ScoreHead,
    TruncatedSchedule,
    UniformProcess,
)
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiffusionLoss,
    DiscreteFlowMatching,
    DiscreteTimeBound,
    HybridBound,
    MaskedCrossEntropy,
    ScoreEntropy,
)
from discrete_lit.diffusion.noise_level import stratified_times
from discrete_lit.generators import DiscreteDiffusion, Masked
from discrete_lit.generators import discrete_diffusion as module
from discrete_lit.samplers import AncestralSampler, HaltonSampler, MaskGITSampler

# process, schedule, head, loss, time input
CHOICES: dict[str, tuple[Any, MaskSchedule | None, Head | None, DiffusionLoss | None, Any]] = {
    "masks": (AbsorbingProcess, None, None, None, None),
    "masks, timed": (AbsorbingProcess, CosineSchedule(), PosteriorHead(), MaskedCrossEntropy(), "time"),
    "mask ratio": (AbsorbingProcess, LogLinearSchedule(), None, MaskedCrossEntropy("mask_ratio"), None),
    "mask count": (AbsorbingProcess, None, None, MaskedCrossEntropy("mask_count"), None),
    "SEDD absorb": (AbsorbingProcess, LogSinSchedule(), ScoreHead(), ScoreEntropy(), "total_noise"),
    "SEDD uniform": (
        UniformProcess,
        GeometricSchedule(),
        ScoreHead(scale_by_noise=False, mask_output=False),
        ScoreEntropy(),
        "total_noise",
    ),
    "SEDD hybrid": (HybridProcess, LogLinearSchedule(), ScoreHead(scale_by_noise=False), ScoreEntropy(), "time"),
    "UDLM": (UniformProcess, LogLinearSchedule(), LeaveOneOutHead(), ContinuousBound(), None),
    "GIDD": (HybridProcess, None, LeaveOneOutHead(), ContinuousBound(), None),
    "D3PM uniform": (UniformProcess, None, LeaveOneOutHead(), HybridBound(20), None),
    "D3PM gaussian": (
        partial(DiscretizedGaussianProcess, beta=0.5),
        GeometricSchedule(1e-3, 30.0),
        LeaveOneOutHead(),
        HybridBound(20),
        None,
    ),
    "Gaussian": (
        partial(DiscretizedGaussianProcess, beta=0.5),
        GeometricSchedule(1e-3, 30.0),
        LeaveOneOutHead(),
        ContinuousBound(),
        "time",
    ),
    "MD4 of steps": (AbsorbingProcess, None, LeaveOneOutHead(), DiscreteTimeBound(10), None),
    "flow matching": (UniformProcess, LinearSchedule(), PosteriorHead(), DiscreteFlowMatching(), None),
}
each_choice = pytest.mark.parametrize("name", CHOICES)


@pytest.fixture
def make_diffusion(make_grid_tokenizer):
    """`make_diffusion(name, vocab_size=4, token_shape=(3,), spread=None, **arguments)`, in eval mode."""

    def make(name: str = "masks", vocab_size: int = 4, token_shape=(3,), spread: float | None = None, **arguments: Any):
        process, schedule, head, loss, time_input = CHOICES[name]
        tokenizer = make_grid_tokenizer(vocab_size, token_shape)
        tokenizer.ordered_ids = True
        choices = {"process": process, "schedule": schedule, "head": head, "loss": loss, "time_input": time_input}
        build = partial(Transformer, width=16, depth=2, heads=2, conditioning="adaln")
        given = {"tokenizer": tokenizer, "image_size": 16, "num_classes": 2, "backbone": build, **choices, **arguments}
        generator = DiscreteDiffusion(**given)
        if spread is not None:
            randomise(generator.backbone, spread)
        return generator.eval()

    return make


@each_choice
def test_every_choice_reaches_every_parameter(make_diffusion, assert_all_trained, name: str) -> None:
    assert_all_trained(make_diffusion(name, token_shape=(2, 3), spread=0.3))


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("masks", 120),
        ("SEDD absorb", 250),
        ("SEDD uniform", 250),
        ("GIDD", 120),
        ("Gaussian", 120),
        ("flow matching", 120),
    ],
)
def test_two_sequences_are_learnt_by_heart(make_diffusion, name: str, steps: int) -> None:
    generator = make_diffusion(name, vocab_size=5, token_shape=(4,)).train()
    tokens, labels = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0]]).repeat(16, 1), torch.tensor([0, 1]).repeat(16)
    optimizer = torch.optim.Adam(generator.backbone.parameters(), lr=1e-2)
    # At a learning rate that does not fall, what the last steps end with is luck.
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    losses = []
    for step in range(steps):
        loss, _ = generator.loss(tokens, labels, CounterRandom(0, torch.arange(32) + 32 * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.35 * sum(losses[:20])
    generator.eval()
    drawn = generator.sample(labels, AncestralSampler(steps=16), seed=1)
    assert (drawn == tokens).all(dim=1).float().mean() > 0.5  # one in 625 by chance


@each_choice
def test_loss_is_the_mean_of_the_objective_over_tokens(make_diffusion, name: str) -> None:
    generator = make_diffusion(name, spread=0.4).train()
    tokens, labels = torch.randint(4, (6, 3)), torch.arange(6) % 3
    random = CounterRandom(0, torch.arange(40, 46))
    denoiser, objective = generator.denoiser(), generator.objective
    level = objective.level(denoiser.schedule, stratified_times(random, 6), 3)
    states = objective.corrupt(denoiser.process, tokens, level, random.uniform(Purpose.MASK_ORDER, 3))
    logits = generator.backbone(states, labels, time=denoiser.network_time(level))
    expected = objective(
        logits, tokens=tokens, head=denoiser.head, states=states, process=denoiser.process, level=level
    )
    dropped = labels == generator.num_classes
    loss, _ = generator.loss(tokens, labels.masked_fill(dropped, 0), random, dropped=dropped)
    torch.testing.assert_close(loss, expected.mean().to(logits.dtype))
    losses = generator.token_losses(tokens, labels, random)
    assert torch.equal(losses.coordinate[:, :1], level.t) and losses.coordinate.shape == (6, 3)


def settings_of(name: str) -> dict[str, Any]:
    """Give the choices as a configuration names them."""

    def named(path: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": f"discrete_lit.{path}", "init_args": arguments}

    gaussian = named("diffusion.DiscretizedGaussianProcess", beta=0.5)
    return {
        "masks": {},
        "SEDD absorb": {
            "schedule": named("diffusion.LogSinSchedule", epsilon=1e-3),
            "head": named("diffusion.ScoreHead"),
            "loss": named("diffusion.losses.ScoreEntropy"),
            "time_input": "total_noise",
        },
        "D3PM gaussian": {
            "process": gaussian,
            "schedule": named("diffusion.GeometricSchedule", sigma_min=1e-3, sigma_max=30.0),
            "loss": named("diffusion.losses.HybridBound", steps=20, cross_entropy_weight=0.01),
            "sampler": named("samplers.AncestralSampler", steps=5),
        },
        "UDLM": {
            "process": named("diffusion.UniformProcess"),
            "schedule": named("diffusion.TruncatedSchedule", schedule=named("diffusion.CosineSchedule"), lowest=1e-4),
            "loss": named("diffusion.losses.ContinuousBound"),
        },
    }[name]


@pytest.mark.parametrize("name", ["masks", "SEDD absorb", "D3PM gaussian", "UDLM"])
def test_configured_saved_and_loaded(tmp_path: Path, name: str) -> None:
    backbone = {
        "class_path": "discrete_lit.backbones.Transformer",
        "init_args": {"width": 16, "depth": 2, "heads": 2, "conditioning": "adaln"},
    }
    tokenizer = {"class_path": "discrete_lit.tokenizers.PixelLevels", "init_args": {"levels": 9, "grey": True}}
    given = {"tokenizer": tokenizer, "image_size": 3, "num_classes": 2, "backbone": backbone, **settings_of(name)}
    generator: Any = instantiate({"class_path": "discrete_lit.generators.DiscreteDiffusion", "init_args": given})
    randomise(generator.eval().backbone, 0.3)
    save(generator, tmp_path / "generator.ckpt")
    loaded: Any = load(tmp_path / "generator.ckpt")
    labels = torch.arange(12) % 3
    tokens = generator.sample(labels)
    assert torch.equal(loaded.sample(labels), tokens)
    one, two = (each.log_likelihood(tokens, labels) for each in (generator, loaded))
    assert (
        one.kind == "bound" and torch.equal(one.nats, two.nats) and torch.equal(*(x.standard_error for x in (one, two)))
    )
    assert torch.equal(loaded.loss(tokens, labels % 2)[0], generator.loss(tokens, labels % 2)[0])
    assert loaded.objective_kind == generator.objective_kind


def test_fit_and_a_resume_that_changes_nothing(tmp_path: Path) -> None:
    """With uniform noise and scores: four steps at once, and two and two."""
    tokenizer = tmp_path / "grey.ckpt"
    grey = {"class_path": "discrete_lit.tokenizers.PixelLevels", "init_args": {"levels": 6, "grey": True}}
    save(instantiate(grey), tokenizer)
    settings = generator_settings(tokenizer)
    model = settings["model"]
    model["class_path"] = "discrete_lit.generators.DiscreteDiffusion"
    model["init_args"]["backbone"]["init_args"]["conditioning"] = "adaln"
    model["init_args"] |= {
        "process": {"class_path": "discrete_lit.diffusion.UniformProcess"},
        "schedule": {"class_path": "discrete_lit.diffusion.LogLinearSchedule"},
        "head": {
            "class_path": "discrete_lit.diffusion.ScoreHead",
            "init_args": {"scale_by_noise": False, "mask_output": False},
        },
        "loss": {"class_path": "discrete_lit.diffusion.losses.ScoreEntropy"},
    }

    def fit(folder: str, steps: int) -> dict[str, Any]:
        settings["trainer"]["max_steps"] = steps
        file = write_settings(tmp_path / "settings.yaml", copy.deepcopy(settings))
        run("fit", "--config", file, "--run_dir", tmp_path / folder, "--ckpt_path", "last")
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    whole = fit("whole", 4)
    half = fit("halves", 2)
    resumed = fit("halves", 4)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, half[name]) for name, value in whole.items())
    loaded: Any = load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert loaded.sample(torch.tensor([0, 1])).shape == (2, 8, 8)


def test_one_time_in_each_part_of_the_batch_of_all_ranks(make_diffusion, monkeypatch) -> None:
    """Two ranks of 6 rows draw the times of one rank with 12; batches without an index are as evenly spread."""
    generator = make_diffusion("masks, timed").train()
    seen: list[torch.Tensor] = []
    generator.backbone.register_forward_pre_hook(
        lambda _, inputs, named: seen.append(named["time"] / 1000), with_kwargs=True
    )
    tokens, labels = torch.randint(4, (12, 3)), torch.zeros(12, dtype=torch.int64)
    generator.token_losses(tokens, labels, CounterRandom(0, torch.arange(31, 43)))
    whole = seen.pop()
    assert sorted((whole * 12).long().tolist()) == list(range(12))
    monkeypatch.setattr(module, "world_size", lambda: 2)
    for file in ("generator", "training"):
        monkeypatch.setattr(f"discrete_lit.generators.{file}.world_size", lambda: 2)
    monkeypatch.setattr(generator, "log_dict", lambda *_, **__: None)
    for rank in range(2):
        rows = slice(6 * rank, 6 * rank + 6)
        batch = {"tokens": tokens[rows], "label": labels[rows], "index": torch.arange(31, 43)[rows]}
        generator.training_step(batch, 0)
    assert torch.equal(torch.cat(seen), whole)
    seen.clear()
    for rank in range(2):
        monkeypatch.setattr("discrete_lit.generators.training.rank", lambda rank=rank: rank)
        generator.training_step({"tokens": tokens[:6], "label": labels[:6]}, 3)
    assert sorted((torch.cat(seen) * 12).long().tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("masks", {}, "bound"),
        ("SEDD absorb", {}, "not a bound"),
        ("SEDD absorb", {"schedule": LogLinearSchedule(1e-9)}, "not a bound"),
        ("mask ratio", {}, "bound"),
        ("masks", {"schedule": TruncatedSchedule(LinearSchedule(), lowest=1e-3, highest=1.0)}, "not a bound"),
        ("UDLM", {}, "bound"),
        ("SEDD uniform", {}, "not a bound"),
        ("D3PM uniform", {}, "not a bound"),
        ("MD4 of steps", {}, "bound"),
        ("flow matching", {}, "bound"),
    ],
)
def test_what_a_loss_is_is_said(make_diffusion, name: str, arguments: dict[str, Any], expected: str) -> None:
    assert make_diffusion(name, **arguments).objective_kind == expected


@pytest.mark.parametrize(("name", "logged"), [("masks", True), ("UDLM", True), ("SEDD absorb", False)])
@torch.no_grad()
def test_validation_logs_bits_of_bounds_with_their_prior(make_diffusion, monkeypatch, name: str, logged: bool) -> None:
    schedule = LogLinearSchedule(0.3) if name == "UDLM" else CHOICES[name][1]
    generator = make_diffusion(name, spread=0.3, schedule=schedule)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(generator, "log_dict", lambda values, **_: seen.update(values))
    batch = {"tokens": torch.randint(4, (50, 3)), "label": torch.zeros(50, dtype=torch.int64)}
    generator.validation_step({**batch, "index": torch.arange(50)}, 0)
    generator.on_validation_epoch_end()
    assert ("validation/bits_per_token" in seen) == logged
    if logged:
        kernel = torch.tensor([0.3 + 0.7 / 4, 0.7 / 4, 0.7 / 4, 0.7 / 4])
        prior = float((kernel * (kernel * 4).log()).sum()) if name == "UDLM" else 0.0
        bits = (float(seen["validation/loss"]) + prior) / log(2)
        assert float(seen["validation/bits_per_token"]) == pytest.approx(bits, rel=1e-5)


def test_masked_and_diffusion_share_checkpoints_and_samplers(make_diffusion, make_grid_tokenizer) -> None:
    """The same weights behave alike in both, whoever trained them; samplers of either serve."""
    diffusion = make_diffusion("masks", token_shape=(2, 4), spread=0.5)
    build = partial(Transformer, width=16, depth=2, heads=2, conditioning="adaln")
    masked = Masked(make_grid_tokenizer(4, (2, 4)), 16, num_classes=2, backbone=build).eval()
    masked.backbone.load_state_dict(diffusion.backbone.state_dict())
    labels = torch.arange(9) % 3
    for sampler in (MaskGITSampler(steps=4), HaltonSampler(steps=4), AncestralSampler(steps=4)):
        drawn = diffusion.sample(labels, sampler, seed=3)
        assert torch.equal(masked.sample(labels, sampler, seed=3), drawn)
        assert int(drawn.max()) < 4


@pytest.mark.parametrize("name", ["masks, timed", "SEDD absorb"])
def test_samplers_of_masked_serve_timed_networks_and_scores(make_diffusion, name: str) -> None:
    """What is told of the time is the one at which so many tokens are masked."""
    generator, seen = make_diffusion(name, token_shape=(2, 4), spread=0.5), []
    generator.backbone.register_forward_pre_hook(lambda _, inputs, named: seen.append(inputs[4]), with_kwargs=True)
    tokens = generator.sample(torch.arange(6) % 3, MaskGITSampler(steps=4))
    assert tokens.shape == (6, 2, 4) and int(tokens.max()) < 4
    times = torch.stack(seen)
    assert times.shape == (4, 6) and times.isfinite().all() and (times.diff(dim=0) < 0).all()
    uniform = make_diffusion("UDLM", token_shape=(2, 4))
    with pytest.raises(ValueError, match="MaskGITSampler needs a generator of masked tokens, UniformProcess does more"):
        uniform.sample(torch.arange(2), MaskGITSampler(steps=4))


@each_choice
def test_logits_that_are_no_numbers_reach_the_loss(make_diffusion, name: str) -> None:
    """So that the alarm of training sees them; samplers refuse them."""
    generator = make_diffusion(name).train()
    with torch.no_grad():
        for parameter in generator.backbone.head.parameters():
            parameter.fill_(torch.nan)
    tokens, labels = torch.zeros(8, 3, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    assert generator.loss(tokens, labels)[0].isnan()
    with pytest.raises(ValueError, match="the backbone's logits are NaN at t = "):
        generator.eval().sample(labels)


@pytest.mark.parametrize("name", ["masks", "SEDD absorb"])
@torch.no_grad()
def test_enumerated_likelihood_is_that_of_random_orders(make_diffusion, name: str) -> None:
    generator = make_diffusion(name, spread=0.7)
    sequences, labels = all_sequences(4, 3), torch.ones(64, dtype=torch.int64)
    found = generator.log_likelihood(sequences, labels, method="enumeration")
    assert found.kind == "exact" and found.standard_error is None
    assert float(found.nats.exp().sum()) == pytest.approx(1, abs=1e-5)
    if name == "masks":
        orders = order_log_laws(generator.backbone, 1)
        torch.testing.assert_close(
            found.nats, torch.logsumexp(orders, dim=0) - torch.log(torch.tensor(6.0)), rtol=1e-5, atol=1e-5
        )
    generator.likelihood_samples = 64
    bound = generator.log_likelihood(sequences, labels)
    assert ((bound.nats - found.nats) / bound.standard_error).max() < 5
    assert float(found.nats.exp() @ (found.nats - bound.nats)) > 0


@pytest.mark.parametrize("method", ["mask_count", "mask_ratio"])
def test_likelihood_by_counts_and_by_ratios_is_masked_s(make_diffusion, make_grid_tokenizer, method: Any) -> None:
    """Both estimate the mean of log p over all orders, which Masked's estimate does; the errors tell how well."""
    diffusion = make_diffusion("masks", spread=0.5, likelihood_samples=64)
    sequences, labels = all_sequences(4, 3), torch.ones(64, dtype=torch.int64)
    exact = order_log_laws(diffusion.backbone, 1).mean(dim=0)
    found = diffusion.log_likelihood(sequences, labels, method=method)
    assert found.kind == "bound" and found.standard_error.shape == (64,)
    pulls = (found.nats - exact) / found.standard_error
    assert (pulls.abs() < 5).all() and 0.1 < float(pulls.std()) < 1.5
    single = [
        diffusion.log_likelihood(sequences[i : i + 1], labels[:1], indices=torch.tensor([i]), method=method).nats
        for i in (0, 63)
    ]
    torch.testing.assert_close(torch.cat(single), found.nats[[0, 63]], rtol=1e-5, atol=1e-5)
    diffusion.likelihood_samples = 1
    assert diffusion.log_likelihood(sequences, labels).standard_error.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": ScoreEntropy()}, "ScoreEntropy needs a head of kind score, LeaveOneOutHead is of kind leave_one_out"),
        (
            {"head": ScoreHead()},
            "MaskedCrossEntropy needs a head of kind leave_one_out or posterior, ScoreHead is of kind sc",
        ),
        (
            {"process": UniformProcess},
            "MaskedCrossEntropy is for AbsorbingProcess, got UniformProcess: use ContinuousB",
        ),
        (
            {"head": ScoreHead(mask_output=False), "loss": ScoreEntropy()},
            "mask_output of ScoreHead must be True for AbsorbingProcess, got False",
        ),
        ({"time_input": "total_noise"}, "time_input='total_noise' needs a schedule whose total noise is finite"),
        ({"likelihood_samples": 0}, "likelihood_samples must be at least 1, got 0"),
        (
            {"vocab_size": 1025, "process": DiscretizedGaussianProcess},
            r"DiscretizedGaussianProcess is for at most 1024 ids .*, got 1025",
        ),
    ],
)
def test_parts_that_do_not_fit(make_diffusion, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_diffusion("masks", **arguments)


def test_gaussian_noise_needs_ids_in_order(make_tokenizer) -> None:
    build = partial(Transformer, width=16, depth=2, heads=2)
    with pytest.raises(
        ValueError, match="DiscretizedGaussianProcess moves ids to their neighbours, and those of FSQ have no order"
    ):
        DiscreteDiffusion(
            make_tokenizer(),
            16,
            num_classes=2,
            backbone=build,
            process=DiscretizedGaussianProcess,
            loss=ContinuousBound(),
        )


def test_enumerations_that_cannot_be(make_diffusion) -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"enumeration takes 2\^N passes, for at most 12 tokens, got 13"):
        generator = make_diffusion(token_shape=(13,))
        generator.log_likelihood(torch.zeros(1, 13, dtype=torch.int64), labels, method="enumeration")
    with pytest.raises(ValueError, match="of AbsorbingProcess, got UniformProcess"):
        generator = make_diffusion("UDLM")
        generator.log_likelihood(torch.zeros(1, 3, dtype=torch.int64), labels, method="enumeration")
