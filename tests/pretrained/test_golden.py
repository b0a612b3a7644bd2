"""Published layouts give what the reference repositories' own code computes.

`DISCRETE_LIT_GOLDEN` names a folder with one folder a family; each case is a safetensors file of `state.<published
key>`, `in.<name>` and `out.<name>`, and a JSON file beside it that says what each is.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import golden_diffusion, golden_generators, golden_outputs, golden_samples
from safetensors.torch import load_file, save_file

import discrete_lit
from discrete_lit.checkpoints import save
from discrete_lit.pretrained import FAMILIES, load_pretrained

GOLDEN = os.environ.get("DISCRETE_LIT_GOLDEN")
NOT_YET = {
    "maskgit_jax_decode": "MaskGIT's own decoding, which is no checkpoint",
}
NO_PLACE = {
    ("maskgit_vqgan", "soft_code"): "a softmax over codes that no training of ours distils",
}


def cases(families: Collection[str]) -> list[Any]:
    if GOLDEN is None:
        reason = "DISCRETE_LIT_GOLDEN, the folder of the reference outputs, is not set"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    files = [file for file in sorted(Path(GOLDEN).glob("*/*.safetensors")) if file.parent.name in families]
    return [pytest.param(file, id=f"{file.parent.name}-{file.stem}") for file in files]


@pytest.mark.skipif(GOLDEN is None, reason="DISCRETE_LIT_GOLDEN is not set")
def test_every_family_is_loaded_or_named_as_not_yet() -> None:
    found = {file.parent.name for file in Path(str(GOLDEN)).glob("*/*.safetensors")}
    assert found == FAMILIES.keys() | NOT_YET.keys() and not FAMILIES.keys() & NOT_YET.keys()
    tested = golden_outputs.OUTPUTS.keys() | golden_generators.OUTPUTS.keys() | golden_diffusion.OUTPUTS.keys()
    assert tested == FAMILIES.keys()


@pytest.mark.parametrize("file", cases(golden_outputs.OUTPUTS))
def test_outputs_of_the_reference(file: Path, tmp_path: Path) -> None:
    family = file.parent.name
    tensors = load_file(file)
    published = json.loads(file.with_suffix(".json").read_text())["constructor"]
    weights = tmp_path / "published.safetensors"
    save_file(under("state.", tensors), weights)

    first = load_pretrained(weights, family, published)
    assert not first.training

    def load(**reference: Any) -> Any:
        return load_pretrained(weights, family, {**published, **reference}) if reference else first

    inputs, expected = under("in.", tensors), under("out.", tensors)
    found = golden_outputs.OUTPUTS[family](load, inputs, published)
    without_place = {name for other, name in NO_PLACE if other == family}
    assert without_place <= expected.keys() and not without_place & found.keys()
    for name in expected.keys() - without_place:
        check(name, found[name].detach(), expected[name])

    save(first, tmp_path / "ours.ckpt")
    second = discrete_lit.load(tmp_path / "ours.ckpt")
    assert type(second) is type(first) and second.hparams == first.hparams
    state = second.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    images = inputs["x"] * 2 - 1
    with torch.no_grad():
        tokens = first.encode(images)
        assert torch.equal(second.encode(images), tokens)
        assert torch.equal(second.decode(tokens), first.decode(tokens))


@pytest.mark.parametrize("file", cases(golden_generators.OUTPUTS))
@torch.no_grad()
def test_outputs_of_the_reference_generators(file: Path, tmp_path: Path) -> None:
    family = file.parent.name
    tensors = load_file(file)
    published = json.loads(file.with_suffix(".json").read_text())["constructor"]
    state, tokenizer = under("state.", tensors), None
    if family == "var_transformer":
        # Two published files.
        save_file(under("vae.", state), tmp_path / "tokenizer.safetensors")
        tokenizer = load_pretrained(tmp_path / "tokenizer.safetensors", "var_vqvae", published["vae"])
        state = under("var.", state)
    save_file(state, tmp_path / "published.safetensors")
    first = load_pretrained(tmp_path / "published.safetensors", family, published, tokenizer)
    assert not first.training and not first.tokenizer.training

    inputs, expected = under("in.", tensors), under("out.", tensors)
    logits = golden_generators.OUTPUTS[family]
    found = logits(first, inputs)
    found |= golden_samples.SAMPLES[family](first, inputs)
    without_place = golden_generators.NO_PLACE.get(family, {}).keys()
    assert without_place <= expected.keys() and found.keys() == expected.keys() - without_place
    for name, value in found.items():
        part = golden_generators.COMPARED.get(family, {}).get(name, ())
        check(name, value, expected[name][part])

    save(first, tmp_path / "ours.ckpt")
    second = discrete_lit.load(tmp_path / "ours.ckpt")
    assert type(second) is type(first) and second.hparams == first.hparams
    assert all(torch.equal(value, found[name]) for name, value in logits(second, inputs).items())


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Integers exactly, numbers within a share of the largest of the reference."""
    found = found.reshape(expected.shape) if found.dim() == 0 else found
    assert found.shape == expected.shape, name
    if expected.dtype == torch.int64:
        assert torch.equal(found, expected), name
    else:
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name
