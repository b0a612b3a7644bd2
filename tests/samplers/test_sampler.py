"""What holds for every sampler: ids in range, draws that belong to the sample, settings and labels that are checked."""

from random import Random

import pytest
import torch

from discrete_lit.processes import CounterRandom
from discrete_lit.samplers import MaskGITSampler, RasterSampler, Sampler

SAMPLERS = {"bidirectional": MaskGITSampler, "causal": RasterSampler}
each_attention = pytest.mark.parametrize("attention", SAMPLERS)


def random_settings(choose: Random, attention: str, length: int) -> dict:
    settings = {
        "temperature": choose.choice([0.05, 0.7, 1.0, 3.0, 50.0]),
        "top_k": choose.choice([None, 1, 2, 4, 99]),
        "top_p": choose.choice([None, 0.01, 0.5, 0.99, 1.0]),
        "guidance_scale": choose.choice([-1.0, 0.0, 1.0, 1.5, 12.0]),
        "guidance_schedule": choose.choice(["constant", "linear", "cosine"]),
    }
    if attention == "bidirectional":
        settings["steps"] = choose.randint(1, length)
        settings["choice_temperature"] = choose.choice([0.0, 4.5, 1e6])
    return settings


@torch.no_grad()
def draw(sampler: Sampler, backbone, labels: torch.Tensor, indices: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return sampler(backbone, labels, CounterRandom(seed, indices)).tokens


@each_attention
def test_never_the_mask_id_and_never_out_of_range(make_backbone, attention: str) -> None:
    backbone = make_backbone(attention, vocab_size=5, grid=(2, 3), num_classes=2, spread=0.6)
    choose = Random(0)
    labels = torch.arange(30) % 3  # the null label among them
    for _ in range(40):
        settings = random_settings(choose, attention, 6)
        tokens = draw(SAMPLERS[attention](**settings), backbone, labels, torch.arange(30), choose.randint(0, 2**40))
        assert tokens.dtype == torch.int64 and tokens.shape == (30, 6), settings
        assert 0 <= int(tokens.min()) and int(tokens.max()) < 5, settings


@each_attention
def test_same_samples_for_any_batch(make_backbone, attention: str) -> None:
    backbone = make_backbone(attention, vocab_size=5, grid=(2, 3), spread=0.6)
    labels, indices = torch.arange(12) % 3, torch.arange(12) + 2**35
    choose = Random(1)
    for _ in range(4):
        sampler = SAMPLERS[attention](**{**random_settings(choose, attention, 6), "temperature": 1.0, "top_k": None})
        whole = draw(sampler, backbone, labels, indices)
        for size in (1, 3, 7):
            parts = [draw(sampler, backbone, labels[rows], indices[rows]) for rows in torch.arange(12).split(size)]
            assert torch.equal(torch.cat(parts), whole)
        rows = torch.tensor([11, 2, 9])
        assert torch.equal(draw(sampler, backbone, labels[rows], indices[rows]), whole[rows])


@each_attention
def test_seeds_and_indices_tell_samples_apart(make_backbone, attention: str) -> None:
    backbone = make_backbone(attention, grid=(4, 4), spread=0.2)
    sampler, labels = SAMPLERS[attention](), torch.zeros(20, dtype=torch.int64)
    first = draw(sampler, backbone, labels, torch.arange(20), seed=0)
    assert torch.equal(first, draw(sampler, backbone, labels, torch.arange(20), seed=0))
    assert (first != draw(sampler, backbone, labels, torch.arange(20), seed=1)).any(dim=1).all()
    assert len(first.unique(dim=0)) == 20


@each_attention
def test_empty_batch(make_backbone, attention: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert draw(
        SAMPLERS[attention](steps=2) if attention == "bidirectional" else RasterSampler(),
        make_backbone(attention),
        empty,
        empty,
    ).shape == (0, 6)


@each_attention
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(make_backbone, attention: str, label: int) -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        draw(SAMPLERS[attention](), make_backbone(attention), torch.tensor([0, label]), torch.arange(2))


def test_the_wrong_backbone_is_refused(make_backbone) -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs a backbone with causal attention"):
        draw(RasterSampler(), make_backbone("bidirectional"), labels, labels)
    with pytest.raises(ValueError, match="needs a backbone with bidirectional attention"):
        draw(MaskGITSampler(), make_backbone("causal"), labels, labels)


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
@each_attention
def test_settings_out_of_range(attention: str, setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        SAMPLERS[attention](**setting)


def test_choose_reports_the_law_that_it_drew_from() -> None:
    sampler = RasterSampler(temperature=0.5, top_k=2)
    logits = torch.tensor([[[1.0, 0.5, -2.0]]]).expand(50, 1, 3)
    uniforms = CounterRandom(0, torch.arange(50)).uniform(0, 1)  # type: ignore[arg-type]
    tokens, log_probabilities = sampler.choose(logits, uniforms)
    law = torch.tensor([1.0, 0.5, -torch.inf]).mul(2).log_softmax(dim=0)
    assert set(tokens.flatten().tolist()) == {0, 1}
    torch.testing.assert_close(log_probabilities, law[tokens])
