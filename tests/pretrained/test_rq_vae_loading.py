"""RQ-VAE's checkpoints: what its configuration says, and what is refused of it."""

from pathlib import Path

import pytest
from helpers.golden import Case, published
from helpers.golden_cases import cases_of

rq_vae = pytest.mark.parametrize("case", cases_of(["rq_vae"]))


@rq_vae
def test_settings_of_the_training(case: Case, tmp_path: Path) -> None:
    load = published(case, tmp_path)
    module = load(restart_unused_codes=False, decay=0.9, latent_loss_weight=0.5, loss_type="l1")
    assert module.quantizer.commitment_weight == 0.5
    assert [(codebook.revive_below, codebook.decay) for codebook in module.quantizer.codebooks] == [(None, 0.9)]
    _, terms, made = module.loss(case.inputs["x"])
    expected = (made.outputs - case.inputs["x"]).abs().mean()
    assert terms["reconstruction"].item() == pytest.approx(expected.item())


@rq_vae
def test_what_is_refused(case: Case, tmp_path: Path) -> None:
    load = published(case, tmp_path)
    height, width, depth = case.constructor["code_shape"]
    several = [height // 2, width // 2, depth]
    with pytest.raises(ValueError, match="makes one position of codes of several latents"):
        load(code_shape=several)
    with pytest.raises(ValueError, match=rf"code_shape=\[8, 8, 9\], but the tensors have {depth}"):
        load(code_shape=[height, width, 9])
    with pytest.raises(ValueError, match="shared_codebook=False, but the tensors have True"):
        load(shared_codebook=False)
    with pytest.raises(ValueError, match="n_embed=7, but the tensors have"):
        load(n_embed=7)
