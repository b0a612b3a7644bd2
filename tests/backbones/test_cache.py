"""The key-value cache: its length, its fill mark and its rows."""

import pytest
import torch

from discrete_lit.backbones.cache import Cache, new_buffers


def new_cache(batch: int = 2, length: int = 4) -> Cache:
    return Cache(
        [],
        new_buffers(
            layers=2, batch=batch, heads=1, length=length, head_dim=3, device=torch.device("cpu"), dtype=torch.float32
        ),
    )


def test_a_cache_too_short_is_refused() -> None:
    cache, values = new_cache(length=4), torch.randn(2, 1, 3, 3)
    cache.layer(0).append(values, values)
    cache.advance(3)
    with pytest.raises(ValueError, match="the key-value cache holds 4 positions, 6 were asked for"):
        cache.layer(0).append(values, values)
    keys, _ = cache.layer(0).append(values[:, :, :1], values[:, :, :1])
    assert keys.shape == (2, 1, 4, 3)


def test_a_backbone_with_a_cache_of_shorter_sequences(make_backbone) -> None:
    backbone, labels = make_backbone("causal", grid=(2, 3)), torch.tensor([0, 1])
    short = make_backbone("causal", grid=(2, 2)).new_cache(labels)
    with pytest.raises(ValueError, match="the key-value cache holds 4 positions, 5 were asked for"):
        backbone(torch.zeros(2, 4, dtype=torch.int64), labels, short)


def test_every_layer_is_written_behind_the_fill_mark() -> None:
    cache, keys, values = new_cache(), torch.randn(2, 2, 1, 4, 3), torch.randn(2, 2, 1, 4, 3)
    for part in (slice(0, 3), slice(3, 4)):
        for layer in range(2):
            seen = cache.layer(layer).append(keys[layer, :, :, part], values[layer, :, :, part])
            torch.testing.assert_close(seen, (keys[layer, :, :, : part.stop], values[layer, :, :, : part.stop]))
        cache.advance(part.stop - part.start)
    assert (cache.filled, cache.length, cache.holds_keys) == (4, 4, True)


def test_the_first_rows_go_on_where_the_cache_is() -> None:
    cache, keys = new_cache(batch=3), torch.randn(3, 1, 2, 3)
    cache.layer(1).append(keys, keys)
    cache.advance(2)
    rows = cache.first_rows(1)
    seen, _ = rows.layer(1).append(keys[:1, :, :1], keys[:1, :, :1])
    torch.testing.assert_close(seen, torch.cat((keys[:1], keys[:1, :, :1]), dim=2))
