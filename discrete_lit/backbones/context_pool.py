"""Vectors that a sequence is given in the place of its class, such as the features of a text: Infinity's.

One attention pools them to the vector that stands in front of the sequence and modulates the norms; the blocks attend
to what an MLP makes of them (Han et al., "Infinity", 2024).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.layers import Linear, Norm
from discrete_lit.core.synchronisation import host_sees


class ContextPool(nn.Module):
    """Pool the vectors of a condition to one, and map each to the width of the blocks.

    A sequence that is given none has learned vectors in their place, as many as its text would have: the first, the
    second and so on of a table.

    Args:
        dim: E, of the vectors.
        width: D.
        places: the most vectors of a text.
        heads: of the attention that pools them; D is a multiple.
        epsilon: of the norm of the vectors.

    Raises:
        ValueError: heads that do not divide the width, or no place; in use, a text of more vectors.
    """

    def __init__(self, dim: int, width: int, *, places: int, heads: int, epsilon: float) -> None:
        super().__init__()
        if heads < 1 or width % heads or places < 1:
            raise ValueError(
                f"context_pool needs heads that divide width={width}, and a place at least, got {places} places and "
                f"{heads} heads"
            )
        self.places, self.heads = places, heads
        self.norm = Norm(dim, "rms", epsilon=epsilon)
        self.query = nn.Parameter(torch.empty(1, width))
        self.key_value = Linear(dim, 2 * width)
        self.out = Linear(width, width)
        self.expand = Linear(dim, width)
        self.contract = Linear(width, width)
        self.null = nn.Parameter(torch.randn(places, dim) / dim**0.5)

    def forward(self, given: Condition) -> tuple[Condition, Tensor]:
        """Make the condition whose context the blocks read, `(B, M, D)`, and the pooled vector `(B, D)`."""
        assert given.context is not None
        texts = given.valid() if given.text_mask is None else given.text_mask
        # Of no text at all there is one vector, the table's first.
        first = torch.arange(texts.shape[1], device=texts.device) == 0
        texts = texts | (first & ~texts.any(dim=1, keepdim=True))
        if host_sees(texts) and int(texts.sum(dim=1).amax()) > self.places:
            raise ValueError(
                f"a text has {int(texts.sum(dim=1).amax())} vectors, and this network reads at most {self.places}: "
                "backbone.init_args.context_pool"
            )
        number = (texts.long().cumsum(dim=1) - 1).clamp(0, self.places - 1)
        nothing = ~given.valid().any(dim=1)[:, None, None]
        vectors = self.norm(torch.where(nothing, self.null[number], given.context.to(self.null.dtype)))
        pooled = self._pooled(vectors, texts)
        read = self.contract(F.gelu(self.expand(vectors), approximate="tanh"))
        return replace(given, context=read, context_mask=texts, text_mask=None), pooled

    def _pooled(self, vectors: Tensor, valid: Tensor) -> Tensor:
        key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.key_value(vectors).chunk(2, dim=-1)
        )
        query = self.query.to(key.dtype).view(1, self.heads, 1, -1).expand(len(vectors), -1, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
        return self.out(mixed.flatten(1))
