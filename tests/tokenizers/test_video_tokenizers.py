"""Tokenizers of clips: the tokenizers of images around a network of three axes."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.video import write_videos
from lightning import Trainer
from torch import Tensor

from discrete_lit.core.images import frames_of
from discrete_lit.data import VideoClips
from discrete_lit.tokenizers import FSQ, LFQ
from discrete_lit.tokenizers.losses import AdversarialLoss, Objective
from discrete_lit.tokenizers.losses.discriminators import PatchGAN
from discrete_lit.tokenizers.networks import ConvAutoencoder, LowResolutionAutoencoder
from discrete_lit.tokenizers.networks.network import Autoencoder

KINDS: dict[str, Any] = {
    "fsq": (FSQ, {"levels": [5, 4, 3]}),
    "lfq": (LFQ, {"bits": 6}),
    "low resolution": (FSQ, {"levels": [5, 4, 3]}),
}


def tokenizer(kind: str, causal: bool | Literal["convolutions"] = True, **training: Any) -> Any:
    """Clips of one channel, 5 x 8 x 8, to 3 x 2 x 2 ids, with norms of one channel each."""

    def network(code_dim: int, latent_dim: int) -> Autoencoder:
        if kind == "low resolution":
            widths: dict[str, Any] = {"widths": (8, 8), "decoder_widths": (4, 8, 8), "decoder_blocks": (0, 1, 1)}
            return LowResolutionAutoencoder(code_dim, latent_dim, image_channels=1, time_levels=[1], **widths)
        return ConvAutoencoder(
            code_dim,
            latent_dim,
            image_channels=1,
            channels=4,
            multipliers=(1, 1, 2),
            time_levels=(1,),
            blocks=1,
            attention=False,
            norm_groups=4,
            dims=3,
            causal=causal,
            adaptive_norm=True,
            downsampling="symmetric",
            upsampling="depth_to_space",
        )

    made, settings = KINDS[kind]
    return made(network, **settings, **training)


def first_ids_that_change(module: Any, clips: Tensor) -> set[int]:
    """Ids before the one of the first frame that is changed, of every frame."""
    ids, early = module.encode(clips), set()
    for start in range(1, clips.shape[2]):
        changed = clips.clone()
        changed[:, :, start:] = -changed[:, :, start:]
        different = (module.encode(changed) != ids).flatten(2).any(dim=2).any(dim=0)
        early |= {place for place in range(ids.shape[1]) if bool(different[place]) and 2 * place < start}
    return early


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_later_frames_cannot_change_earlier_ids(kind: str) -> None:
    clips = torch.rand(32, 1, 5, 8, 8) * 2 - 1
    module = tokenizer(kind).eval()
    ids = module.encode(clips)
    assert ids.shape == (32, 3, 2, 2) and module.token_shape((5, 8, 8)) == (3, 2, 2)
    assert module.modality == "video" and not module.makes_images
    assert module.decode(ids).shape == clips.shape and module.embed(ids).shape == (
        32,
        len(module.embed(ids)[0]),
        3,
        2,
        2,
    )
    assert not first_ids_that_change(module, clips)
    if kind == "low resolution":  # it has no other layout
        return
    assert first_ids_that_change(tokenizer(kind, causal="convolutions").eval(), clips)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_image_has_the_ids_of_a_clip_of_one_frame(kind: str) -> None:
    module = tokenizer(kind).eval()
    clips = torch.rand(4, 1, 5, 8, 8) * 2 - 1
    ids = module.encode(clips[:, :, 0])
    assert ids.shape == (4, 2, 2) and torch.equal(ids, module.encode(clips)[:, 0])
    assert module.decode(ids).shape == (4, 1, 8, 8)


@pytest.mark.parametrize("kind", ["fsq", "low resolution"])
def test_clips_that_do_not_fit(kind: str) -> None:
    module = tokenizer(kind)
    for clips, message in (
        (torch.zeros(1, 1, 4, 8, 8), r"4 frames .* its length must be 1 \+ a multiple of the down-sampling 2"),
        (torch.zeros(1, 1, 5, 8, 9), "image_size=9 is not a multiple of the down-sampling 4"),
        (torch.zeros(1, 3, 5, 8, 8), "the images have 3 channels"),
        (torch.full((1, 1, 5, 8, 8), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            module.encode(clips)


def test_images_and_clips_train_one_tokenizer(tmp_path: Path) -> None:
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    module = tokenizer("fsq", optimizer=optimizer)
    folder = str(write_videos(tmp_path / "clips", count=8))
    settings: dict[str, Any] = {"image_size": (5, 8, 8), "batch_size": 2, "num_workers": 0, "image_channels": 1}
    data = VideoClips(folder, folder, **settings, image_share=0.5)
    kinds = {name for batch in data.training_loader(0, 1) for name in ("image", "video") if name in batch}
    assert kinds == {"image", "video"}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, data)
    assert trainer.global_step == 4
    figures = trainer.callback_metrics
    assert {"validation/psnr", "validation/temporal_difference", "validation/codebook_usage"} <= figures.keys()
    with pytest.raises(ValueError, match='a batch holds label: this FSQ codes "video"'):
        module.coded_of({"label": torch.zeros(2)})


def test_clips_are_compared_frame_by_frame() -> None:
    """With a discriminator too: the loss of a clip is that of a batch of its frames."""
    clips, outputs = torch.rand(2, 1, 3, 16, 16), torch.rand(2, 1, 3, 16, 16, requires_grad=True)
    adversarial = AdversarialLoss(
        PatchGAN(image_channels=1, width=4, layers=1), start_step=0, weight=0.5, adaptive=False
    )
    objective = Objective("l1", adversarial_loss=adversarial)
    found = objective(outputs, clips, step=3, index=torch.arange(2))
    frames = frames_of(outputs.detach()).requires_grad_()
    expected = objective(frames, frames_of(clips), step=3, index=torch.arange(6))
    assert found.terms.keys() == expected.terms.keys()
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    of_clips = outputs.grad
    assert of_clips is not None
    expected.loss.backward()
    torch.testing.assert_close(frames_of(of_clips), frames.grad)
