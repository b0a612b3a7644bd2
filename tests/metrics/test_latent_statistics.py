"""Channel statistics of latents against what is computed at once; which latents generators refuse."""

import pytest
import torch

from discrete_lit.metrics.latent_statistics import LatentStatistics, check_latent_scale, overall_deviation


def test_the_statistics_are_those_of_all_latents_at_once() -> None:
    torch.manual_seed(0)
    latents = torch.randn(12, 3, 4, 5) * torch.tensor([0.1, 1.0, 7.0])[:, None, None] + 100
    statistics = LatentStatistics(3)
    for batch in latents.split(5):
        statistics.update(batch)
    mean, deviation = statistics.compute()
    torch.testing.assert_close(mean, latents.double().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(deviation, latents.double().std(dim=(0, 2, 3)))
    # In half precision the sums stay what they are.
    torch.testing.assert_close(statistics.half().compute()[1], deviation)


def test_variances_count_as_if_latents_were_drawn() -> None:
    torch.manual_seed(0)
    mean, logvar = torch.randn(400, 2, 10, 10), torch.randn(400, 2, 10, 10) - torch.tensor([0.0, 3.0])[:, None, None]
    statistics = LatentStatistics(2)
    statistics.update(mean, logvar)
    drawn = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape)
    torch.testing.assert_close(statistics.compute()[1].float(), drawn.std(dim=(0, 2, 3)), rtol=0.02, atol=0)


def test_latents_that_are_none() -> None:
    statistics = LatentStatistics(2)
    with pytest.raises(ValueError, match=r"must be \(B, 2, \*grid\), got \(1, 3, 4\)"):
        statistics.update(torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((1, 2), float("nan")))


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.5])
def test_latents_of_about_unit_deviation_pass(scale: float) -> None:
    torch.manual_seed(0)
    check_latent_scale(torch.randn(4, 8, 6, 6) * scale)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1 / 0.2325, float("nan"), float("inf")])
def test_latents_of_another_scale_are_refused(scale: float) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"first batch of latents: .* about unit deviation, between 0\.5 and 2\.0, and these"
    ):
        check_latent_scale(torch.randn(4, 8, 6, 6) * scale)


def test_the_message_says_the_factor_that_is_missing() -> None:
    with pytest.raises(ValueError, match=r"a factor of 0\.25 would do"):
        check_latent_scale(torch.tensor([[4.0, -4.0]]))


@pytest.mark.parametrize(("shift", "passes"), [(0.5, True), (1.2, False)])
def test_latents_whose_mean_was_not_subtracted_are_refused(shift: float, passes: bool) -> None:
    """Their deviation about 0 is still below 2: it does not tell."""
    torch.manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(4)[None, :, None, None]
    latents = torch.randn(4, 8, 6, 6) + shift * signs
    if passes:
        check_latent_scale(latents)
        return
    assert latents.square().mean().sqrt() < 2
    with pytest.raises(ValueError, match=r"means about 0 in their channels, and these have -1\.\d+ to 1\.\d+"):
        check_latent_scale(latents)


def test_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        check_latent_scale(torch.zeros(2, 4, dtype=torch.int64))


def test_the_deviation_of_all_channels_together() -> None:
    torch.manual_seed(0)
    latents = torch.randn(50, 3, 4) * torch.tensor([0.5, 1.0, 3.0])[:, None] + torch.tensor([-1.0, 0.0, 4.0])[:, None]
    mean, deviation = (
        latents.double().mean(dim=(0, 2)).tolist(),
        latents.double().std(dim=(0, 2), correction=0).tolist(),
    )
    assert overall_deviation(mean, deviation) == pytest.approx(float(latents.double().std(correction=0)))
    about_zero = float(latents.double().square().mean().sqrt())
    assert overall_deviation(mean, deviation, about=0.0) == pytest.approx(about_zero)
