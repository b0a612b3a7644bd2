"""SEDD and MDLM: sizes, averages, what is refused, and that they sample."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published_generators import ddit as shapes
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.conversion import FAMILIES, convert
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

FAMILY_NAMES = ("sedd_absorb", "sedd_uniform", "mdlm")
TINY: dict[str, Any] = {"width": 16, "depth": 2, "condition_width": 8, "rows": 9}
REFERENCE = {"model": {"length": 12, "n_heads": 2}}


def named(family: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone." if family == "mdlm" else ""
    waves = len(tensors["rotary_emb.inv_freq"])
    tensors["rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(waves) / waves)
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """`load(family, change, **reference)`: a tiny checkpoint after a change of the file's content."""

    def load(family: str, change: Callable[[dict[str, Any]], Any] | None = None, **reference: Any) -> Any:
        torch.manual_seed(0)
        state = named(family, {name: torch.randn(shape) * 0.1 for name, shape in shapes(**TINY).items()})
        content: dict[str, Any] = {"state_dict" if family == "mdlm" else "model": state}
        if change is not None:
            change(content)
        torch.save(content, tmp_path / "published.ckpt")
        return load_pretrained(tmp_path / "published.ckpt", family, {**REFERENCE, **reference})

    return load


@pytest.mark.parametrize(("family", "rows"), [("sedd_absorb", 50258), ("sedd_uniform", 50257), ("mdlm", 50258)])
@pytest.mark.parametrize(("size", "millions"), [((768, 12, 12), "170"), ((1024, 24, 16), "424")])
def test_published_sizes(family: str, rows: int, size: tuple[int, int, int], millions: str) -> None:
    """SEDD's small and medium, MDLM's small, on GPT-2's vocabulary, without arguments."""
    width, depth, heads = size
    published = shapes(width, depth, 128, rows)
    count = sum(torch.Size(shape).numel() for name, shape in published.items() if "inv_freq" not in name)
    assert f"{count / 1e6:.0f}" == millions
    state = State(named(family, {name: torch.empty(shape, device="meta") for name, shape in published.items()}), family)
    alike = [name for name, known in FAMILIES.items() if not known.lacks(state)]
    assert alike == (["mdlm"] if family == "mdlm" else ["sedd_absorb", "sedd_uniform"])
    conversion = FAMILIES[family].convert(state, Settings())
    assert conversion.tokens is not None and conversion.tokens.vocab_size == 50257
    assert conversion.tokens.shape == (1024,)
    scores = family.startswith("sedd")
    layout = SequenceLayout(
        50257,
        conversion.tokens.shape,
        num_classes=1,
        attention="bidirectional",
        mask_token=family != "sedd_uniform",
        timed=scores,
        mask_output=family == "sedd_absorb",
    )
    with torch.device("meta"):
        own = Transformer(layout, **conversion.config["init_args"]["backbone"]["init_args"])
    assert own.heads == heads
    convert(own.state_dict(), conversion, family)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_averages_are_loaded(family: str, load: Callable[..., Any]) -> None:
    """A list without names, in the order of the parameters."""

    def average(content: dict[str, Any]) -> None:
        (state,) = content.values()
        averaged = [value + 1 for name, value in state.items() if "inv_freq" not in name]
        content["ema"] = {"decay": 0.9999, "num_updates": 7, "shadow_params": averaged}

    raw, averaged = load(family).backbone.state_dict(), load(family, average).backbone.state_dict()
    ours = [name for name in raw if not name.startswith("class_embedding")]
    assert all(torch.allclose(averaged[name], raw[name] + 1) for name in ours)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_they_sample_ids(family: str, load: Callable[..., Any]) -> None:
    generator = load(family)
    vocab_size = 9 if family == "sedd_uniform" else 8
    assert generator.token_shape == (12,) and generator.vocab_size == vocab_size
    tokens = generator.sample(torch.zeros(3, dtype=torch.int64))
    assert tokens.shape == (3, 12) and 0 <= int(tokens.min()) and int(tokens.max()) < vocab_size
    assert len(tokens.unique()) > 1
    likelihood = generator.log_likelihood(tokens, torch.zeros(3, dtype=torch.int64))
    assert likelihood.kind == "bound" and bool((likelihood.nats < 0).all())


def test_the_time_of_mdlm_is_that_of_no_noise(load: Callable[..., Any]) -> None:
    """A model that was always told sigma = 0 is ours without a time."""
    states, labels = torch.randint(9, (2, 12)), torch.tensor([0, 1])
    told = load("mdlm", time_conditioning=True).backbone(states, labels, time=torch.zeros(2))
    assert torch.allclose(load("mdlm").backbone(states, labels), told, atol=1e-6)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_another_rotation_is_refused(family: str, load: Callable[..., Any]) -> None:
    def turn(content: dict[str, Any]) -> None:
        for state in content.values():
            for name in state:
                if name.endswith("inv_freq"):
                    state[name] = 500.0 ** -(torch.arange(4) / 4)

    with pytest.raises(ValueError, match=r"rotary_emb\.inv_freq is not that of base 10000"):
        load(family, turn)


@torch.no_grad()
def test_a_mask_among_the_ids(load: Callable[..., Any]) -> None:
    """As BERT's tokenizer has one: ids stay what they are, and that of the mask is never drawn."""
    inside, last = load("mdlm", mask_index=3), load("mdlm")
    assert (inside.vocab_size, last.vocab_size) == (9, 8)
    states, labels = torch.randint(9, (2, 12)), torch.zeros(2, dtype=torch.int64)
    # Ours of the last mask, at theirs.
    logits = inside.backbone(torch.where(states == 3, 9, states), labels)
    others = [place for place in range(9) if place != 3]
    torch.testing.assert_close(logits[..., others[:-1]], last.backbone(states, labels)[..., others[:-1]])
    assert bool((logits.softmax(dim=-1)[..., 3] == 0).all())
    tokens = inside.sample(torch.zeros(50, dtype=torch.int64))
    assert 3 not in tokens and 8 in tokens
    likelihood = inside.log_likelihood(tokens[:2], labels)
    assert bool(likelihood.nats.isfinite().all())


def test_the_samplers_settings(load: Callable[..., Any]) -> None:
    euler = load("sedd_absorb", sampling={"predictor": "euler", "steps": 7, "noise_removal": True}).sampler
    assert type(euler).__name__ == "EulerSampler" and euler.steps == 7 and euler.guidance_law == "score"
    geometric = load("mdlm", noise={"type": "geometric", "sigma_min": "1e-3"}, sampling={"steps": 9})
    assert geometric.sampler.steps == 9 and geometric.denoiser().schedule.sigma_min == 1e-3


@pytest.mark.parametrize(
    ("family", "reference", "message"),
    [
        ("sedd_absorb", {"graph": {"type": "uniform"}}, "type=uniform, but family='sedd_absorb' has absorb"),
        ("sedd_absorb", {"tokens": 9}, r"has 9 embeddings for 9 tokens and a mask: is its family 'sedd_uniform'"),
        ("sedd_uniform", {"tokens": 8}, r"has 9 embeddings for 8 tokens: is its family 'sedd_absorb'"),
        ("sedd_uniform", {"model": {"length": 12, "n_heads": 2, "scale_by_sigma": True}}, "refuses with 'uniform'"),
        ("sedd_absorb", {"noise": {"type": "cosine"}}, "noise.type='cosine'; loglinear and geometric are read"),
        ("sedd_absorb", {"model": {"hidden_size": 32}}, "hidden_size=32, but the tensors have 16"),
        ("sedd_absorb", {"model": {"n_heads": 3}}, "has model.n_heads=3, which does not divide the 16 channels"),
        ("mdlm", {"mask_index": 9}, "mask_index=9, but the tensors have 9 ids"),
        ("mdlm", {"vocab_size": 8}, "vocab_size=8, but the tensors have 9"),
        ("mdlm", {"parameterization": "d3pm"}, "parameterization=d3pm, but every model that is read has subs"),
        ("mdlm", {"sampling": {"noise_removal": False}}, "sampling.noise_removal=False, but a sampler that leaves no"),
        ("mdlm", {"T": 1000}, "T=1000, but every model that is read has 0"),
    ],
)
def test_what_is_refused(family: str, reference: dict[str, Any], message: str, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        load(family, **reference)


def test_the_published_vocabulary_tells_the_family() -> None:
    state = State({name: torch.empty(0) for name in shapes(**TINY)}, "x")
    state["vocab_embed.embedding"] = torch.empty(50257, 16)
    with pytest.raises(ValueError, match="50257 embeddings for 50257 tokens and a mask: is its family 'sedd_uniform'"):
        FAMILIES["sedd_absorb"].convert(state, Settings())
