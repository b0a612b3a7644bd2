"""Shared by all tests: one thread, a fixed global seed, and factories of tiny models.

The factories import the package when they are called, so that tests of other parts do not pay for importing Lightning.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
# Before anything imports them: a failing assertion of theirs shows its values too.
pytest.register_assert_rewrite("helpers")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`slow_but(count)`: the fast tests have the first cases of a test, `make test-slow` has the rest."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("slow_but")
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > marker.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same global generator state."""
    torch.manual_seed(0)


@pytest.fixture
def make_backbone() -> Callable[..., Any]:
    """`make_backbone(attention, vocab_size=5, grid=(2, 3), num_classes=2, spread=0.3, **switches)`.

    A two-block, 16-wide Transformer in eval mode with random weights; `spread=None` keeps its own initialisation.
    """

    def make(
        attention: str,
        vocab_size: int = 5,
        grid: tuple[int, ...] = (2, 3),
        num_classes: int = 2,
        spread: float | None = 0.3,
        **switches: Any,
    ) -> Any:
        from helpers.random_weights import randomise

        from discrete_lit.backbones import SequenceLayout, Transformer

        mask_token = attention == "bidirectional"
        layout = SequenceLayout(vocab_size, grid, num_classes=num_classes, attention=attention, mask_token=mask_token)  # type: ignore[arg-type]
        backbone = Transformer(layout, width=16, depth=2, heads=2, **switches)
        return (backbone if spread is None else randomise(backbone, spread)).eval()

    return make


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer("fsq" | "vqvae", **arguments)`: 4x down, 12 ids; a few thousand parameters, in eval mode."""

    def make(kind: str = "fsq", **arguments: Any) -> Any:
        from discrete_lit.tokenizers import FSQ, VQVAE
        from discrete_lit.tokenizers.networks import ConvAutoencoder

        def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
            return ConvAutoencoder(code_dim, latent_dim, channels=8, multipliers=(1, 1, 2), blocks=1, norm_groups=4)

        if kind == "fsq":
            return FSQ(network, **{"levels": [4, 3], **arguments}).eval()
        return VQVAE(network, **{"codebook_size": 12, "code_dim": 3, **arguments}).eval()

    return make


@pytest.fixture
def make_grid_tokenizer() -> Callable[..., Any]:
    """`make_grid_tokenizer(vocab_size, token_shape)`: a tokenizer of any grid, without a network.

    Images are the ids themselves, spread over [-1, 1]; its one parameter makes its fingerprint its own.
    """

    def make(vocab_size: int, token_shape: tuple[int, ...]) -> Any:
        from discrete_lit.tokenizers import Tokenizer

        class GridTokenizer(Tokenizer):
            def __init__(self) -> None:
                super().__init__()
                self.vocab_size = vocab_size
                self.weight = nn.Parameter(torch.randn(2))

            def token_shape(self, image_size: int) -> tuple[int, ...]:
                return token_shape

            def encode(self, images: torch.Tensor) -> torch.Tensor:
                return ((images[:, 0] + 1) / 2 * (vocab_size - 1)).round().long().reshape(-1, *token_shape)

            def decode(self, tokens: torch.Tensor) -> torch.Tensor:
                self.check_tokens(tokens)
                return (tokens.reshape(len(tokens), 1, 1, -1) / (vocab_size - 1) * 2 - 1).expand(-1, 3, -1, -1)

            def embed(self, tokens: torch.Tensor) -> torch.Tensor:
                return tokens[:, None].float()

        return GridTokenizer()

    return make


@pytest.fixture
def make_generator(make_grid_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """`make_generator("masked" | "autoregressive", vocab_size=4, token_shape=(3,), num_classes=2, spread=None, ...)`.

    A generator around a two-block, 16-wide Transformer, in eval mode; `tokenizer`, `backbone` (switches of the
    Transformer) and every argument of the family may be given. `spread` randomises the backbone's weights.
    """

    def make(
        family: str,
        vocab_size: int = 4,
        token_shape: tuple[int, ...] = (3,),
        num_classes: int = 2,
        spread: float | None = None,
        tokenizer: Any = None,
        backbone: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        from helpers.random_weights import randomise

        from discrete_lit.backbones import SequenceLayout, Transformer
        from discrete_lit.generators import Autoregressive, Masked

        def build(layout: SequenceLayout) -> Transformer:
            return Transformer(layout, **{"width": 16, "depth": 2, "heads": 2, **(backbone or {})})

        generator = {"masked": Masked, "autoregressive": Autoregressive}[family](
            tokenizer=tokenizer or make_grid_tokenizer(vocab_size, token_shape),
            backbone=build,
            **{"image_size": 16, "num_classes": num_classes, **arguments},
        )
        if spread is not None:
            randomise(generator.backbone, spread)
        return generator.eval()

    return make
