"""Published models give what the reference repositories' own code computes; `helpers.golden` says how a case looks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden_tokenizers
from helpers.golden import Case, published
from helpers.golden_cases import cases, cases_of
from helpers.golden_outputs import NOT_YET, Compared, compare, compared, kind_of

import discrete_lit
from discrete_lit.checkpoints import save
from discrete_lit.core.random import CounterRandom
from discrete_lit.pretrained import FAMILIES
from discrete_lit.samplers import FirstHittingSampler, RemaskingSampler


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_loaded_is_compared(family: str) -> None:
    assert family not in NOT_YET and kind_of(family) is not None


@pytest.mark.parametrize("case", cases())
@torch.no_grad()
def test_outputs_of_the_reference(case: Case, tmp_path: Path) -> None:
    family = case.family
    assert compared(family) != (family in NOT_YET), f"{family} must be loaded, or be named as not yet"
    if family in NOT_YET:
        pytest.skip(f"{family}: not loaded yet")
    if family not in FAMILIES:
        # No checkpoint: a published sampler on a toy network.
        assert_equal(compare(case, None))
        return
    load = published(case, tmp_path)
    first = load()
    assert not first.training

    def load_once(**reference: Any) -> Any:
        return load(**reference) if reference else first

    assert_equal(compare(case, load_once))

    save(first, tmp_path / "ours.ckpt")
    second = discrete_lit.load(tmp_path / "ours.ckpt")
    assert type(second) is type(first) and second.hparams == first.hparams
    state = second.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    again = kind_of(family).again
    outputs = again(second, case)
    assert outputs and all(torch.equal(value, outputs[name]) for name, value in again(first, case).items())


def assert_equal(found: Compared) -> None:
    """Integers exactly, numbers within a share of the largest of the reference."""
    off = [f"{each.name}: {each.error} off" for each in found.off()]
    assert found.differences and not off


@pytest.mark.parametrize("case", cases_of(["titok_imagebert", "titok_uvitbert", "halton_maskgit"]))
@torch.no_grad()
def test_published_masked_generators_are_sampled_as_diffusion(case: Case, tmp_path: Path) -> None:
    """First hitting draws from the law that reveals along its order; remasking changes what it had drawn."""
    generator = published(case, tmp_path)()
    length, label = generator.length, case.inputs["y"][:1]
    random = CounterRandom(0, torch.arange(1))
    drawn = generator.draw(label, random, FirstHittingSampler(), trace=True)
    assert drawn.sequential_passes == len(drawn.trace) == length
    order = torch.stack([step.changed[0].int().argmax() for step in drawn.trace])
    assert sorted(order.tolist()) == list(range(length))
    drawn_with = torch.stack([step.confidence[0, place] for step, place in zip(drawn.trace, order, strict=True)]).sum()
    along = generator.log_likelihood(drawn.tokens, label, order=order)
    assert along.kind == "exact" and torch.allclose(along.nats, drawn_with, rtol=1e-5)

    for strategy in ("cap", "rescale", "conf", "loop"):
        remasked = generator.draw(label, random, RemaskingSampler(strategy, eta=0.5, steps=3 * length), trace=True)
        assert 0 <= int(remasked.tokens.min()) and int(remasked.tokens.max()) < generator.vocab_size
        assert sum(int(step.changed.sum()) for step in remasked.trace) > length


@pytest.mark.parametrize("case", cases_of(["magvit2_video"]))
@torch.no_grad()
def test_the_published_video_tokenizer_is_causal_by_a_switch(case: Case, tmp_path: Path) -> None:
    """With the same weights; as published, what comes later changes the latents of the first frame."""
    load, clips = published(case, tmp_path), case.inputs["video"]
    later = torch.cat((clips[:, :, :1], clips[:, :, 1:].flip(0)), dim=2)
    for settings, causal in (({}, False), ({"causal": True}, True)):
        module = load(**settings)
        first, second = (module.latents(each)[:, 0] for each in (clips, later))
        assert torch.equal(first, second) == causal
        assert torch.equal(module.latents(clips[:, :, 0]), first) == causal


@pytest.mark.parametrize("case", cases_of(["magvit2_lfq", "ibq"]))
@torch.no_grad()
def test_the_weights_of_the_entropies(case: Case, tmp_path: Path) -> None:
    """w_s of the per-sample entropy, w_b of that of the batch, both times the weight of the entropy loss."""
    weights = {"sample_minimization_weight": 0.5, "batch_maximization_weight": 3.0}
    load = published(case, tmp_path)
    plain, weighted = (
        golden_tokenizers.quantize(module, module.network.encoder(case.inputs["x"])).losses
        for module in (load(), load(**weights))
    )
    torch.testing.assert_close(weighted["sample_entropy"], 0.5 * plain["sample_entropy"])
    torch.testing.assert_close(weighted["batch_entropy"], 3.0 * plain["batch_entropy"])
    with pytest.raises(ValueError, match="sample_minimization_weight=0, which is read with"):
        load(sample_minimization_weight=0)
