"""Published generators of latents in turn: files that are not what their family's code makes are refused, and why."""

from pathlib import Path
from typing import Any

import pytest
from helpers.golden import Case
from helpers.golden_cases import cases_of
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.pretrained import load_pretrained
from discrete_lit.tokenizers import LatentGrid, TokenGrid


def load(
    case: Case, folder: Path, tokenizer: Any = None, /, changes: dict[str, Tensor] | None = None, **said: Any
) -> Any:
    save_file({**case.state, **(changes or {})}, folder / "published.safetensors")
    return load_pretrained(folder / "published.safetensors", case.family, {**case.arguments, **said}, tokenizer)


@pytest.mark.parametrize("case", cases_of(["xar"]))
def test_xar(case: Case, tmp_path: Path) -> None:
    generator = load(case, tmp_path)
    assert generator.latent_shape == (16, 16, 16) and generator.layout.cell_size == (8, 8)
    assert (generator.sampler.solver.steps, generator.sampler.guidance_scale) == (4, 2.7)
    mask, turns = case.state["mask"].clone(), "decoder_blocks.0.attn.rope.freqs_sin"
    mask[0, 0, 3, 70] = 0  # a place of the first cell sees one of the second
    with pytest.raises(ValueError, match="has a 'mask' that is not that of square cells one after another"):
        load(case, tmp_path, changes={"mask": mask})
    with pytest.raises(ValueError, match="has other rotations than those of the places in the order of the cells"):
        load(case, tmp_path, changes={turns: case.state[turns].roll(1, 0)})
    with pytest.raises(ValueError, match="clusters=16, but the tensors have 4"):
        load(case, tmp_path, clusters=16)
    with pytest.raises(ValueError, match=r"mlp_ratio=3\.0, but the tensors have an inner width of 85"):
        load(case, tmp_path, mlp_ratio=3.0)
    with pytest.raises(ValueError, match="gives no square image up to 2048 pixels latents of the shape"):
        load(case, tmp_path, LatentGrid((4, 16, 16)))


@pytest.mark.parametrize("case", cases_of(["tokenbridge"]))
def test_tokenbridge(case: Case, tmp_path: Path) -> None:
    generator = load(case, tmp_path)
    assert generator.latent_shape == (16, 3, 3) and generator.quantizer.levels == case.constructor["quant_levels"]
    assert generator.head.shifted_start and generator.head.order[:3] == [8, 1, 10]
    values = case.state["reconstruction_values"]
    with pytest.raises(ValueError, match="has other 'reconstruction_values' or 'boundaries' than 16 levels"):
        load(case, tmp_path, changes={"reconstruction_values": values + 0.01})
    with pytest.raises(ValueError, match="quant_levels=64, but the tensors have 16"):
        load(case, tmp_path, quant_levels=64)
    with pytest.raises(ValueError, match=r"std_range=2\.5"):
        load(case, tmp_path, std_range=2.5)
    with pytest.raises(ValueError, match=r"quant_min=5\.0, quant_max=5\.0"):
        load(case, tmp_path, quant_min=5.0)
    with pytest.raises(ValueError, match="family='tokenbridge' models latents, which a TokenGrid does not make"):
        load(case, tmp_path, TokenGrid(16, (3, 3, 16)))
    # Of other channels, nobody knows the order.
    narrow = {"z_proj.weight": case.state["z_proj.weight"][:, :8].contiguous()}
    with pytest.raises(ValueError, match="has 8 channels, but the order in which they are predicted is known for 16"):
        load(case, tmp_path, changes=narrow)
