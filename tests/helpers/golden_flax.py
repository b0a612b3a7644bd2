"""What our modules of MaskGIT's Flax checkpoints give for the inputs of its golden cases, by the names of the outputs.

Their images are channels-last and in [0, 1]; their class stands before the tokens, with an id behind them.
"""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.samplers import MaskGITSampler
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_generators import MostProbable, most_probable, traced
from helpers.golden_latents import gradients

TOLERANCE = 2e-5
# Entropies at a temperature of 0.01 magnify how an encoder rounds.
TOLERANCES = {("maskgit_flax", name): 1e-4 for name in ("train_entropy_loss", "train_quantizer_loss")}
NO_PLACE: dict[str, dict[str, str]] = {}


def of_the_tokens(case: Case, logits: Tensor) -> Tensor:
    """Ours are of the ids, at the positions of tokens alone."""
    return logits[:, 1:, : case.constructor["codebook_size"]]


COMPARED: Compared = {"maskgit_flax": {"logits": of_the_tokens}}


class GreedyMaskGIT(MostProbable, MaskGITSampler):
    pass


def published_ids(generator: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """`(..., 1 + N)`: the class behind the ids, then the tokens, -1 where they are masked."""
    classes = (generator.vocab_size + labels)[..., None].expand(*tokens.shape[:-1], 1)
    return torch.cat((classes, tokens.masked_fill(tokens == generator.backbone.layout.mask_id, -1)), dim=-1)


def masked_tokens(generator: Any, case: Case) -> Tensor:
    return case.inputs["z"].masked_fill(case.inputs["mask"].bool(), generator.backbone.layout.mask_id)


def maskgit_flax(load: Load, case: Case) -> Tensors:
    generator, labels = load(), case.inputs["y"]
    tokens = masked_tokens(generator, case)
    sampler = GreedyMaskGIT(steps=case.constructor["num_iter"], choice_temperature=0.0)
    _, before, _ = traced(generator, labels, sampler)
    drawn = most_probable(generator, before, labels, [1.0] * len(before))
    drawn = torch.where(before == generator.backbone.layout.mask_id, drawn, before)
    return {
        "input_ids": published_ids(generator, tokens, labels),
        **network_outputs(generator, case),
        **trained(generator, case),
        "greedy_steps": published_ids(generator, drawn, labels.expand(len(drawn), -1)).transpose(0, 1),
        **tokenizer_outputs(generator.tokenizer, case),
    }


def trained(generator: Any, case: Case) -> Tensors:
    """The mean cross-entropy of the masked tokens over all rows of the table, those of classes and mask included."""
    backbone, masked, classes = generator.backbone, case.inputs["mask"].bool(), generator.num_classes
    seen: list[Tensor] = []
    hook = backbone.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    # What is left out of ours, since nothing draws a class or the mask.
    others = case.state["transformer.params.MlmLayer_0.mlm_bias.bias"][generator.vocab_size :].clone().requires_grad_()
    with gradients(generator):
        backbone(masked_tokens(generator, case), case.inputs["y"])
        hook.remove()
        ids, mask = backbone.token_embedding.table.weight.split((generator.vocab_size, 1))
        table = torch.cat((ids, backbone.class_embedding.weight[:classes], mask))
        logits = backbone.head.transform(seen[0]) @ table.T + torch.cat((backbone.head.bias, others))
        loss = torch.nn.functional.cross_entropy(logits[masked], case.inputs["z"][masked])
        loss.backward()
        of_ids, of_mask = backbone.token_embedding.table.weight.grad.split((generator.vocab_size, 1))
        of_queries = backbone.blocks[0].attention.query_key_value.weight.grad.chunk(3)[0]
        block = "transformer.params.TransformerLayer_0.Attention_0.self_attention"
        made = {
            "ce_masked": loss.detach()[None],
            "grad.transformer.params.Embed_0.word_embeddings.embedding": torch.cat(
                (of_ids, backbone.class_embedding.weight.grad[:classes], of_mask)
            ),
            f"grad.{block}.query.kernel": of_queries.T.unflatten(1, (backbone.heads, -1)),
            "grad.transformer.params.MlmLayer_0.mlm_bias.bias": torch.cat((backbone.head.bias.grad, others.grad)),
        }
        return {name: value.clone() for name, value in made.items()}


def tokenizer_outputs(tokenizer: Any, case: Case) -> Tensors:
    images = case.inputs["image"].permute(0, 3, 1, 2) * 2 - 1
    prequant, quantizer = tokenizer.network.encode(images), tokenizer.quantizer
    losses = quantizer(case.expected["prequant"]).losses
    # Theirs are without weights but for the commitment's.
    made = {
        "train_e_latent_loss": losses["commitment"],
        "train_q_latent_loss": losses["codebook"],
        "train_entropy_loss": losses["sample_entropy"] + losses["batch_entropy"],
        "train_quantizer_loss": sum(losses.values(), start=torch.zeros(())),
    }

    def pixels(ids: Tensor) -> Tensor:
        return ((tokenizer.network.decode(tokenizer.embed(ids)) + 1) / 2).permute(0, 2, 3, 1)

    ids = tokenizer.encode(images)
    return {
        "prequant": prequant.movedim(1, -1),
        "ids": ids,
        "recon": pixels(ids),
        "decoded_ids": pixels(case.inputs["ids"]),
        **{name: value[None] for name, value in made.items()},
    }


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of given ids, some masked."""
    return {"logits": generator.backbone(masked_tokens(generator, case), case.inputs["y"])}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {**network_outputs(generator, case), "drawn": generator.sample(case.inputs["y"])}


# One case has both.
OUTPUTS = {"maskgit_flax": maskgit_flax, "maskgit_flax_tokenizer": maskgit_flax}
