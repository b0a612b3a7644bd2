"""The exact model of a tiny law: a backbone whose predictions are the true conditionals of every noisy sequence.

The law of the reference values has K = 4 ids and N = 3 tokens, and weights `1 + ((a + 2 b + 3 c + a b c) mod 7)`. Held
by such a backbone, bounds equal -log p and samplers follow laws that can be written down; everything is float64.
"""

from collections.abc import Iterable
from math import exp, log

import torch
from torch import Tensor, nn

from discrete_lit.backbones import Backbone, Cache, SequenceLayout
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser, Head
from discrete_lit.diffusion.processes import ForwardProcess
from discrete_lit.diffusion.schedules import MaskSchedule
from helpers.exact_laws import all_sequences

VOCAB_SIZE, LENGTH = 4, 3
ENTROPY = 4.0274103200
MARGINAL_ENTROPIES = 4.1485289543


def reference_law() -> Tensor:
    """`(64,)` float64: p of every sequence, in the order of `all_sequences(4, 3)`."""
    a, b, c = all_sequences(VOCAB_SIZE, LENGTH).unbind(dim=1)
    weights = 1 + (a + 2 * b + 3 * c + a * b * c) % 7
    return weights.double() / weights.sum()


def random_law(vocab_size: int = VOCAB_SIZE, length: int = LENGTH, seed: int = 0) -> Tensor:
    """`(K^N,)` float64: another law, for a second class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocab_size**length, dtype=torch.float64, generator=generator).softmax(dim=0)


def noisy_evidence(law: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """`(B, N, K)`: p(the other tokens of x_t, x_0 of this one is k): the leave-one-out posterior, not normalised.

    Args:
        law: `(K^N,)`, or `(B, K^N)` of each row's own.
        states: x_t `(B, N)`.
        process: the noise.
        alpha: `(B, 1)` float64.
    """
    length = states.shape[1]
    sequences = all_sequences(process.vocab_size, length)  # (S, N)
    likelihood = process.likelihood(states, alpha)[..., : process.vocab_size].double()  # (B, N, K)
    places = torch.arange(length)
    of_sequence = likelihood[:, places[None], sequences]  # (B, S, N)
    apart = torch.eye(length, dtype=torch.bool)
    others = torch.stack([of_sequence.masked_fill(apart[place], 1.0).prod(dim=2) for place in places], dim=2)
    is_id = nn.functional.one_hot(sequences, process.vocab_size).double()  # (S, N, K)
    return torch.einsum("bsn,snk->bnk", others * law.expand(len(states), -1)[..., None], is_id)


def exact_leave_one_out(law: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """`(B, N, K)`: p(x_0 of a token | the other tokens of x_t)."""
    evidence = noisy_evidence(law, states, process, alpha)
    return evidence / evidence.sum(dim=-1, keepdim=True)


def exact_posterior(law: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """`(B, N, K)`: p(x_0 of a token | all of x_t)."""
    likelihood = process.likelihood(states, alpha)[..., : process.vocab_size]
    joint = noisy_evidence(law, states, process, alpha) * likelihood
    return joint / joint.sum(dim=-1, keepdim=True)


def exact_score(law: Tensor, states: Tensor, process: ForwardProcess, alpha: Tensor) -> Tensor:
    """`(B, N, S)`: p_t(x with this token y) / p_t(x) for every state y, from the chain's matrix."""
    evidence = noisy_evidence(law, states, process, alpha)  # (B, N, K)
    noisy = torch.einsum("bnk,bky->bny", evidence, process.matrix(alpha[:, 0])[:, : process.vocab_size])
    return noisy / noisy.gather(-1, states[..., None])


def noisy_law(law: Tensor, process: ForwardProcess, alpha: float) -> Tensor:
    """`(S^N,)` p_t of every sequence of states, in the order of `all_sequences(S, N)`; `law (K^N,)`."""
    length = round(log(len(law)) / log(process.vocab_size))
    kernel = process.matrix(torch.tensor(alpha, dtype=torch.float64))[: process.vocab_size]  # (K, S)
    noisy = law.reshape([process.vocab_size] * length)
    for _ in range(length):
        noisy = torch.tensordot(noisy, kernel, dims=([0], [0]))  # the axis that was done moves to the end
    return noisy.reshape(-1)


class ExactBackbone(Backbone):
    """Logits from which `head` makes the true prediction of its kind, log-probabilities or log-scores in float64.

    Args:
        process: the noise; its vocabulary is the law's.
        head: what the logits are for.
        laws: `(num_classes + 1, K^N)`, the null label's last; the reference law for one class by default.
        length: N.
        timed: whether it is told sigma; without, the noise is `exp(-sigma) = blind_alpha`, which decides nothing for
            masks alone.
        blind_alpha: see `timed`.
    """

    def __init__(
        self,
        process: ForwardProcess,
        head: Head,
        laws: Tensor | None = None,
        length: int = LENGTH,
        timed: bool = True,
        blind_alpha: float = 0.5,
    ) -> None:
        laws = reference_law().expand(2, -1) if laws is None else laws
        layout = SequenceLayout(
            process.vocab_size,
            (length,),
            num_classes=len(laws) - 1,
            attention="bidirectional",
            mask_token=process.masks,
            timed=timed,
            mask_output=head.mask_output,
        )
        super().__init__(layout)
        self.process, self.head, self.laws, self.blind_sigma = process, head, laws, -log(blind_alpha)

    def denoiser(self, schedule: MaskSchedule) -> Denoiser:
        return Denoiser(
            process=self.process,
            schedule=schedule,
            head=self.head,
            time_input="total_noise" if self.layout.timed else "none",
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        cache: Cache | None = None,
        order: Tensor | None = None,
        time: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        assert predicted is None
        sigma = torch.full((len(tokens),), self.blind_sigma) if time is None else time
        return self.logits_at(tokens, labels, torch.exp(-sigma.double())[:, None])

    def logits_at(self, tokens: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
        """As `forward`, at `alpha (B, 1)` float64: what time tells in float32 is exact here."""
        laws = self.laws[labels]
        if self.head.kind == "score":
            scores = exact_score(laws, tokens, self.process, alpha).log()
            level = NoiseLevel(t=torch.zeros_like(alpha), alpha=alpha, noise=1 - alpha, rate=torch.zeros_like(alpha))
            # What the head adds to every logit is taken off before.
            nothing = torch.zeros_like(scores[..., : self.layout.outputs])
            added = self.head(nothing, torch.full_like(tokens, self.layout.outputs - 1), level)[..., :1]
            return scores[..., : self.layout.outputs] - added
        predict = exact_leave_one_out if self.head.kind == "leave_one_out" else exact_posterior
        return predict(laws, tokens, self.process, alpha).log()

    def fsdp_units(self) -> Iterable[nn.Module]:
        return ()

    def new_cache(self, labels: Tensor) -> Cache:
        return Cache([], None)

    def flops(self, batch: int, tokens: int, filled: int | None = None) -> int:
        return 0

    def cache_flops(self, batch: int) -> int:
        return 0


def masked_entropies(law: Tensor, vocab_size: int = VOCAB_SIZE, length: int = LENGTH) -> Tensor:
    """`(N,)`: c_k, the mean cross-entropy in nats of a masked token where k = 1 ... N are masked at random."""
    sequences = all_sequences(vocab_size, length)
    entropies = torch.zeros(2**length, dtype=torch.float64)  # of the tokens of each subset
    for subset in range(1, 2**length):
        places = [place for place in range(length) if subset >> place & 1]
        numbers = sum(sequences[:, place] * vocab_size**rank for rank, place in enumerate(places))
        marginal = torch.zeros(vocab_size ** len(places), dtype=torch.float64).index_add(0, numbers, law)
        entropies[subset] = -torch.xlogy(marginal, marginal).sum()
    everything, totals, counts = 2**length - 1, torch.zeros(length), [0] * length
    totals = totals.double()
    for masked in range(1, 2**length):
        k = masked.bit_count()
        for place in range(length):
            if masked >> place & 1:
                visible = everything & ~masked
                totals[k - 1] += entropies[visible | 1 << place] - entropies[visible]
                counts[k - 1] += 1
    return totals / torch.tensor(counts)


def alpha_of(sigma: float) -> Tensor:
    """`(1, 1)` float64."""
    return torch.tensor([[exp(-sigma)]], dtype=torch.float64)
