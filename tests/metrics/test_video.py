import pytest
import torch
from helpers.means_extractor import ColourMeans

from discrete_lit.core.images import from_uint8
from discrete_lit.metrics.frechet import compare
from discrete_lit.metrics.moments import FeatureMoments
from discrete_lit.metrics.reconstruction import pixel_fidelity
from discrete_lit.metrics.video import ClipFeatures, VideoFidelity, temporal_difference_error


def clips(count: int = 4, frames: int = 3) -> torch.Tensor:
    return torch.randint(0, 200, (count, 2, frames, 8, 8), dtype=torch.uint8)


def test_the_temporal_difference_error_sees_what_moves_alone() -> None:
    originals = clips()
    assert temporal_difference_error(originals + 20, originals).tolist() == [0] * 4
    frozen = originals[:, :, :1].expand_as(originals)
    change = (originals[:, :, 1:].double() - originals[:, :, :-1].double()).abs().mean(dim=(1, 2, 3, 4)) / 255
    torch.testing.assert_close(temporal_difference_error(frozen, originals).double(), change)
    with pytest.raises(ValueError, match="at least two frames"):
        temporal_difference_error(originals[:, :, :1], originals[:, :, :1])


def test_fidelity_by_frame_over_batches() -> None:
    originals, noise = clips(), torch.randint(0, 30, (4, 2, 3, 8, 8), dtype=torch.uint8)
    reconstructions = originals + noise
    reconstructions[:, :, 2] = originals[:, :, 2] + 50  # the last frame is the furthest away

    def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).abs().mean()

    metric = VideoFidelity(3, distance)
    metric.update(reconstructions[:3], originals[:3])
    metric.update(reconstructions[3:], originals[3:])
    found = metric.compute()
    for frame in range(3):
        psnr, _ = pixel_fidelity(reconstructions[:, :, frame], originals[:, :, frame])
        assert found.psnr_by_frame[frame] == pytest.approx(float(psnr.double().mean()))
        pair = from_uint8(reconstructions[:, :, frame]), from_uint8(originals[:, :, frame])
        assert found.lpips_by_frame is not None
        assert found.lpips_by_frame[frame] == pytest.approx(float(distance(*pair)), rel=1e-5)
    assert found.psnr == pytest.approx(sum(found.psnr_by_frame) / 3) and found.psnr_by_frame[2] == min(
        found.psnr_by_frame
    )
    expected = temporal_difference_error(reconstructions, originals).mean()
    assert found.temporal_difference == pytest.approx(float(expected))
    assert found.ssim is not None and 0 < found.ssim < 1

    images = VideoFidelity(1)
    images.update(originals[:, :, :1], originals[:, :, :1])
    assert images.compute().temporal_difference is None and images.compute().lpips_by_frame is None


def test_clips_of_other_shapes() -> None:
    for given, message in (
        ((clips(), clips()[:, :1]), "clips must be"),
        ((clips()[:, :, 0], clips()[:, :, 0]), "clips must be"),
        ((clips(frames=2), clips(frames=2)), "clips must have 3 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoFidelity(3).update(*given)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        VideoFidelity(0)


def test_a_distance_of_clips_sees_that_they_stand_still() -> None:
    """And is never called FVD: it is not of I3D."""
    originals = torch.randint(0, 200, (64, 3, 4, 6, 6), dtype=torch.uint8)
    frozen = originals[:, :, :1].expand_as(originals)
    features = ClipFeatures(ColourMeans())
    found = features(frozen)
    assert found.shape == (64, features.dim) and not found[:, 6:].any()
    assert torch.equal(features(originals[:, :, :1])[:, :6], found[:, :6].to(torch.float32))
    moments = {}
    for name, each in {"original": originals, "frozen": frozen}.items():
        moments[name] = FeatureMoments(features)
        moments[name].update(features(each))
    assert features.metric_name == "FD-Means-clips"
    result = compare(features, moments["frozen"].compute(), moments["original"].compute(), "the originals")
    assert result.value > 1
    with pytest.raises(ValueError, match="takes clips"):
        features(originals[:, :, 0])
