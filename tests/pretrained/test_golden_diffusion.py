"""Published diffusion models give what the reference repositories' own code computes; `test_golden.py` says how."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden_diffusion as golden
from safetensors.torch import load_file, save_file
from test_golden import cases, check, under

import discrete_lit
from discrete_lit.checkpoints import save
from discrete_lit.pretrained import load_pretrained
from discrete_lit.processes import CounterRandom
from discrete_lit.samplers import FirstHittingSampler, RemaskingSampler


@pytest.mark.parametrize("file", cases(golden.OUTPUTS))
@torch.no_grad()
def test_outputs_of_the_reference_diffusion(file: Path, tmp_path: Path) -> None:
    family = file.parent.name
    tensors = load_file(file)
    published = json.loads(file.with_suffix(".json").read_text())["constructor"]
    save_file(under("state.", tensors), tmp_path / "published.safetensors")

    def load(**reference: Any) -> Any:
        return load_pretrained(tmp_path / "published.safetensors", family, {**published, **reference})

    inputs, expected = under("in.", tensors), under("out.", tensors)
    found = golden.OUTPUTS[family](load, inputs)
    assert found.keys() == expected.keys() - golden.NO_PLACE.get(family, {}).keys()
    for name, value in found.items():
        reference = expected[name][golden.COMPARED.get(family, {}).get(name, ())]
        if name in golden.AS_PROBABILITIES.get(family, ()):
            value, reference = value.exp(), reference.exp()
        if name in golden.WHERE.get(family, {}):
            where = golden.WHERE[family][name](inputs)
            value, reference = value[where], reference[where]
        check(name, value, reference, tolerance=1e-5)

    first = load()
    assert not first.training and first.num_classes == 1
    save(first, tmp_path / "ours.ckpt")
    second = discrete_lit.load(tmp_path / "ours.ckpt")
    assert type(second) is type(first) and second.hparams == first.hparams
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("file", cases(["titok_imagebert", "titok_uvitbert", "halton_maskgit"]))
@torch.no_grad()
def test_published_masked_generators_are_sampled_as_diffusion(file: Path, tmp_path: Path) -> None:
    """First hitting draws from the law that reveals along its order; remasking changes what it had drawn."""
    published = json.loads(file.with_suffix(".json").read_text())["constructor"]
    save_file(under("state.", load_file(file)), tmp_path / "published.safetensors")
    generator: Any = load_pretrained(tmp_path / "published.safetensors", file.parent.name, published)
    length, label = generator.length, torch.tensor([1])
    random = CounterRandom(0, torch.arange(1))
    drawn = generator.draw(label, random, FirstHittingSampler(), trace=True)
    assert drawn.sequential_passes == len(drawn.trace) == length
    order = torch.stack([step.changed[0].int().argmax() for step in drawn.trace])
    assert sorted(order.tolist()) == list(range(length))
    drawn_with = sum(step.confidence[0, place] for step, place in zip(drawn.trace, order, strict=True))
    along = generator.log_likelihood(drawn.tokens, label, order=order)
    assert along.kind == "exact" and torch.allclose(along.nats, drawn_with, rtol=1e-5)

    for strategy in ("cap", "rescale", "conf", "loop"):
        remasked = generator.draw(label, random, RemaskingSampler(strategy, eta=0.5, steps=3 * length), trace=True)
        assert 0 <= int(remasked.tokens.min()) and int(remasked.tokens.max()) < generator.vocab_size
        assert sum(int(step.changed.sum()) for step in remasked.trace) > length
