"""ReMDM's samplers on the toy network of its golden cases, drawn by their uniform numbers.

The network's logits are `base[l] + mean over j of table[x[j]]`, whatever the time. The reference draws a token from the
weights p of all states as the `argmax p / (1e-10 - log(u + 1e-10))`; ours decides first whether a token is masked or
unmasked. So here our sampler gives the law of each step, and the reference's race draws from it.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from discrete_lit import samplers
from discrete_lit.backbones import Cache, SequenceLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import AbsorbingProcess, Denoiser, LeaveOneOutHead, LinearSchedule, NoiseLevel
from discrete_lit.diffusion.parameterization import posterior_from_leave_one_out
from discrete_lit.pretrained import sedd_mdlm
from discrete_lit.pretrained.settings import Settings
from discrete_lit.samplers import SamplingContext
from discrete_lit.samplers.diffusion import Interval, NoisyTokens
from helpers.golden import Case, Compared, Tensors

TOLERANCE = 1e-5
NO_PLACE: dict[str, dict[str, str]] = {}
# The time at which the reference's grid ends, and what keeps its race finite.
_LAST_TIME, _OFFSET = 1e-5, 1e-10
# The reference's names of its samplers by the beginnings of the outputs' names.
NAMES = {
    "mdlm": "mdlm",
    "fb": "forward-backward",
    "cap": "remdm-cap",
    "rescale": "remdm-rescale",
    "conf": "remdm-conf",
    "loop": "remdm-loop",
}


def normalised(case: Case, weights: Tensor) -> Tensor:
    """Weights need not add up to 1, and a negative one is never drawn."""
    weights = weights.double().clamp(min=0)
    return weights / weights.sum(dim=-1, keepdim=True)


def of_masked(case: Case, weights: Tensor) -> Tensor:
    """MDLM's steps compute the law of every token, and keep what is not masked."""
    return normalised(case, weights)[case.inputs["xt"] == case.constructor["mask_index"]]


_STEPS = range(10)
BOTH: Compared = {
    "remdm": {
        **{f"{kind}{part}_q_{n}": normalised for kind in NAMES for part in ("", "_nucleus") for n in _STEPS},
        **{f"{kind}_q_{number}": of_masked for kind in ("mdlm", "loop") for number in _STEPS if number},
        "dfm_q_1": normalised,
    }
}
COMPARED = BOTH


class ToyBackbone:
    """The network of the golden cases, with the mask behind all ids."""

    grid_vocab = None

    def __init__(self, case: Case) -> None:
        mask, count = case.constructor["mask_index"], case.constructor["vocab"]
        self.order = torch.tensor([*(state for state in range(count) if state != mask), mask])
        """The reference's states in the order of ours."""
        self.base = case.inputs["base"][:, self.order[:-1]]
        self.table = case.inputs["table"][self.order][:, self.order[:-1]]
        self.layout = SequenceLayout(
            count - 1, (case.constructor["length"],), num_classes=1, attention="bidirectional", mask_token=True
        )
        self.inputs: list[Tensor] = []

    def own(self, states: Tensor) -> Tensor:
        """The reference's states as ours."""
        return self.order.argsort()[states]

    def published(self, law: Tensor) -> Tensor:
        """A law over our states `(..., S)` in the reference's order."""
        return law[..., self.order.argsort()]

    def flops(self, batch: int, tokens: int, filled: int | None) -> int:
        return 0

    def cache_flops(self, batch: int) -> int:
        return 0

    def new_cache(self, labels: Tensor) -> Cache:
        return Cache([], None)

    def __call__(self, tokens: Tensor, labels: Tensor, cache: Cache, order: None, time: None) -> Tensor:
        self.inputs.append(tokens)
        return self.base + self.table[tokens].mean(dim=1, keepdim=True)


class Raced:
    """Draws the law of a sampler's step by the reference's race, at given times."""

    backbone: ToyBackbone
    uniforms: Tensor
    given_fractions: Tensor

    def fractions(self, device: torch.device | None = None) -> Tensor:
        return self.given_fractions

    def step(self: Any, x: NoisyTokens, interval: Interval, scale: float) -> None:
        if interval.last:
            super().step(x, interval, scale)  # type: ignore[misc]
            return
        mask, masked = self.backbone.layout.mask_id, x.masked
        jumps = self.jumps(x.predict(interval.t, scale), interval)
        again = self.remask_probability(x, interval)
        law = jumps.distribution(x.tokens, mask + 1) * (1 - again)[..., None]
        law[..., mask] += again
        self.laws.append(law)
        uniforms = self.uniforms[interval.number][..., self.backbone.order]
        found = (law / (_OFFSET - (uniforms + _OFFSET).log())).argmax(dim=-1)
        unmasked = masked & (found != mask)
        ids = torch.where(unmasked, found, 0)
        x.mask(~masked & (found == mask))
        x.write(unmasked, ids, jumps.log_probability(ids))


def sampler(backbone: ToyBackbone, uniforms: Tensor, fractions: Tensor, **sampling: Any) -> Any:
    """Our sampler for the reference's settings, as models of MDLM get it, that draws by the race."""
    described = sedd_mdlm.sampler(Settings(sampling), {"ddpm_cache": "AncestralSampler"}, "ddpm_cache", 128, "argmax")
    kind = getattr(samplers, described["class_path"].rpartition(".")[2])
    made = type("Raced" + kind.__name__, (Raced, kind), {})(**described["init_args"])
    made.backbone, made.uniforms, made.given_fractions, made.laws = backbone, uniforms, fractions, []
    return made


def denoiser(backbone: ToyBackbone) -> Denoiser:
    process = AbsorbingProcess(backbone.layout.vocab_size)
    return Denoiser(process=process, schedule=LinearSchedule(), head=LeaveOneOutHead(), time_input="none")


def remdm(case: Case) -> Tensors:
    backbone, inputs = ToyBackbone(case), case.inputs
    states, parts = backbone.own(inputs["xt"]), denoiser(backbone)
    labels = torch.zeros(len(states), dtype=torch.int64)
    random = CounterRandom(0, torch.arange(len(states)))
    level = NoiseLevel.at(parts.schedule, torch.full((len(states), 1), 0.5))
    network = parts.head(backbone(states, labels, Cache([], None), None, None), states, level)
    clean = posterior_from_leave_one_out(network, states, parts.process, level).exp()
    made = {"p_x0": backbone.published(torch.cat((clean, torch.zeros_like(clean[..., :1])), dim=-1))}
    steps = {(match[1], int(match[2])) for match in case.matching(r"(\w+)_(?:q|x|conf)_(\d+)").values()}
    for name, number in sorted(steps):
        if name.removesuffix("_nucleus") in NAMES:
            made |= single_step(case, name, number)
    for output, match in case.matching(r"((\w+?)(?:_nucleus)?)_sampled").items():
        kind, steps = match[2], int(case.read(output, r"_sample\((\d+)\)")[1])
        nucleus = case.number(output, "nucleus", 1.0)
        sampling = {**loop(case), "steps": steps, "nucleus_p": nucleus}
        if kind == "dfm":
            sampling["dfm"] = True
        else:
            sampling |= {"sampler": case.read(output, r"sampler ([\w-]+)")[1], "eta": case.number(output, "eta")}
        fractions = torch.cat((torch.zeros(1), torch.linspace(_LAST_TIME, 1, steps + 1, dtype=torch.float64)))
        drawn_by = sampler(backbone, inputs["uniform"], fractions, **sampling)
        backbone.inputs.clear()
        tokens = drawn_by(backbone, labels, random, denoiser=parts).tokens
        made[output] = backbone.order[tokens]
        if kind == "dfm":
            made["dfm_steps"] = torch.tensor([len(drawn_by.laws)])
            made["dfm_q_1"] = backbone.published(drawn_by.laws[1])
        else:
            # The reference asks its network again where a token has changed, and for the last step.
            fed = backbone.inputs[:steps]
            changed = sum(not torch.equal(*pair) for pair in pairwise(fed))
            made[f"{match[1]}_network_calls"] = torch.tensor([1 + changed + 1])
    return made


def loop(case: Case) -> dict[str, Any]:
    return {name: case.constructor[name] for name in ("t_on", "t_off", "alpha_on")}


def single_step(case: Case, name: str, number: int) -> Tensors:
    """One step from all masks, or from the case's tokens, with their confidences."""
    backbone, inputs, constructor = ToyBackbone(case), case.inputs, case.constructor
    published, t = NAMES[name.removesuffix("_nucleus")], constructor["step_times"][number]
    eta = constructor["eta_rescale" if published == "remdm-rescale" else "eta"]
    nucleus = constructor["nucleus_p"] if name.endswith("_nucleus") else 1.0
    # Down to t, to t - dt, and to 0; the step is the second, if there is one before.
    fractions = torch.tensor([0.0, t - constructor["dt"], t] + [1.0] * (t < 1), dtype=torch.float64)
    uniforms = inputs["uniform_step"][None].expand(2, -1, -1, -1)
    sampling = {"sampler": published, "eta": eta, "nucleus_p": nucleus, **loop(case)}
    made_by = sampler(backbone, uniforms, fractions, **sampling)
    labels = torch.zeros(len(inputs["xt"]), dtype=torch.int64)
    parts = denoiser(backbone)
    random = CounterRandom(0, torch.arange(len(labels)))
    context = SamplingContext(backbone, labels, random=random, denoiser=parts)  # type: ignore[arg-type]
    interval = made_by.intervals(parts.schedule, context)[int(t < 1)]
    x = NoisyTokens(context, parts, level=interval.t)
    if t < 1:
        x.tokens = backbone.own(inputs["xt"])
        x.log_probability = torch.where(x.masked, 0.0, (-inputs["conf"].double()).log())
    made_by.step(x, interval, 1.0)
    return {
        f"{name}_q_{number}": backbone.published(made_by.laws[0]),
        f"{name}_x_{number}": backbone.order[x.tokens],
        f"{name}_conf_{number}": torch.where(x.masked, 1.0, -x.log_probability.exp()),
    }


def compared(case: Case) -> Tensors:
    """Outputs as they are compared."""
    parts = BOTH["remdm"]
    return {name: parts[name](case, value) if name in parts else value for name, value in remdm(case).items()}


OUTPUTS = {"remdm": compared}
