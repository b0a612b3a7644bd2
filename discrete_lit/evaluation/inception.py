"""The Inception network of FID."""

from pathlib import Path

from torch import Tensor

from discrete_lit.evaluation.features import FeatureExtractor
from discrete_lit.files import file_sha256

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


class InceptionV3(FeatureExtractor):
    """The 2048 pooled features of the 2015 TensorFlow Inception-v3 (Heusel et al. 2017), as ported by torch-fidelity.

    Only with its original weights is the distance called `FID`; with any others it is `FD-InceptionV3-<first 8 digits
    of their hash>`.

    Args:
        weights: path of the weight file (95,628,359 bytes; `WEIGHTS_URL` in this module).
        sha256: SHA-256 that the file must have. Its loader unpickles, which can execute code, so a file with another
            hash is refused before it is opened; give another hash only for a file that you made.

    Raises:
        ValueError: no such file, or a file with another hash.
    """

    dim = 2048
    protocol = "float32 pixels, bilinear resize to 299x299 on TensorFlow 1's sampling grid, (pixel - 128) / 128"

    def __init__(self, weights: str, sha256: str = WEIGHTS_SHA256) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise ValueError(f"extractor.weights={weights!r} does not exist; download {WEIGHTS_URL}")
        self.weights_sha256 = file_sha256(weights)
        if self.weights_sha256 != sha256:
            raise ValueError(
                f"extractor.weights={weights!r} has SHA-256 {self.weights_sha256}, expected {sha256}: it was not loaded"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        original = self.weights_sha256 == WEIGHTS_SHA256
        self.name = "InceptionV3" if original else f"InceptionV3-{self.weights_sha256[:8]}"
        self.network = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=weights)
        self.requires_grad_(False).eval()

    @property
    def metric_name(self) -> str:
        return "FID" if self.weights_sha256 == WEIGHTS_SHA256 else f"FD-{self.name}"

    def extract(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return features
