"""Every sampler: ids in range, draws that belong to the sample, what is given stays, checked inputs."""

from random import Random

import pytest
import torch
from helpers.sampler_cases import CASES

from discrete_lit import samplers
from discrete_lit.backbones.layers import LogitHead
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import MaskGITSampler, RasterSampler, Sampler, SamplingContext


@pytest.mark.parametrize("sharpness", [1, 1000])
def test_never_the_mask_id_and_never_out_of_range(case, sharpness: float) -> None:
    """Of random settings, also where one id has all the probability and the others underflow."""
    choose, labels = Random(0), torch.arange(20) % 3  # the null label among them
    size = case.backbone.layout.vocab_size
    if case.backbone.place_head is None:
        with torch.no_grad():
            case.backbone.head.project.weight.mul_(sharpness)
    for _ in range(8):
        sampler = case.random_sampler(choose)
        tokens = case.draw(sampler, labels, torch.arange(20), choose.randint(0, 2**40)).tokens
        assert tokens.dtype == torch.int64 and tokens.shape == (20, case.length), vars(sampler)
        assert 0 <= int(tokens.min()) and int(tokens.max()) < size, vars(sampler)


def test_given_tokens_stay(case) -> None:
    """Any places where a sampler keeps any; prefixes of each row's own length in raster order."""
    choose, size = Random(2), case.backbone.layout.vocab_size
    labels, indices = torch.arange(20) % 3, torch.arange(20)
    for _ in range(4):
        given = torch.rand(20, case.length) < 0.5
        if case.keeps_prefixes_alone:
            given = torch.arange(case.length) < torch.randint(0, case.length + 1, (20, 1))
        given[0], given[1] = True, False
        known = torch.randint(0, size, (20, case.length)).masked_fill(~given, -1)
        sampler = case.random_sampler(choose)
        tokens = case.draw(sampler, labels, indices, known=known).tokens
        assert torch.equal(tokens[given], known[given]), vars(sampler)
        assert 0 <= int(tokens.min()) and int(tokens.max()) < size, vars(sampler)


# The sampler of scales computes all of them, whatever is given.
@pytest.mark.parametrize("case", [name for name in CASES if name != "next_scale"], indirect=True)
def test_nothing_is_computed_where_everything_is_given(case) -> None:
    known = torch.randint(0, case.backbone.layout.vocab_size, (3, case.length))
    output = case.draw(case.build(), torch.zeros(3, dtype=torch.int64), torch.arange(3), known=known)
    assert torch.equal(output.tokens, known)
    assert (output.network_calls, output.sequential_passes) == (0, 0)


def test_nothing_given_is_the_plain_draw(case) -> None:
    labels, indices = torch.arange(6) % 3, torch.arange(6)
    nothing = torch.full((6, case.length), -1)
    plain, other = case.draw(case.build(), labels, indices), case.draw(case.build(), labels, indices, known=nothing)
    assert torch.equal(plain.tokens, other.tokens) and plain.network_calls == other.network_calls


def test_same_samples_for_any_batch(case) -> None:
    labels, indices = torch.arange(12) % 3, torch.arange(12) + 2**35
    given = torch.arange(case.length) < torch.arange(12)[:, None] % 3  # 0 to 2 first tokens
    known = torch.randint(0, case.backbone.layout.vocab_size, (12, case.length)).masked_fill(~given, -1)
    choose = Random(1)
    for arguments in ({}, {"known": known}):
        sampler = case.random_sampler(choose, temperature=1.0, top_k=None)
        whole = case.draw(sampler, labels, indices, **arguments).tokens
        for rows in (*torch.arange(12).split(5), torch.tensor([11, 2, 9])):
            own = {name: value[rows] for name, value in arguments.items()}
            assert torch.equal(case.draw(sampler, labels[rows], indices[rows], **own).tokens, whole[rows])


def test_seeds_and_indices_tell_samples_apart(case) -> None:
    sampler, labels = case.build(), torch.zeros(40, dtype=torch.int64)
    if case.name == "titok":
        sampler = case.build(choice_temperature=50.0)
    first = case.draw(sampler, labels, torch.arange(40), seed=0).tokens
    assert torch.equal(first, case.draw(sampler, labels, torch.arange(40), seed=0).tokens)
    assert (first != case.draw(sampler, labels, torch.arange(40), seed=1).tokens).any(dim=1).sum() > 15
    assert len(first.unique(dim=0)) > 5


def test_counts_are_what_was_run(case) -> None:
    """Network evaluations for each image and passes, seen by a hook; only the labels' batch or twice that."""
    choose, seen = Random(3), []
    case.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]) / 4))
    for _ in range(5):
        seen.clear()
        output = case.draw(case.random_sampler(choose), torch.zeros(4, dtype=torch.int64), torch.arange(4))
        assert set(seen) <= {1, 2}
        assert (output.network_calls, output.sequential_passes) == (sum(seen), len(seen))


def test_trace(case) -> None:
    """One entry a pass; it begins with mask ids, ends with the result, and says where it changed and how surely."""
    labels, mask_id = torch.zeros(4, dtype=torch.int64), case.backbone.layout.mask_id
    output = case.draw(case.build(), labels, torch.arange(4), trace=True)
    assert case.draw(case.build(), labels, torch.arange(4)).trace is None
    assert len(output.trace) == output.sequential_passes
    before = torch.full((4, case.length), mask_id)
    for step in output.trace:
        assert torch.equal(step.changed, step.tokens != before)
        assert step.changed.any()
        assert step.confidence.isfinite()[step.changed].all()
        if case.name != "halton_older":
            assert (before[step.changed] == mask_id).all() and not (step.tokens == mask_id)[before != mask_id].any()
            assert step.confidence.isnan()[before != mask_id].all()
        before = step.tokens
    assert torch.equal(before, output.tokens)


def test_empty_batch(case) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert case.draw(case.build(), empty, empty).tokens.shape == (0, case.length)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(case, label: int) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        case.draw(case.build(), torch.tensor([0, label]), torch.arange(2))


def test_nan_logits(case) -> None:
    """Nothing is drawn from a network whose weights are broken."""
    with torch.no_grad():
        next(parameter for name, parameter in case.backbone.named_parameters() if "blocks" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        case.draw(case.build(), torch.tensor([0, 1]), torch.arange(2))


def test_streams_for_another_batch(case) -> None:
    with pytest.raises(ValueError, match="random has 3 streams for 2 labels"):
        case.draw(case.build(), torch.tensor([0, 1]), torch.arange(3))


def test_known_tokens_that_do_not_fit(case) -> None:
    labels, size = torch.zeros(2, dtype=torch.int64), case.backbone.layout.vocab_size
    for shape, values, message in (
        ((2, case.length + 1), 0, "known must be int64 of shape"),
        ((1, case.length), 0, "known must be int64 of shape"),
        ((2, case.length), 0.5, "known must be int64"),
        ((2, case.length), size, rf"known must lie in \[-1, {size}\)"),  # the mask id
        ((2, case.length), -2, r"known must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            case.draw(case.build(), labels, labels, known=torch.full(shape, values))


def test_guidance_longer_than_the_sampling(case) -> None:
    steps = 2 if case.name == "next_scale" else 6 if case.sampler.attention == "causal" else 4
    sampler = case.build(guidance_scale=2.0, guidance_interval=(0, steps + 1))
    with pytest.raises(ValueError, match=rf"guidance_interval=.*longer than the sampling: it has {steps} steps"):
        case.draw(sampler, torch.zeros(1, dtype=torch.int64), torch.arange(1))


@pytest.mark.parametrize(
    "case", [name for name, (_, _, settings) in CASES.items() if "steps" in settings], indirect=True
)
def test_steps_out_of_range(case) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        case.build(steps=0)
    with pytest.raises(ValueError, match="steps=7 exceeds the 6 tokens"):
        case.draw(case.build(steps=7), torch.zeros(1, dtype=torch.int64), torch.arange(1))


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"guidance_power": -1.0},
        {"guidance_interval": (2, 2)},
        {"guidance_interval": (-1, 2)},
    ],
)
def test_settings_out_of_range(sampler_classes, setting: dict) -> None:
    for sampler, settings in sampler_classes:
        with pytest.raises(ValueError, match=next(iter(setting))):
            sampler(**settings, **setting)


def test_the_wrong_backbone_is_refused(make_case) -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    random = CounterRandom(0, labels)
    for name, other, need in (
        ("raster", "maskgit", "causal"),
        ("maskgit", "raster", "bidirectional"),
        ("next_scale", "raster", "block_causal"),
        ("raster", "next_scale", "causal"),
    ):
        with pytest.raises(ValueError, match=f"needs a backbone with {need} attention"):
            make_case(name).build()(make_case(other).backbone, labels, random)


def test_choose_reports_log_probabilities_before_the_filters() -> None:
    sampler = RasterSampler(temperature=0.5, top_k=2)
    logits = torch.tensor([[[1.0, 0.5, -2.0]]]).expand(50, 1, 3)
    uniforms = CounterRandom(0, torch.arange(50)).uniform(0, 1)  # type: ignore[arg-type]
    tokens, log_probabilities = sampler.choose(logits, uniforms)
    law = torch.tensor([1.0, 0.5, -2.0]).mul(2).log_softmax(dim=0)
    assert set(tokens.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(log_probabilities, law[tokens])


def test_what_depends_on_labels_alone_is_computed_once(make_backbone) -> None:
    """Four steps, the first unguided: two sets of labels, so two computations of every block's modulation."""
    backbone = make_backbone("bidirectional", conditioning="adaln")
    calls: list[int] = []
    for block in backbone.blocks:
        block.modulation.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    sampler = MaskGITSampler(steps=4, guidance_scale=2.0, guidance_schedule="linear")
    with torch.no_grad():
        sampler(backbone, torch.zeros(3, dtype=torch.int64), CounterRandom(0, torch.arange(3)))
    assert sorted(calls) == [3, 3, 6, 6]


def test_at_most_two_classes_stand_between_a_reader_and_the_loop() -> None:
    classes = [item for item in vars(samplers).values() if isinstance(item, type) and issubclass(item, Sampler)]
    assert len(classes) > 15
    for sampler in classes:
        above = sampler.__mro__[1:]
        assert len(above[: above.index(Sampler)] if sampler is not Sampler else ()) <= 1, sampler


def test_the_old_name_of_the_context_says_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"samplers.Drawing is now discrete_lit.samplers.SamplingContext"):
        assert samplers.Drawing is SamplingContext
    with pytest.raises(AttributeError, match="no attribute 'Draft'"):
        _ = samplers.Draft


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_guidance_by_a_backbone_that_excludes_ids(case, scale: float) -> None:
    """Ids with a logit of -inf, given the label or without it, are no NaN and are never drawn."""

    def exclude(module, inputs, output: torch.Tensor) -> torch.Tensor:
        excluded = torch.zeros_like(output, dtype=torch.bool)
        excluded[: len(output) // 2, ..., 0] = True  # given the label, where the batch is doubled
        excluded[len(output) // 2 :, ..., -1] = True
        return output.masked_fill(excluded, -torch.inf)

    head = case.backbone.place_head
    for module in case.backbone.modules() if head is None else head.modules():
        if isinstance(module, LogitHead):
            module.register_forward_hook(exclude)
    labels = torch.arange(8) % 2
    sampler = case.build(guidance_scale=scale, guidance_schedule="constant")
    tokens = case.draw(sampler, labels, torch.arange(8)).tokens
    assert 0 <= tokens.min() and tokens.max() < case.backbone.layout.vocab_size
    if head is None and case.backbone.layout.sub_tokens == 1:
        assert tokens.min() > 0
