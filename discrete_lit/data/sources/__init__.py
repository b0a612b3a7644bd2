"""Sources of images and clips: data sets as they are published, before they become shards.

Importing this package imports neither torch nor Lightning.
"""

from discrete_lit.data.sources.class_folders import ClassFolders, VideoFolders
from discrete_lit.data.sources.digit_compositions import DigitCompositions
from discrete_lit.data.sources.emoji import Emoji
from discrete_lit.data.sources.fashion_mnist import EmbeddedSet
from discrete_lit.data.sources.imagenet import ImageNetTrain, ImageNetValidation
from discrete_lit.data.sources.moving_digits import MovingDigits
from discrete_lit.data.sources.openclipart import OpenClipart
from discrete_lit.data.sources.part import PartOfSource
from discrete_lit.data.sources.source import Entry, Sample, Source
from discrete_lit.data.sources.spoken_digits import SpokenDigits
from discrete_lit.data.sources.spoken_prompts import SpokenPrompts
from discrete_lit.data.sources.tuxpaint import TuxpaintSpeech, TuxpaintStamps

__all__ = [
    "ClassFolders",
    "DigitCompositions",
    "EmbeddedSet",
    "Emoji",
    "Entry",
    "ImageNetTrain",
    "ImageNetValidation",
    "MovingDigits",
    "OpenClipart",
    "PartOfSource",
    "Sample",
    "Source",
    "SpokenDigits",
    "SpokenPrompts",
    "TuxpaintSpeech",
    "TuxpaintStamps",
    "VideoFolders",
]
