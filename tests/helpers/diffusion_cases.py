"""Each sampler of diffusion with a tiny model of each noise that it undoes."""

from typing import Any

import torch

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.diffusion import GIDDProcess, LinearSchedule
from discrete_lit.diffusion.dense_processes import DiscretizedGaussianProcess
from discrete_lit.diffusion.parameterization import Denoiser, LeaveOneOutHead, PosteriorHead, ScoreHead
from discrete_lit.diffusion.processes import (
    AbsorbingProcess,
    HybridProcess,
    UniformProcess,
)
from discrete_lit.samplers import (
    AncestralSampler,
    EulerSampler,
    FirstHittingSampler,
    PredictorCorrectorSampler,
    PuritySampler,
    RemaskingSampler,
    SelfCorrectionSampler,
    TauLeapingSampler,
)
from helpers.random_weights import randomise

SIZE, GRID, LENGTH, CLASSES = 5, (2, 3), 6, 2
PROCESSES = {
    "absorbing": AbsorbingProcess(SIZE),
    "uniform": UniformProcess(SIZE),
    "hybrid": HybridProcess(SIZE, 0.5),
    "gaussian": DiscretizedGaussianProcess(SIZE, 0.3),
    "gidd": GIDDProcess(SIZE, 0.4),
}
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ancestral": (AncestralSampler, {}),
    "euler": (EulerSampler, {}),
    "tau": (TauLeapingSampler, {}),
    "forward_backward": (PredictorCorrectorSampler, {"corrector": "forward_backward", "corrector_noise": 0.5}),
    "gibbs": (PredictorCorrectorSampler, {"corrector": "gibbs", "corrector_tokens": 2, "corrector_steps": 2}),
    "first_hitting": (FirstHittingSampler, {}),
    "purity": (PuritySampler, {"purity_weight": 0.5}),
    "cap": (RemaskingSampler, {"strategy": "cap", "eta": 0.3}),
    "rescale": (RemaskingSampler, {"strategy": "rescale", "eta": 0.7}),
    "conf": (RemaskingSampler, {"strategy": "conf", "eta": 1.0}),
    "loop": (RemaskingSampler, {"strategy": "loop", "eta": 0.5, "loop": (0.3, 0.8), "loop_alpha": 0.6}),
    "steps_forward": (RemaskingSampler, {"strategy": "forward_backward", "nucleus": 0.9}),
    "flow_matching": (RemaskingSampler, {"strategy": "flow_matching"}),
    "self_correction": (
        SelfCorrectionSampler,
        {"correction_steps": 3, "correction_tokens": 2, "correction_temperature": 3.0},
    ),
}
MASKS_ALONE = {"first_hitting", "purity", "cap", "rescale", "conf", "loop", "steps_forward", "flow_matching"}
CASES = [
    (sampler, process)
    for sampler in SAMPLERS
    for process in PROCESSES
    if sampler not in ("self_correction" if process == "absorbing" else MASKS_ALONE)
    if (sampler, process) != ("tau", "gaussian")
]
LABELS = torch.arange(20) % (CLASSES + 1)


class FiniteNoise(LinearSchedule):
    """m = 0.9 t + 0.01: of finite noise at both ends."""

    def mask_probability(self, t):
        return 0.9 * t.double() + 0.01

    def derivative(self, t):
        return torch.full_like(t, 0.9, dtype=torch.float64)

    def inverse(self, m):
        return (m.double() - 0.01) / 0.9


def make_head(name: str, process):
    heads = {"posterior": PosteriorHead, "cavity": LeaveOneOutHead}
    return heads[name]() if name in heads else ScoreHead(scale_by_noise=process.masks, mask_output=process.masks)


def make_model(process, head="cavity", schedule=None, time="time", spread=0.6, classes=CLASSES, sure=1.0):
    head = make_head(head, process)
    timed = time != "none"
    layout = SequenceLayout(
        SIZE,
        GRID,
        num_classes=classes,
        attention="bidirectional",
        mask_token=process.masks,
        timed=timed,
        mask_output=head.mask_output,
    )
    torch.manual_seed(0)
    backbone = randomise(Transformer(layout, width=16, depth=1, heads=2, conditioning="adaln"), spread).eval()
    if sure != 1:
        backbone.register_forward_hook(lambda module, inputs, output: output * sure)
    return backbone, Denoiser(process=process, schedule=schedule or LinearSchedule(), head=head, time_input=time)


def build(name: str, **settings):
    sampler, own = SAMPLERS[name]
    if name == "first_hitting":
        settings.pop("steps", None)
    return sampler(**{**own, **settings})
