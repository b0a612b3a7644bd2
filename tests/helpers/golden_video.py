"""What our tokenizers of video give for the inputs of the golden cases, by the names of the reference's outputs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.tokenizers.networks.grid_layers import DepthToSpace, Downsample, Layers
from helpers.golden import Case, Compared, Load, Tensors

TOLERANCE = 1e-4
TOLERANCES = {
    # The case's norms have one channel in each group, which magnifies rounding: in float64 the reference's own code and
    # ours agree to 2e-14 here, and both are 4.2e-4 from the case, as is the reference's code in float32 elsewhere.
    ("magvit2_video", "grad.encoder.conv_in.conv_1.weight"): 1e-3,
}
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}

# Of the weights whose gradients the case has: ours, by the published names.
GRADIENTS = {
    "encoder.conv_in.conv_1.weight": "network.encoder.conv_in.weight",
    "decoder.conv_out.conv_1.bias": "network.decoder.conv_out.bias",
    "decoder.adaptive.0.gamma.weight": "network.decoder.adaptive_norms.1.gain.weight",
}


def magvit2_video(load: Load, case: Case) -> Tensors:
    module, clips = load(), case.inputs["video"]
    with torch.enable_grad():
        module.requires_grad_(True)
        latents = module.latents(clips)
        quantized = module.quantizer(latents)
        reconstructions = module.network.decode(quantized.z_q.movedim(-1, 1))
        error = F.mse_loss(reconstructions, clips)
        weights = dict(module.named_parameters())
        gradients = torch.autograd.grad(error, [weights[name] for name in GRADIENTS.values()])
        module.requires_grad_(False)
    assert torch.equal(module.encode(clips), quantized.tokens)
    return {
        "prequant": latents.movedim(-1, 1),
        "indices": quantized.tokens.flatten(1),
        "quant": quantized.z_q.movedim(-1, 1),
        "recon": reconstructions,
        "mse": error[None],
        **{f"grad.{name}": gradient for name, gradient in zip(GRADIENTS, gradients, strict=True)},
        "decoded": module.network.decode(case.inputs["z"]),
        "encoded_first_frame": module.network.encode(clips[:, :, :1]),
        **_over_time(case),
    }


def _over_time(case: Case) -> Tensors:
    """What the layers give that halve and double time too, by their published weights."""
    layers = Layers(
        dims=3,
        causal=True,
        frames_apart=False,
        norm_groups=1,
        bias=False,
        shortcut="input",
        dropout=0.0,
        clip_start="zeros",
    )
    channels = case.constructor["temporal_channels"]
    halve, double = Downsample(layers, channels, padding="symmetric"), DepthToSpace(layers, channels)
    for layer, name in ((halve, "down"), (double, "up.conv1")):
        layer.conv.load_state_dict({part: case.state[f"temporal.{name}.conv_1.{part}"] for part in ("weight", "bias")})
    given, single = case.inputs["f"], case.inputs["f1"]
    return {"temporal_down": halve(given), "temporal_up": double(given), "temporal_up1": double(single)}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the encoder makes of the clips, and the decoder of given latents."""
    encoded, decoded = module.network.encode(case.inputs["video"]), module.network.decode(case.inputs["z"])
    return {"prequant": encoded, "decoded": decoded}


def again(module: Any, case: Case) -> dict[str, Tensor]:
    """What a module that was saved and loaded again must give bit for bit."""
    return {"encoded": module.encode(case.inputs["video"])}


OUTPUTS = {"magvit2_video": magvit2_video}
