"""Tokenizers: images to a grid of ids or of latent vectors, and back; what one is, and how a generator takes one.

`Tokenizer` is the contract of those with ids, `ContinuousTokenizer` of those with latent vectors. `from_checkpoint` and
`continuous_from_checkpoint` give a generator the frozen tokenizer of a checkpoint. `TokenGrid` stands where a
generator's tokenizer is missing: it knows the shape of the ids, and codes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor

from discrete_lit.checkpoints import load, loadable
from discrete_lit.core.files import content_sha256
from discrete_lit.core.host_copies import HostCopy
from discrete_lit.core.images import ImageSize
from discrete_lit.core.random import CounterRandom
from discrete_lit.tokenizers.quantizers.quantizer import Component


class Coder(LightningModule, ABC):
    """Tell by which weights a tokenizer codes, of ids or of latents, and refuse images that it cannot code."""

    makes_images: bool = True
    """Whether what it codes is images; text, clips, and grids without their tokenizer, have none."""

    modality: Literal["image", "audio", "video"] = "image"
    """The kind of its samples, and the name that they have in a batch."""

    late_checks: list[Callable[[], None]] | None = None
    """Where a list is set, `check_images` puts into it what raises its error, for whoever set it to call later: so that
    the host does not wait for the device in between."""

    def coding_state(self) -> dict[str, Tensor]:
        """The weights and buffers, by name, that `encode` and `decode` depend on: all unless a subclass says less."""
        return self.state_dict()

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError that names the images `(B, C, H, W)` in which a pixel is not a finite number."""
        finite = HostCopy(images.isfinite().flatten(1).all(dim=1))

        def check() -> None:
            broken = [str(place) for place, is_finite in enumerate(finite.values()) if not is_finite]
            if broken:
                raise ValueError(
                    f"{len(broken)} of {len(images)} images have pixels that are not finite numbers; their positions "
                    f"in the batch: {', '.join(broken[:10])}{', ...' if len(broken) > 10 else ''}"
                )

        if self.late_checks is None:
            check()
        else:
            self.late_checks.append(check)

    def fingerprint(self) -> str:
        """SHA-256 of the class's name and of `coding_state`, the same on any device: equal ones code alike."""

        def pieces() -> Iterator[str | bytes]:
            yield type(self).__qualname__
            for name, value in sorted(self.coding_state().items()):
                data = value.detach().cpu().contiguous()
                yield f"{name} {data.dtype} {tuple(data.shape)}"
                yield data.reshape(-1).view(torch.uint8).numpy().tobytes()

        return content_sha256(pieces())


@loadable
class Tokenizer(Coder):
    """Map images to a grid of token ids in [0, K), and back.

    Subclasses set `vocab_size` and implement the four methods below; a generator needs nothing else of a tokenizer.
    """

    vocab_size: int
    """K, the number of ids."""
    ordered_ids: bool = False
    """Whether ids that are near one another mean similar things, as grey levels do."""

    @abstractmethod
    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """Shape of the token grid of images of this size, the side of a square or (H, W): for instance `(16, 16)`.

        Raises:
            ValueError: a size that the down-sampling does not divide.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Turn images `(B, C, H, W)`, float in [-1, 1], into ids `(B, *token_shape)`, int64 in [0, K).

        Raises:
            ValueError: a size that the down-sampling does not divide; pixels that are not finite numbers.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn ids `(B, *token_shape)`, int64 in [0, K), into images `(B, C, H, W)` in [-1, 1].

        The images are float32 also where the tokenizer is in half precision, and float64 where it is in float64.

        Raises:
            ValueError: an id outside [0, K).
        """

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the code vectors `(B, D, *grid)` of ids `(B, *token_shape)`.

        Raises:
            ValueError: an id outside [0, K).
        """

    # What a tokenizer may add to that.

    def code_tables(self) -> Tensor | None:
        """List the code vectors of each of the P ids of a position, `(P, K, D)`; None where there are none to list."""
        return None

    def components(self, tokens: Tensor) -> dict[str, Component]:
        """Name the components of ids `(B, *token_shape)` whose usage is reported beside the whole; none by default."""
        return {}

    def texts(self, tokens: Tensor) -> list[str] | None:
        """The texts of ids `(B, *token_shape)`; None where they stand for no text."""
        return None

    # What every tokenizer has.

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a ValueError unless these are integers in [0, K)."""
        if tokens.is_floating_point():
            raise ValueError(
                f"a {type(self).__name__} decodes ids, integers in [0, {self.vocab_size}), got {tokens.dtype} "
                f"{tuple(tokens.shape)}: are these the latents of a continuous tokenizer?"
            )
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < self.vocab_size):
            raise ValueError(
                f"token ids must lie in [0, {self.vocab_size}), got [{int(tokens.min())}, {int(tokens.max())}]: "
                "were these tokens made by another tokenizer, or does a mask id remain?"
            )


@loadable
class ContinuousTokenizer(Coder):
    """Map images to a grid of latent vectors, scaled as generators of latents take them, and back.

    Subclasses set `latent_dim` and implement the four methods below; a generator needs nothing else of one. Scaled
    latents have a deviation near 1 over a data set, which `discrete_lit.metrics.latent_statistics` measures and checks.
    """

    latent_dim: int
    """D, the channels of a latent."""

    @abstractmethod
    def latent_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        """`(D, *grid)` of images of this size: the side of a square, or (H, W).

        Raises:
            ValueError: a size that the down-sampling does not divide.
        """

    @abstractmethod
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, `(B, D, *grid)` each, of the scaled latents of images `(B, C, H, W)`.

        They are float32, or float64 of a tokenizer in float64. Latents that are no random variable have the logarithm
        of the least variance that is stored, -30.

        Raises:
            ValueError: a size that the down-sampling does not divide; pixels that are not finite numbers.
        """

    @abstractmethod
    def encode(self, images: Tensor, random: CounterRandom | None = None) -> Tensor:
        """Turn images `(B, C, H, W)`, float in [-1, 1], into scaled latents `(B, D, *grid)`, float32 or float64.

        Args:
            images: of a size that the network can divide.
            random: the noise of each image's latents; None takes their means.

        Raises:
            ValueError: a size that the down-sampling does not divide; pixels that are not finite numbers.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn scaled latents `(B, D, *grid)` into images `(B, C, H, W)` in [-1, 1], float32 or float64.

        Raises:
            ValueError: ids, or latents of another number of channels.
        """

    def check_latents(self, latents: Tensor) -> None:
        """Raise a ValueError unless these are floating-point latents `(B, D, *grid)`."""
        if not latents.is_floating_point():
            raise ValueError(
                f"a {type(self).__name__} decodes latents, floating-point numbers (B, {self.latent_dim}, *grid), got "
                f"{latents.dtype} {tuple(latents.shape)}: are these the ids of a Tokenizer?"
            )
        if latents.ndim < 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(
                f"latents of this {type(self).__name__} are (B, {self.latent_dim}, *grid), got {tuple(latents.shape)}"
            )


def from_checkpoint(checkpoint: str, sha256: str | None = None) -> Tokenizer:
    """Load the frozen tokenizer of a checkpoint, for a generator's `tokenizer` argument.

    Args:
        checkpoint: a file written by `discrete-lit fit` on a Tokenizer.
        sha256: the expected `fingerprint()`; anything else is refused.

    Raises:
        ValueError: the file is missing, broken, holds no Tokenizer, or has another fingerprint.
    """
    return _frozen(checkpoint, sha256, Tokenizer, "its latents are continuous, take `continuous_from_checkpoint`")


def continuous_from_checkpoint(checkpoint: str, sha256: str | None = None) -> ContinuousTokenizer:
    """Load the frozen continuous tokenizer of a checkpoint, for the `tokenizer` argument of a generator of latents.

    Args:
        checkpoint: a file written by `discrete-lit fit` on a ContinuousTokenizer, such as `KLVAE`.
        sha256: the expected `fingerprint()`; anything else is refused.

    Raises:
        ValueError: the file is missing, broken, holds no ContinuousTokenizer, or has another fingerprint.
    """
    return _frozen(checkpoint, sha256, ContinuousTokenizer, "it codes ids, take `from_checkpoint`")


_Coder = TypeVar("_Coder", bound=Coder)


def _frozen(checkpoint: str, sha256: str | None, kind: type[_Coder], of_the_other: str) -> _Coder:
    tokenizer = load(checkpoint)
    if not isinstance(tokenizer, kind):
        other = f"{of_the_other}, or " if isinstance(tokenizer, Coder) else ""
        raise ValueError(
            f"tokenizer.checkpoint={checkpoint!r} holds a {type(tokenizer).__name__}, which is not a "
            f"{kind.__name__}: {other}give the checkpoint of one"
        )
    found = tokenizer.fingerprint()
    if sha256 is not None and found != sha256:
        raise ValueError(f"tokenizer.checkpoint={checkpoint!r} has fingerprint {found}, expected sha256={sha256}")
    return freeze(tokenizer)


def freeze(tokenizer: _Coder) -> _Coder:
    """Put a tokenizer into eval mode, without gradients, and return it."""
    return tokenizer.eval().requires_grad_(False)


class TokenGrid(Tokenizer):
    """Say how many ids there are and on what grid, in place of a tokenizer that is not there.

    A generator around it models and samples ids; images need the tokenizer that its tokens are of.

    Args:
        vocab_size: K.
        token_shape: of the grid, whatever the image size.

    Raises:
        ValueError: no ids or an empty grid; in use, whenever images or code vectors are asked for.
    """

    makes_images = False

    def __init__(self, vocab_size: int, token_shape: tuple[int, ...]) -> None:
        super().__init__()
        if vocab_size < 1 or not token_shape or min(token_shape) < 1:
            raise ValueError(f"vocab_size and token_shape must be positive, got {vocab_size} and {token_shape}")
        self.vocab_size = vocab_size
        self.grid = tuple(token_shape)

    def token_shape(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.grid

    def encode(self, images: Tensor) -> Tensor:
        self._refuse()

    def decode(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def embed(self, tokens: Tensor) -> Tensor:
        self._refuse()

    def coding_state(self) -> dict[str, Tensor]:
        """K and the grid: all that tells two of them apart."""
        return {"grid": torch.tensor((self.vocab_size, *self.grid))}

    def _refuse(self) -> NoReturn:
        shape = " x ".join(map(str, self.grid))
        raise ValueError(
            f"this generator was loaded without its tokenizer, which codes images as {shape} ids below "
            f"{self.vocab_size}: give it the tokenizer that its tokens are of to go from or to images"
        )
