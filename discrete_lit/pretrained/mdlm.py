"""kuleshov-group/mdlm."""

from typing import Any

from torch import Tensor

from discrete_lit.pretrained import ddit
from discrete_lit.pretrained.arranging import Arrangement
from discrete_lit.pretrained.reading import Averages, State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, Tokens, register
from discrete_lit.pretrained.transformers import generator, sampled_by

_PREFIX = "backbone."
_OUTPUT = f"{_PREFIX}output_layer.linear"


@register(
    "mdlm",
    marks=(f"{_PREFIX}vocab_embed.embedding", f"{_PREFIX}sigma_map.mlp.0.weight", f"{_OUTPUT}.weight"),
    wrappers=("state_dict",),
    section=None,
    averages=Averages("ema.shadow_params", ddit.BUFFERS),
)
def mdlm(state: State, reference: Reference) -> Conversion:
    """`mdlm.ckpt`, whose averages are read, and `kuleshov-group/mdlm-owt`: text, ids of GPT-2's vocabulary.

    The published models were told sigma = 0 at all times (`time_conditioning: false`): ours are not told the time, and
    what that did to the norms is the embedding of their class. The reference's logit of the mask id, to which it gives
    no probability, is left out.
    """
    config: dict[str, Any] = {**reference.get("config", {}), **reference}
    model = config.get("model", {})
    vocab_size = len(state[f"{_PREFIX}vocab_embed.embedding"]) - 1
    # A tokenizer's own mask token would have its id among the others.
    agree(config, {"mask_index": vocab_size})
    every = "every model that is read has"
    agree(config, {"parameterization": "subs", "backbone": "dit"}, every)
    agree(model, {"tie_word_embeddings": False}, every)
    timed = config.get("time_conditioning", False)
    backbone = ddit.switches(state, model, _PREFIX)

    def without_mask(weight: Tensor, bias: Tensor) -> list[Tensor]:
        return [weight[:vocab_size], bias[:vocab_size]]

    names = [f"{_OUTPUT}.weight", f"{_OUTPUT}.bias"]
    return generator(
        "DiscreteDiffusion",
        state,
        Tokens(vocab_size, (model.get("length", ddit.LENGTH),)),
        1,
        backbone,
        ddit.rules(_PREFIX),
        [
            ddit.neighbouring_pairs(_PREFIX, backbone["heads"]),
            (ddit.without_classes if timed else ddit.without_time)(_PREFIX),
            Arrangement(names, names, without_mask),
        ],
        dropped=ddit.BUFFERS,
        process={"class_path": "discrete_lit.processes.AbsorbingProcess"},
        schedule=ddit.schedule(config.get("noise", {}), "loglinear", ("loglinear", "geometric")),
        head={"class_path": "discrete_lit.processes.CavityHead"},
        loss={"class_path": "discrete_lit.processes.losses.MaskedCrossEntropy"},
        time_input="total_noise" if timed else "none",
        label_dropout=0.0,
        # The reference's default, and its argmax at the end.
        sampler=sampled_by("AncestralSampler", steps=128, clean_up="argmax"),
    )
