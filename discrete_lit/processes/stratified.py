"""Times of diffusion's losses, spread evenly over a batch: the mean over t is then estimated with less noise."""

from torch import Tensor

from discrete_lit.processes.random import CounterRandom, Purpose

# 2^64 over the golden ratio, odd, as a signed number: multiples of it fill the circle evenly (Weyl).
_GOLDEN = -7046029254386353131


def stratified_times(random: CounterRandom, strata: int) -> Tensor:
    """One time in each of `strata` equal parts of (0, 1) for that many samples in a row.

    A sample's place in the run, modulo `strata`, is its part, so a batch of samples that follow one another has one
    time in each, however it is split over ranks and after a resume (Kingma et al., "Variational Diffusion Models",
    2021, appendix I.1; MDLM draws within the parts as here).

    Args:
        random: one stream for each sample.
        strata: samples of the batch over all ranks.

    Returns:
        `(B, 1)` float64 in (0, 1).
    """
    part = (random.indices % strata)[:, None].double()
    times = (part + random.uniform(Purpose.MASK_RATIO, 1)) / strata
    return times.clamp(max=1 - 2.0**-53)  # the sum may round up


def spread_times(random: CounterRandom) -> Tensor:
    """Times `(B, 1)` that are evenly spread over every run of samples, whatever the batches: for validation.

    Each is uniform over seeds, and a function of seed and index alone.
    """
    shift = CounterRandom(random.seed, random.indices.new_zeros(1)).uniform(Purpose.MASK_RATIO, 1)
    turn = ((random.indices * _GOLDEN) >> 11) & (2**53 - 1)  # the upper bits of a product modulo 2^64
    times = (turn.double()[:, None] * 2.0**-53 + shift) % 1
    return times.clamp(2.0**-53, 1 - 2.0**-53)
