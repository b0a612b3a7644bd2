"""Vectors in front of a causal sequence, such as the features of a text: LlamaGen's text-to-image models.

A text has fewer vectors than there are places, and they stand at the end, right before what is predicted from them. The
places before are padding, which nothing sees but itself.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.layers import Linear


class ContextPrefix(nn.Module):
    """Make the elements in front of a sequence of the vectors that it is given, by a small MLP.

    A sequence that is given none has learned vectors at all places; those that its text would have are the ones that
    it sees, as in the published sampling.

    Args:
        dim: E, of the vectors.
        width: D.
        places: elements in front.
    """

    def __init__(self, dim: int, width: int, *, places: int) -> None:
        super().__init__()
        self.places = places
        self.expand = Linear(dim, width, bias=False)
        self.contract = Linear(width, width, bias=False)
        self.null = nn.Parameter(torch.randn(places, dim) / dim**0.5)

    def forward(self, given: Condition) -> Tensor:
        """Make the elements `(B, places, D)`."""
        assert given.context is not None
        rows, valid = self._at_the_end(given, given.context), given.valid()
        rows = torch.where(valid.any(dim=1)[:, None, None], rows.to(self.null.dtype), self.null)
        return self.contract(F.gelu(self.expand(rows), approximate="tanh"))

    def visible(self, given: Condition) -> Tensor:
        """Say which places hold a vector of the text, or would hold one where it is dropped: `(B, places)` bool."""
        assert given.context is not None
        texts = given.valid() if given.text_mask is None else given.text_mask
        return self._at_the_end(given, texts)

    def mask(self, given: Condition, *, filled: int, count: int) -> Tensor:
        """Say what each of the `count` elements behind `filled` others sees: `(B, 1, count, filled + count)` bool."""
        number = torch.arange(filled + count, device=given.labels.device)
        element = number[filled:, None]
        seen = F.pad(self.visible(given), (0, max(filled + count - self.places, 0)), value=True)
        seen = seen[:, None, : filled + count] & (number <= element)
        return (seen | (number == element))[:, None]

    def _at_the_end(self, given: Condition, values: Tensor) -> Tensor:
        """Move what belongs to the text to the last places: `(B, M, ...)` to `(B, places, ...)`."""
        texts = given.valid() if given.text_mask is None else given.text_mask
        missing = self.places - texts.shape[1]
        if missing < 0:
            raise ValueError(f"a text has {texts.shape[1]} vectors, and {self.places} stand in front of the sequence")
        order = texts.int().argsort(dim=1, stable=True)
        sorted_values = values.gather(1, order.view(*order.shape, *(1,) * (values.ndim - 2)).expand_as(values))
        return F.pad(sorted_values, (*(0, 0) * (values.ndim - 2), missing, 0))
