"""The Fréchet distance of reconstructions in a TensorBoard log, against one computed by hand."""

import torch

from discrete_lit.callbacks import ReconstructionFrechet
from discrete_lit.core.images import to_uint8
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.frechet import FeatureMoments, frechet_distance


class Corners(FeatureExtractor):
    """The first pixel and the last."""

    name, dim, protocol, weights_sha256 = "Corners", 6, "as it is", "0" * 64

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((images[:, :, 0, 0], images[:, :, -1, -1]), dim=1).float()


def test_distance_over_all_validation_batches(tokenizer, make_trainer, make_loader, read_scalars) -> None:
    callback = ReconstructionFrechet(Corners())
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(tokenizer, make_loader(2), make_loader(3))
    logged = read_scalars("validation/rFD-Corners")
    assert len(logged) == 2

    extractor = Corners()
    real, rebuilt = FeatureMoments(extractor), FeatureMoments(extractor)
    tokenizer.eval()
    with torch.no_grad():
        for batch in make_loader(3):
            real.update(extractor(to_uint8(batch["image"])))
            rebuilt.update(extractor(to_uint8(tokenizer.decode(tokenizer.encode(batch["image"])))))
    expected = frechet_distance(rebuilt.compute(), real.compute())
    torch.testing.assert_close(logged[max(logged)], expected, rtol=1e-4, atol=1e-4)
    assert logged[max(logged)] != logged[min(logged)]


def test_nothing_for_a_generator(generator, make_trainer, make_loader, read_scalars) -> None:
    trainer = make_trainer(callbacks=[ReconstructionFrechet(Corners())], max_epochs=1)
    trainer.fit(generator, make_loader(1), make_loader(1))
    assert not [name for name in trainer.callback_metrics if "rFD" in name]
