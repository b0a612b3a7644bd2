"""What our generator of stacked codes gives for the golden cases of RQ-Transformer.

Losses and gradients are of eval mode, as the cases have them.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.generators.autoregressive import SoftCodes
from discrete_lit.samplers import RasterSampler
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_autoregressive import Of, grads, sub_token_logits

TOLERANCE = 2e-5
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}


def logits_of(generator: Any, codes: Tensor, labels: Tensor) -> Tensor:
    """Logits `(B, h, w, D, K)` of every code, the codes before it given."""
    each = sub_token_logits(generator, generator.to_sequence(codes), labels)
    return torch.stack(each, dim=2).unflatten(1, codes.shape[1:3])


def third(part: int) -> Any:
    """Queries, keys and values are one layer of ours and three of theirs."""
    return lambda grad: grad.chunk(3)[part]


PARTS = {"query": 0, "key": 1, "value": 2}


def parameter_of(theirs: str, generator: Any) -> str | Of:
    """Our parameter whose gradient is a published one's."""
    head = generator.backbone.place_head
    codes = len(head.sub_tokens)
    each_depth = [f"place_head.heads.{number}" for number in range(codes)]
    whole: dict[str, str | Of] = {
        "input_mlp.weight": "token_embedding.project.weight",
        "head_mlp.weight": "place_head.code_projection.weight",
        "pos_emb_d": ("place_head.positions", lambda grad: grad[None]),
        "cond_emb.weight": ("class_embedding.weight", lambda grad: grad[:-1]),
        "classifier.linear.weight": f"{each_depth[0]}.project.weight",
    }
    if theirs in whole:
        return whole[theirs]
    stack, _, rest = theirs.partition("_transformer.blocks.")
    block, name, part = rest.split(".")[0], rest.split(".")[2], rest.split(".")[3]
    ours = f"{'place_head.' if stack == 'head' else ''}blocks.{block}.attention"
    return (f"{ours}.query_key_value.{part}", third(PARTS[name])) if name in PARTS else f"{ours}.out.{part}"


def rq_transformer(load: Load, case: Case) -> Tensors:
    generator, codes, labels = load(), case.inputs["codes"], case.inputs["cond"][:, 0]
    made = network_outputs(generator, case)
    published = [name.removeprefix("grad.") for name in case.expected if name.startswith("grad.")]
    with torch.enable_grad():
        loss, _ = generator.loss(codes, labels)
        made["loss"] = loss.detach()[None]
        made |= grads(generator, loss, {name: parameter_of(name, generator) for name in published})
    soft, _ = generator.loss(SoftCodes(codes, case.inputs["soft"]), labels)
    made["loss_soft"] = soft[None]
    made["greedy"] = generator.sample(labels, RasterSampler(top_k=1))
    made["greedy_logits"] = logits_of(generator, made["greedy"], labels)
    return made


OUTPUTS = {"rq_transformer": rq_transformer}


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of given codes."""
    return {"logits": logits_of(generator, case.inputs["codes"], case.inputs["cond"][:, 0])}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {**network_outputs(generator, case), "drawn": generator.sample(case.inputs["cond"][:, 0])}
