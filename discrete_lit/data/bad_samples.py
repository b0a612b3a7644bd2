"""Samples that cannot be read: logged one by one, counted, and fatal past a set fraction."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

logger = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """A sample that could not be used: its key, the file or shard it is in, and why."""

    key: str
    source: str
    reason: str


class TooManyBadSamples(ValueError):
    """More samples were unreadable than the run accepts."""


class BadSampleCount:
    """Count of bad samples in one epoch of one rank.

    Args:
        samples: how many samples the epoch has on this rank.
        maximum_fraction: how many of them may be bad before the run fails; 0 fails at the first.
    """

    def __init__(self, samples: int, maximum_fraction: float):
        if not 0 <= maximum_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {maximum_fraction}; it must be between 0 and 1")
        self.samples = samples
        self.maximum_fraction = maximum_fraction
        self.count = 0

    def add(self, bad: Iterable[BadSample]) -> None:
        """Log and count.

        Raises:
            TooManyBadSamples: the accepted fraction is passed.
        """
        for sample in bad:
            self.count += 1
            logger.warning(
                "skipped bad sample %r of %s: %s (%d of %d in this epoch)", *sample, self.count, self.samples
            )
            if self.count > self.maximum_fraction * self.samples:
                raise TooManyBadSamples(
                    f"{self.count} of {self.samples} samples are bad, more than max_bad_fraction = "
                    f"{self.maximum_fraction} accepts; the last is {sample.key!r} of {sample.source}: {sample.reason}. "
                    "Repair or remove the files, or raise max_bad_fraction."
                )
