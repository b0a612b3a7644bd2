"""Published layouts give what the reference repositories' own code computes.

`DISCRETE_LIT_GOLDEN` names a folder with one folder a family; each case is a safetensors file of `state.<published
key>`, `in.<name>` and `out.<name>`, and a JSON file beside it that says what each is.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = os.environ.get("DISCRETE_LIT_GOLDEN")
# Of generators, which are not loaded yet.
NOT_YET = {
    "halton_maskgit",
    "llamagen_gpt_c2i",
    "maskbit_bert",
    "maskbit_lfqbert",
    "maskgit_jax_decode",
    "mdlm",
    "rar",
    "sedd_absorb",
    "sedd_uniform",
    "taming_net2net",
    "titok_imagebert",
    "titok_uvitbert",
    "var_transformer",
}
NO_PLACE = {
    ("maskgit_vqgan", "soft_code"): "a softmax over codes that no training of ours distils",
}


def cases() -> list[Any]:
    if GOLDEN is None:
        reason = "DISCRETE_LIT_GOLDEN, the folder of the reference outputs, is not set"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    files = sorted(Path(GOLDEN).glob("*/*.safetensors"))
    return [pytest.param(file, id=f"{file.parent.name}-{file.stem}") for file in files]


@pytest.mark.skipif(GOLDEN is None, reason="DISCRETE_LIT_GOLDEN is not set")
def test_every_family_is_loaded_or_named_as_not_yet() -> None:
    from golden_outputs import OUTPUTS

    from discrete_lit.pretrained import FAMILIES

    found = {file.parent.name for file in Path(str(GOLDEN)).glob("*/*.safetensors")}
    assert found == FAMILIES.keys() | NOT_YET and not FAMILIES.keys() & NOT_YET
    assert OUTPUTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("file", cases())
def test_outputs_of_the_reference(file: Path, tmp_path: Path) -> None:
    from golden_outputs import OUTPUTS

    import discrete_lit
    from discrete_lit.checkpoints import save
    from discrete_lit.pretrained import load_pretrained

    family = file.parent.name
    if family in NOT_YET:
        pytest.skip(f"{family} is a generator, which is not loaded yet")
    tensors = load_file(file)
    published = json.loads(file.with_suffix(".json").read_text())["constructor"]
    weights = tmp_path / "published.safetensors"
    save_file(under("state.", tensors), weights)

    first = load_pretrained(weights, family, published)
    assert not first.training

    def load(**reference: Any) -> Any:
        return load_pretrained(weights, family, {**published, **reference}) if reference else first

    inputs, expected = under("in.", tensors), under("out.", tensors)
    found = OUTPUTS[family](load, inputs, published)
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


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Integers exactly, numbers within 1e-4 of the largest of the reference."""
    found = found.reshape(expected.shape) if found.dim() == 0 else found
    assert found.shape == expected.shape, name
    if expected.dtype == torch.int64:
        assert torch.equal(found, expected), name
    else:
        tolerance = 1e-4 * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= tolerance, name
