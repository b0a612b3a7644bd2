"""Data: images or audio clips from shards or folders, arrays of tokens or latents, by DataModules that resume exactly.

The DataModules are imported when they are asked for: the commands that only write shards need neither torch nor
Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from discrete_lit.data.audio_clips import AudioClips
    from discrete_lit.data.image_folder import ImageFolder
    from discrete_lit.data.image_shards import ImageShards
    from discrete_lit.data.latent_arrays import LatentArrays, LatentWriter
    from discrete_lit.data.paired_token_arrays import PairedTokenArrays
    from discrete_lit.data.token_arrays import TokenArrays, TokenWriter
    from discrete_lit.data.video_clips import VideoClips

__all__ = [
    "AudioClips",
    "ImageFolder",
    "ImageShards",
    "LatentArrays",
    "LatentWriter",
    "PairedTokenArrays",
    "TokenArrays",
    "TokenWriter",
    "VideoClips",
]

_MODULES = {
    "AudioClips": "audio_clips",
    "ImageFolder": "image_folder",
    "ImageShards": "image_shards",
    "LatentArrays": "latent_arrays",
    "LatentWriter": "latent_arrays",
    "PairedTokenArrays": "paired_token_arrays",
    "TokenArrays": "token_arrays",
    "TokenWriter": "token_arrays",
    "VideoClips": "video_clips",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"discrete_lit.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'discrete_lit.data' has no attribute {name!r}")
