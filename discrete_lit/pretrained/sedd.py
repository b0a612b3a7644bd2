"""louaaron/Score-Entropy-Discrete-Diffusion."""

from typing import Any

from discrete_lit.pretrained import ddit
from discrete_lit.pretrained.reading import Averages, State
from discrete_lit.pretrained.reference import Reference, agree
from discrete_lit.pretrained.registry import Conversion, Tokens, register
from discrete_lit.pretrained.transformers import generator, sampled_by

_MARKS = ("vocab_embed.embedding", "sigma_map.mlp.0.weight", "output_layer.norm_final.weight")
# `checkpoint.pth` of a run has the weights under `model`.
_WRAPPERS = ("model",)
_AVERAGES = Averages("ema.shadow_params", ddit.BUFFERS)


@register("sedd_absorb", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_absorb(state: State, reference: Reference) -> Conversion:
    """`louaaron/sedd-{small,medium}`, and `checkpoint.pth` of a run with the graph `absorb`, whose averages are read.

    Text: ids of GPT-2's vocabulary, and the mask.
    """
    return _sedd(state, reference, "absorb")


@register("sedd_uniform", marks=_MARKS, wrappers=_WRAPPERS, section=None, averages=_AVERAGES)
def sedd_uniform(state: State, reference: Reference) -> Conversion:
    """`checkpoint.pth` of a run with the graph `uniform`, whose averages are read."""
    return _sedd(state, reference, "uniform")


def _sedd(state: State, reference: Reference, graph: str) -> Conversion:
    absorbing = graph == "absorb"
    model = reference.get("model", {})
    agree(reference.get("graph", {}), {"type": graph}, f"family='sedd_{graph}' has")
    rows = len(state["vocab_embed.embedding"])
    vocab_size = reference.get("tokens", ddit.GPT2_VOCABULARY if rows == ddit.GPT2_VOCABULARY else rows - absorbing)
    if rows != vocab_size + absorbing:
        other = "uniform" if absorbing else "absorb"
        raise ValueError(
            f"{state.source!r} has {rows} embeddings for {vocab_size} tokens{' and a mask' * absorbing}: "
            f"is its family 'sedd_{other}'?"
        )
    scaled = model.get("scale_by_sigma", absorbing)
    if scaled and not absorbing:
        raise ValueError("reference_config has model.scale_by_sigma=true, which the reference refuses with 'uniform'")
    backbone = ddit.switches(state, model, "")
    noise = ddit.schedule(
        reference.get("noise", {}), "loglinear" if absorbing else "geometric", ("loglinear", "geometric")
    )
    head: dict[str, Any] = {"scale_by_noise": scaled, "mask_output": absorbing}
    return generator(
        "DiscreteDiffusion",
        state,
        Tokens(vocab_size, (model.get("length", ddit.LENGTH),)),
        1,
        backbone,
        ddit.rules(""),
        [ddit.neighbouring_pairs("", backbone["heads"]), ddit.without_classes("")],
        dropped=ddit.BUFFERS,
        process={"class_path": f"discrete_lit.processes.{'Absorbing' if absorbing else 'Uniform'}Process"},
        schedule=noise,
        head={"class_path": "discrete_lit.processes.ScoreHead", "init_args": head},
        loss={"class_path": "discrete_lit.processes.losses.ScoreEntropy"},
        time_input="total_noise",
        label_dropout=0.0,
        # The reference's script: as many steps as the models have tokens.
        sampler=sampled_by("AncestralSampler", steps=1024, guidance_law="score"),
    )
