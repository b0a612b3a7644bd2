"""I3D: the layout of its published file, padding, and which distance may be called FVD."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.metrics import i3d
from discrete_lit.metrics.i3d import I3D, I3DNetwork, _maximum, _padded, git_blob


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    state = I3DNetwork().state_dict()
    torch.save({name: value for name, value in state.items() if "num_batches" not in name}, file)
    return file


def test_the_layout_of_the_published_file(weights: Path) -> None:
    """Counts and names of pytorch-i3d's `InceptionI3d(400)`."""
    state = I3DNetwork().state_dict()
    assert sum(value.numel() for name, value in I3DNetwork().named_parameters()) == 12_697_264
    assert {
        "Conv3d_1a_7x7.conv3d.weight",
        "Conv3d_2c_3x3.bn.running_var",
        "Mixed_4f.b2b.bn.bias",
        "Mixed_5c.b3b.conv3d.weight",
        "logits.conv3d.bias",
    } <= state.keys()
    assert state["Mixed_5c.b1b.conv3d.weight"].shape == (384, 192, 3, 3, 3)
    assert len([name for name in state if name.endswith("conv3d.weight")]) == 3 + 9 * 6 + 1


def test_logits_of_clips(weights: Path) -> None:
    """Grey clips are repeated; of 9 frames two are left, and their mean is taken; the distance is no FVD."""
    extractor = I3D(str(weights))
    assert extractor.metric_name == f"FD-I3D-{extractor.weights_sha256[:8]}" and extractor.dim == 400
    clips = torch.randint(0, 256, (1, 1, 9, 12, 10), dtype=torch.uint8)
    found = extractor(clips)
    assert found.shape == (1, 400) and found.dtype == torch.float32
    frames = F.interpolate(
        clips[0].transpose(0, 1).float() / 127.5 - 1, size=(224, 224), mode="bilinear", align_corners=False
    )
    whole = frames.transpose(0, 1).expand(3, -1, -1, -1)[None]
    torch.testing.assert_close(found, extractor.network(whole), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        extractor(clips[:, :, :8])
    with pytest.raises(ValueError, match="takes uint8 clips"):
        extractor(clips[:, :, 0])


def test_only_the_published_file_makes_an_fvd(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3d, "PUBLISHED_BLOB", git_blob(weights))
    assert I3D(str(weights)).metric_name == "FVD"


def test_the_name_that_git_gives(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")
    assert git_blob(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"  # `git hash-object`


def test_padding_is_tensorflows() -> None:
    """ceil(side / stride) positions, what is odd at the end."""
    row = torch.arange(1.0, 6.0).view(1, 1, 1, 1, 5)
    assert _padded(row, (1, 1, 3), (1, 1, 2)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert _padded(row[..., :4], (1, 1, 3), (1, 1, 2)).flatten().tolist() == [1, 2, 3, 4, 0]
    assert _maximum(row[..., :4], (1, 1, 3), (1, 1, 2)).flatten().tolist() == [3, 4]


def test_other_files_are_refused(tmp_path: Path, weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    del state["logits.conv3d.bias"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"the first is logits\.conv3d\.bias"):
        I3D(str(tmp_path / "cut.pt"))
    with pytest.raises(ValueError, match="there is no such file"):
        I3D(str(tmp_path / "nowhere.pt"))
