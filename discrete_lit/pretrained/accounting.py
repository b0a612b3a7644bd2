"""Every published tensor becomes one of ours or is dropped by a named rule, and ours are all met."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from discrete_lit.pretrained.registry import Conversion

_MOST_SHOWN = 5


def convert(own: Mapping[str, Tensor], conversion: Conversion, source: str) -> dict[str, Tensor]:
    """The published weights under our names, in the precision of ours.

    Args:
        own: the state dict of our module, whose names and shapes must all be met.
        conversion: the published tensors and the rules for them.
        source: of the weights, for messages.

    Raises:
        ValueError: a missing, unexpected or misshapen tensor; it names them.
    """
    published, made, used, wrong = conversion.tensors, dict[str, Tensor](), set[str](), list[str]()
    for name, value in own.items():
        if _fits(name, conversion.kept):
            made[name] = value
            continue
        names = conversion.renaming.published(name)
        assert names, f"no rule for {name}"
        assert not used.intersection(names), f"{names} used twice"
        used.update(names)
        missing = [key for key in names if key not in published]
        wrong += [f"{key!r} is missing" for key in missing]
        if not missing:
            given = published[names[0]] if len(names) == 1 else torch.cat([published[key] for key in names])
            # A 1x1 convolution is a linear layer.
            if given.dim() > value.dim() and given.shape == (*value.shape, *(1,) * (given.dim() - value.dim())):
                given = given.reshape(value.shape)
            if given.shape != value.shape:
                keys = " + ".join(map(repr, names))
                wrong.append(f"{keys} has shape {tuple(given.shape)} instead of {tuple(value.shape)}")
            made[name] = given.to(value.dtype)
    wrong += [f"{key!r} is unexpected" for key in published if key not in used and not _fits(key, conversion.dropped)]
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise ValueError(f"the weights of {source!r} do not fit: {'; '.join(wrong[:_MOST_SHOWN])}{more}")
    return made


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
