"""What our codec and generator of audio give for the golden cases of EnCodec and MusicGen."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.delay_pattern import DelayPattern
from discrete_lit.samplers import DelaySampler
from helpers.golden import Case, Compared, Load, Tensors

TOLERANCE = 1e-4
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}


def encodec(load: Load, case: Case) -> Tensors:
    codec, audio = load(), case.inputs["audio"]
    made = network_outputs(codec, case)
    with torch.enable_grad():
        name = "encoder.0.conv.parametrizations.weight.original0"
        parameter = dict(codec.network.named_parameters())[name].requires_grad_()
        whole = codec.network.decode(codec.network.encode(audio[..., : made["decoded_latent"].shape[-1]]))
        (gradient,) = torch.autograd.grad(whole.square().mean(), parameter)
    made["grad.encoder.layers.0.conv.parametrizations.weight.original0"] = gradient
    for output in case.matching(r"codes_(.+)"):
        bandwidth = output.removeprefix("codes_")
        tokens = codec.encode(audio, books=case.expected[output].shape[2])
        made[output] = rearrange(tokens, "b n k -> 1 b k n")
        made[f"decoded_{bandwidth}"] = codec.outputs(codec.quantizer.lookup(tokens))[..., : audio.shape[-1]]
    return made


def condition_of(case: Case) -> Condition:
    """What the sequences are given."""
    labels = torch.zeros(len(case.inputs["enc"]), dtype=torch.int64)
    return Condition(labels=labels, context=case.inputs["enc"], context_mask=case.inputs["enc_mask"].bool())


def nothing(condition: Condition) -> Condition:
    return condition.dropped(torch.ones(len(condition), dtype=torch.bool), null_label=1, null_id=None)


def apart(grids: Tensor) -> Tensor:
    """Books inside the batch, as the reference has them: `(B, T, K, ...)` to `(B * K, T, ...)`."""
    return grids.transpose(1, 2).flatten(0, 1)


def logits_of(generator: Any, inputs: Tensor, condition: Condition) -> Tensor:
    """Logits `(B * K, T, V)` behind each position of `inputs (B, T, K)`.

    The first position has the place of our start, which is what the mask ids of all books embed to.
    """
    backbone, books = generator.backbone, generator.books
    start = backbone._parameters.pop("start")
    try:
        backbone.start = backbone.token_embedding(inputs[:, 0])
        logits = backbone(inputs[:, 1:].flatten(1), condition)
    finally:
        del backbone.start
        backbone._parameters["start"] = start
    return apart(logits.unflatten(1, (-1, books)))


def musicgen(load: Load, case: Case) -> Tensors:
    generator, vocab = load(), case.arguments["vocab_size"]
    made, labels = network_outputs(generator, case), case.inputs["labels"]
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[0, -2:] = False  # as the case says
    inputs = F.pad(labels.masked_fill(~counted, vocab), (0, 0, 1, 0), value=vocab)[:, :-1]
    backbone = generator.backbone
    parameters = {
        "model.decoder.embed_tokens.0.weight": (backbone.token_embedding.table.weight, lambda grad: grad[: vocab + 1]),
        "lm_heads.0.weight": (backbone.head.project.weight, lambda grad: grad[:vocab]),
        "model.decoder.layers.0.encoder_attn.k_proj.weight": (
            backbone.blocks[0].context_attention.key_value.weight,
            lambda grad: grad.chunk(2)[0],
        ),
    }
    with torch.enable_grad():
        backbone.requires_grad_()
        logits = logits_of(generator, inputs, condition_of(case))
        loss = F.cross_entropy(logits[apart(counted)], apart(labels)[apart(counted)])
        gradients = torch.autograd.grad(loss, [parameter for parameter, _ in parameters.values()])
        backbone.requires_grad_(False)
    made |= {"loss": loss.detach()[None], "loss_logits": logits.detach()}
    for (name, (_, part)), gradient in zip(parameters.items(), gradients, strict=True):
        made[f"grad.{name}"] = part(gradient)

    of_codes = rearrange(case.inputs["codes"], "(b k) t -> b t k", k=generator.books)
    for name, codes in (("delay", of_codes[:, :0]), ("delay_of_codes", of_codes[:, 1:])):
        made |= pattern_of(codes, case.expected[f"{name}_pattern"].shape[1], vocab, name=name)

    frames = case.expected["greedy_codes"].shape[-1]
    short = load(max_position_embeddings=frames + generator.books - 1)
    condition = condition_of(case)
    codes = short.sample(condition, DelaySampler(top_k=1, guidance_scale=3.0))
    made["greedy_codes"] = codes.transpose(1, 2)
    delayed = pattern_of(codes, frames + generator.books, vocab, name="greedy")["greedy_pattern"]
    made["greedy_delayed"] = delayed
    read = rearrange(delayed[:, :-1], "(b k) t -> b t k", k=generator.books)
    given, null = (logits_of(short, read, each) for each in (condition, nothing(condition)))
    made["greedy_logits"] = null + 3.0 * (given - null)
    return made


def pattern_of(codes: Tensor, length: int, vocab: int, *, name: str) -> Tensors:
    """The reference's pattern of known codes `(B, t, K)`: -1 where one is to be predicted, behind a start."""
    batch, known, books = codes.shape
    pattern = DelayPattern(length - books, tuple(range(books)))
    frames = torch.full((batch, pattern.frames, books), -1)
    frames[:, :known] = codes
    laid = apart(torch.where(pattern.present(), pattern.lay_out(frames), vocab))
    whole = F.pad(laid, (1, 0), value=vocab)
    unknown = (whole[0] == -1).nonzero()
    return {f"{name}_pattern": whole, f"{name}_input": whole[:, : int(unknown[0, 0]) if len(unknown) else length]}


OUTPUTS = {"encodec": encodec, "musicgen_decoder": musicgen}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What the networks give for given audio, or given codes."""
    if case.family == "encodec":
        length = case.expected["decoded_latent"].shape[-1]
        latent = module.network.encode(case.inputs["audio"][..., :length])
        return {"latent": latent, "decoded_latent": module.network.decode(latent)}
    inputs, condition = rearrange(case.inputs["codes"], "(b k) t -> b t k", k=module.books), condition_of(case)
    return {
        "logits": logits_of(module, inputs, condition),
        "logits_null": logits_of(module, inputs, nothing(condition)),
    }


def again(module: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    made = network_outputs(module, case)
    if case.family == "encodec":
        return made | {"tokens": module.encode(case.inputs["audio"])}
    return made | {"drawn": module.sample(condition_of(case), DelaySampler(top_k=3))}
