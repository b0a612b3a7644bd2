"""What holds for every sampler of diffusion, over processes, heads and random settings."""

from random import Random
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import (
    CASES,
    LABELS,
    LENGTH,
    MASKS_ALONE,
    PROCESSES,
    SAMPLERS,
    SIZE,
    FiniteNoise,
    build,
    make_model,
)

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import CosineSchedule, LinearSchedule, SquareSchedule
from discrete_lit.samplers import (
    AncestralSampler,
    FirstHittingSampler,
    MaskGITSampler,
    PredictorCorrectorSampler,
    RandomOrderSampler,
    RemaskingSampler,
    SelfCorrectionSampler,
    TauLeapingSampler,
)


@torch.no_grad()
def draw(model, sampler, labels=LABELS, indices=None, seed=0, **arguments):
    backbone, denoiser = model
    indices = torch.arange(len(labels)) if indices is None else indices
    return sampler(backbone, labels, CounterRandom(seed, indices), denoiser=denoiser, **arguments)


def random_sampler(choose: Random, name: str, process: str):
    settings: dict[str, Any] = {
        "guidance_scale": choose.choice([-1.0, 0.0, 1.0, 1.5, 12.0]),
        "guidance_schedule": choose.choice(["constant", "linear", "power_cosine"]),
        "guidance_interval": choose.choice([None, (0, 1), (1, 2)]),
        "temperature": choose.choice([0.05, 1.0, 1.0, 50.0]),
        "top_k": choose.choice([None, None, 1, 2, 99]),
        "top_p": choose.choice([None, None, 0.01, 0.9, 1.0]),
    }
    if name == "first_hitting":
        return build(name, **settings)
    settings["steps"] = choose.choice([2, 3, 6])
    if name == "purity":
        return build(name, **settings)
    settings["clean_up"] = choose.choice(["sample", "argmax"])
    if name == "steps_forward":
        settings["top_p"] = None  # it has a nucleus
    if name not in ("loop", "flow_matching"):
        settings["grid"] = choose.choice([None, CosineSchedule(), SquareSchedule()])
    if name not in ("forward_backward", "gibbs", "tau"):
        laws = ["clean", "score", "transition"] if PROCESSES[process].homogeneous else ["clean", "transition"]
        settings["guidance_law"] = choose.choice(laws)
        if settings["guidance_law"] != "clean" and process != "absorbing":
            settings |= {"temperature": 1.0, "top_k": None, "top_p": None}
    return build(name, **settings)


@pytest.mark.parametrize(("name", "process"), CASES)
def test_never_the_mask_id_and_never_out_of_range(name: str, process: str) -> None:
    choose = Random(name + process)
    for _ in range(6):
        model = make_model(
            PROCESSES[process],
            choose.choice(["posterior", "cavity", "score"][: 2 + PROCESSES[process].homogeneous]),
            choose.choice([LinearSchedule(), CosineSchedule(), SquareSchedule(), FiniteNoise()]),
            choose.choice(["none", "time", "total_noise"]),
            sure=choose.choice([1.0, 1.0, 0.0, 60.0]),
        )
        sampler = random_sampler(choose, name, process)
        tokens = draw(model, sampler, seed=choose.randint(0, 2**40)).tokens
        assert tokens.dtype == torch.int64 and tokens.shape == (20, LENGTH)
        assert 0 <= int(tokens.min()) and int(tokens.max()) < SIZE, (vars(sampler), model[1])


@pytest.mark.parametrize(("name", "process"), CASES)
def test_given_tokens_stay(name: str, process: str) -> None:
    choose = Random(process + name)
    for _ in range(2):
        given = torch.rand(20, LENGTH) < 0.5
        given[0], given[1] = True, False
        known = torch.randint(0, SIZE, (20, LENGTH)).masked_fill(~given, -1)
        sampler = random_sampler(choose, name, process)
        output = draw(make_model(PROCESSES[process]), sampler, known=known, trace=True)
        tokens = output.tokens
        if name in ("first_hitting", "purity") or sampler.clean_up == "sample":
            assert all(step.confidence[given].isnan().all() for step in output.trace)
        assert torch.equal(tokens[given], known[given])
        assert 0 <= int(tokens.min()) and int(tokens.max()) < SIZE
    output = draw(make_model(PROCESSES[process]), build(name), known=torch.zeros(20, LENGTH, dtype=torch.int64))
    assert not output.tokens.any() and output.network_calls == 0


@pytest.mark.parametrize(("name", "process"), CASES)
def test_a_draw_belongs_to_its_sample(name: str, process: str) -> None:
    model, sampler = make_model(PROCESSES[process], spread=0.2), build(name, steps=4, guidance_scale=2.0)
    indices = torch.arange(20) + 2**35
    whole = draw(model, sampler, LABELS, indices).tokens
    for rows in (torch.arange(7, 20), torch.tensor([19, 2, 9])):
        assert torch.equal(draw(model, sampler, LABELS[rows], indices[rows]).tokens, whole[rows])
    nothing = draw(model, sampler, LABELS, indices, known=torch.full((20, LENGTH), -1))
    assert torch.equal(nothing.tokens, whole)
    assert (draw(model, sampler, LABELS, indices, seed=1).tokens != whole).any(dim=1).sum() > 10
    assert draw(model, sampler, LABELS[:0]).tokens.shape == (0, LENGTH)


@pytest.mark.parametrize(("name", "process"), CASES)
def test_counts_and_trace(name: str, process: str) -> None:
    """What a hook on the network sees; one entry a pass, the last the result."""
    model, seen = make_model(PROCESSES[process]), []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]) // 20, inputs[0][:20])))
    output = draw(model, build(name, steps=5, guidance_scale=2.0, guidance_schedule="linear"), trace=True)
    assert output.network_calls == sum(rows for rows, _ in seen)
    assert output.sequential_passes == len(seen) == len(output.trace) > 0
    assert torch.equal(output.trace[-1].tokens, output.tokens)
    before = seen[0][1]
    for step in output.trace:
        assert torch.equal(step.changed, step.tokens != before)
        drawn = step.changed & (step.tokens < SIZE)
        assert step.confidence[drawn].isfinite().all() and (step.confidence[drawn] <= 1e-6).all()
        if process == "absorbing":
            assert drawn.any()  # a pass that nothing comes of is not made
        before = step.tokens


def test_first_hitting_reveals_one_token_a_pass() -> None:
    known = torch.zeros(20, LENGTH, dtype=torch.int64)
    known[:, :4], known[3] = -1, 0
    output = draw(make_model(PROCESSES["absorbing"]), FirstHittingSampler(), known=known, trace=True)
    assert output.network_calls == output.sequential_passes == 4
    for step in output.trace:
        assert step.changed.sum(dim=1).tolist() == [1, 1, 1, 0] + [1] * 16


def test_steps_that_reveal_nothing_are_not_computed() -> None:
    output = draw(make_model(PROCESSES["absorbing"]), AncestralSampler(steps=300), LABELS[:1])
    assert 1 <= output.network_calls <= LENGTH


@pytest.mark.slow
def test_nan_logits() -> None:
    for name, process in CASES:
        model = make_model(PROCESSES[process])
        model[0].register_forward_hook(lambda module, inputs, output: output.masked_fill(output > 0, torch.nan))
        with pytest.raises(ValueError, match=r"the backbone's logits are NaN at t = "):
            draw(model, build(name))


def test_guidance_needs_classes() -> None:
    for name, process in CASES:
        with pytest.raises(ValueError, match="needs a generator of several classes, this one has 1"):
            draw(make_model(PROCESSES[process], classes=1), build(name, guidance_scale=2.0), LABELS[:1])


def test_without_a_denoiser() -> None:
    backbone, _ = make_model(PROCESSES["absorbing"], time="none")
    for name in SAMPLERS:
        with pytest.raises(ValueError, match="needs a generator that learned to undo noise"):
            draw((backbone, None), build(name))


@pytest.mark.parametrize("process", ["uniform", "hybrid", "gaussian", "gidd"])
def test_processes_that_do_more_than_mask(process: str) -> None:
    for name in MASKS_ALONE - {"purity"}:
        with pytest.raises(ValueError, match=f"the process must be absorbing: {type(PROCESSES[process]).__name__} is"):
            draw(make_model(PROCESSES[process]), build(name))
    if not PROCESSES[process].masks:
        with pytest.raises(ValueError, match=f"unmasks tokens, {type(PROCESSES[process]).__name__} has no mask"):
            draw(make_model(PROCESSES[process]), build("purity"))
    for sampler in (MaskGITSampler(steps=3), RandomOrderSampler(steps=3)):
        with pytest.raises(
            ValueError, match=f"needs a generator of masked tokens, {type(PROCESSES[process]).__name__}"
        ):
            draw(make_model(PROCESSES[process]), sampler)


@pytest.mark.parametrize("head", ["posterior", "cavity", "score"])
def test_samplers_of_masked_models_serve_masking_diffusion(head: str) -> None:
    for time in ("none", "time", "total_noise"):
        model = make_model(PROCESSES["absorbing"], head, FiniteNoise(), time)
        tokens = draw(model, MaskGITSampler(steps=3, guidance_scale=2.0)).tokens
        assert 0 <= int(tokens.min()) and int(tokens.max()) < SIZE


def test_filters_need_a_clean_distribution() -> None:
    for setting in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="use guidance_law='clean' with UniformProcess"):
            draw(make_model(PROCESSES["uniform"]), AncestralSampler(guidance_law="score", **setting))


def test_scores_need_rates_that_stay() -> None:
    with pytest.raises(ValueError, match="guidance_law='score' is for noise whose rates do not change, those of GIDDP"):
        draw(make_model(PROCESSES["gidd"]), AncestralSampler(guidance_law="score"))
    with pytest.raises(ValueError, match="ScoreHead is for noise whose rates do not change, those of GIDDProcess do"):
        make_model(PROCESSES["gidd"], "score")


def test_tau_leaping_needs_finite_rates() -> None:
    with pytest.raises(ValueError, match="cannot begin where rates are infinite: LinearSchedule"):
        draw(make_model(PROCESSES["gaussian"]), TauLeapingSampler(steps=4))
    tokens = draw(make_model(PROCESSES["gaussian"], schedule=FiniteNoise()), TauLeapingSampler(steps=4)).tokens
    assert 0 <= int(tokens.min()) and int(tokens.max()) < SIZE


@pytest.mark.parametrize(
    ("sampler", "settings", "message"),
    [
        (AncestralSampler, {"steps": 0}, "steps must be at least 1, got 0"),
        (AncestralSampler, {"guidance_law": "x0"}, "guidance_law must be 'clean', 'transition' or 'score', got 'x0'"),
        (AncestralSampler, {"clean_up": "none"}, "clean_up must be 'sample' or 'argmax', got 'none'"),
        (TauLeapingSampler, {"guidance_law": "transition"}, "guidance_law must be 'clean' or 'score'"),
        (PredictorCorrectorSampler, {"corrector": "tau"}, "corrector must be 'forward_backward' or 'gibbs'"),
        (PredictorCorrectorSampler, {"corrector_steps": -1}, "corrector_steps must be >= 0, got -1"),
        (PredictorCorrectorSampler, {"corrector_noise": 0.0}, "corrector_noise must be > 0, got 0.0"),
        (PredictorCorrectorSampler, {"corrector_tokens": 0}, "corrector_tokens must be at least 1, got 0"),
        (PredictorCorrectorSampler, {"guidance_law": "score"}, "correctors are guided by the clean law"),
        (RemaskingSampler, {"strategy": "x"}, "'loop', 'forward_backward' or 'flow_matching', got 'x'"),
        (
            RemaskingSampler,
            {"strategy": "flow_matching", "eta": 0.1},
            "'flow_matching' has no eta, got 0.1: leave it o",
        ),
        (RemaskingSampler, {"strategy": "flow_matching", "grid": LinearSchedule()}, "makes its own grid: leave grid o"),
        (RemaskingSampler, {"nucleus": 0.0}, r"nucleus must lie in \(0, 1\], got 0.0"),
        (RemaskingSampler, {"nucleus": 0.9, "top_p": 0.9}, "nucleus=0.9 and top_p=0.9 are two rules for one thing"),
        (AncestralSampler, {"min_p": 1.0}, r"min_p must lie in \[0, 1\), got 1.0"),
        (AncestralSampler, {"min_p": 0.1, "top_k": 2}, "min_p=0.1 acts on the law of a step, temperature, top_k and"),
        (SelfCorrectionSampler, {"correction_steps": 0}, "correction_steps must be at least 1, got 0"),
        (SelfCorrectionSampler, {"correction_tokens": 0}, "correction_tokens must be at least 1, got 0"),
        (SelfCorrectionSampler, {"correction_temperature": 0.0}, "correction_temperature must be > 0, got 0.0"),
        (SelfCorrectionSampler, {"correction_time": 1.0}, r"correction_time must lie in \(0, 1\), got 1.0"),
        (SelfCorrectionSampler, {"patience": 0}, "patience must be at least 1, or null, got 0"),
        (RemaskingSampler, {"eta": 1.1}, r"eta must lie in \[0, 1\], got 1.1"),
        (RemaskingSampler, {"loop": (0.5, 0.5)}, r"loop must be \[first, end\] with 0 <= first < end <= 1"),
        (RemaskingSampler, {"loop_alpha": 1.0}, r"loop_alpha must lie in \(0, 1\), got 1.0"),
        (RemaskingSampler, {"strategy": "loop", "grid": LinearSchedule()}, "makes its own grid: leave grid out"),
        (FirstHittingSampler, {"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_settings_out_of_range(sampler, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**settings)
