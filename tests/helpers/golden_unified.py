"""What our models of text and image in one sequence give for the golden cases, by the names of the reference's outputs.

The published ids of Chameleon's images stand in another order than ours, so what has ids is put into the published one.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.segment_sequence import SegmentSequence, seen_by
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.segment_losses import masked_losses
from discrete_lit.generators.text_and_image import CaptionIds
from discrete_lit.pretrained.meta_chameleon import chameleon_codes
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.islands import MaskedSteps
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_latents import gradients

TOLERANCE = 1e-4
NO_PLACE = {
    "showo": {"mask_lvg": "texts that see the padding in front of them, and images that do not: ours have none"}
}


def _allowed_columns(case: Case, logits: Tensor) -> Tensor:
    """Without what the published class never allows, the least number there is: the largest would hide every error."""
    return logits.masked_fill(logits <= torch.finfo(logits.dtype).min, 0)


COMPARED: Compared = {"chameleon": {"logits": _allowed_columns}}


def apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from neighbouring rotary pairs to those that Llama has, (i, i + d / 2)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def in_text(generator: Any, ids: Tensor) -> SegmentSequence:
    """Elements of a text."""
    states = torch.full_like(ids, len(generator.layout.segments[0].begin_ids))
    return SegmentSequence(ids=ids, states=states, sample=torch.zeros_like(ids))


def greedy(**settings: Any) -> DrawSettings:
    return DrawSettings(top_k=1, **settings)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def quantized(tokenizer: Any, images: Tensor) -> Tensors:
    """The parts of a convolutional image tokenizer."""
    network, kept = tokenizer.network, list[Tensor]()
    with network.encoder.conv_out.register_forward_hook(lambda module, given, made: kept.append(made)):
        prequant = network.encode(images)
    found = tokenizer.quantizer(prequant.movedim(1, -1))
    assert torch.equal(found.tokens, tokenizer.encode(images))
    return {
        "vq_hidden": kept[0],
        "vq_prequant": prequant,
        "vq_codes": found.tokens.flatten(),
        "vq_quant": found.z_q.movedim(-1, 1),
        "vq_loss": torch.stack(list(found.losses.values())).sum()[None],
    }


# Chameleon.


def _chameleon_ids(case: Case) -> tuple[Tensor, Tensor]:
    """Published ids of the codes, and our id of each published one."""
    settings = case.constructor
    published = torch.tensor(chameleon_codes(settings["vocabulary_map"]))
    ours = torch.arange(settings["vocab_size"])
    ours[published] = int(published.min()) + torch.arange(len(published))
    return published, ours


def _chameleon_passes(generator: Any, case: Case) -> Tensors:
    backbone, (published, ours) = generator.backbone, _chameleon_ids(case)
    made = quantized(generator.tokenizer, case.inputs["pixel_values"])
    codes = generator.tokenizer.encode(case.inputs["pixel_values"]).flatten(1)
    ids = case.inputs["input_ids"].clone()
    ids[ids == case.constructor["vocabulary_map"]["<image>"]] = published[codes].flatten()
    kept = list[Tensor]()
    with backbone.blocks[0].register_forward_hook(lambda module, given, output: kept.append(output)):
        hidden = backbone(in_text(generator, ours[ids]))
    logits = backbone.logits(hidden)[..., ours]
    # The published class lets no image be drawn.
    masked = logits.index_fill(2, published, torch.finfo(logits.dtype).min)
    return made | {
        "hidden_0": backbone.table(ours[ids]),
        "hidden_1": kept[0],
        "hidden_2": hidden,
        "masked": masked,
        "logits": logits.index_fill(2, published, 0),
    }


def chameleon(load: Load, case: Case) -> Tensors:
    generator = load()
    backbone, (published, ours) = generator.backbone, _chameleon_ids(case)
    with gradients(backbone), torch.enable_grad():
        made = _chameleon_passes(generator, case)
        loss = cross_entropy(made.pop("masked"), case.inputs["labels"])
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}
    heads = backbone.heads
    rows = backbone.heads * backbone.head_dim
    gains = grads["blocks.0.attention.norms.gains"][:rows]
    made |= {
        "loss": loss[None],
        "grad.model.embed_tokens.weight": grads["table.weight"][ours],
        "grad.lm_head.weight": grads["head.weight"][ours],
        "grad.model.layers.0.self_attn.q_proj.weight": apart(
            grads["blocks.0.attention.query_key_value.weight"][:rows], heads
        ),
        "grad.model.layers.0.self_attn.q_norm.weight": apart(gains, heads).view(heads, -1),
        "img2bpe": published,
        "image_vocab_ids": published.sort().values,
        "image_token_ids": published[generator.tokenizer.encode(case.inputs["pixel_values"]).flatten(1)],
    }
    # The published class draws any id that is no image's: begin and padding too, which our grammar leaves out of texts.
    text = case.inputs["text_ids"]
    while text.shape[1] < case.expected["greedy_text"].shape[1]:
        logits = backbone.logits(backbone(in_text(generator, ours[text]))[:, -1:])[..., ours]
        text = torch.cat((text, logits.index_fill(2, published, -torch.inf).argmax(dim=-1)), dim=1)
    return made | {"greedy_text": text}


# Janus.


def _janus_passes(generator: Any, case: Case) -> Tensors:
    backbone, grammar, inputs = generator.backbone, generator.grammar, case.inputs
    made = quantized(generator.tokenizer, inputs["pixel_values"])
    made.pop("vq_hidden"), made.pop("vq_quant")
    words, places = case.constructor["text_config"]["vocab_size"], generator.vision.places
    features = generator.vision(inputs["pixel_values"])
    made |= {"vision_hidden": features, "vision_features": backbone.aligners["features"](features)}
    ids = inputs["input_ids"]
    placeholder = ids == case.constructor["image_token_id"]
    states = in_text(generator, ids).states
    inside = grammar.states_of("features")
    states[placeholder] = inside[grammar.place_of[inside] >= 0].repeat(len(ids))
    vectors = torch.zeros(*ids.shape, generator.vision.width)
    vectors = vectors.masked_scatter(placeholder[..., None], features.reshape(len(ids) * places, -1))
    read = SegmentSequence(
        ids=ids.masked_fill(placeholder, 0), states=states, sample=torch.zeros_like(ids), vectors={"features": vectors}
    )
    hidden = backbone(read)
    made |= {"hidden_last": hidden, "logits": backbone.logits(hidden)[..., :words]}
    prompt, codes = inputs["prompt"], inputs["codes"]
    side = generator.token_shape
    tokenizer = generator.tokenizer
    made["vq_decoded_codes"] = tokenizer.network.decode(tokenizer.embed(codes.unflatten(1, side))).movedim(1, -1)
    made["code_entry"] = tokenizer.embed(codes.unflatten(1, side))
    sequence, first = generator.sequences(codes.unflatten(1, side), _captions(prompt)), prompt.shape[1]
    sequence = _first_elements(sequence, first + codes.shape[1])
    made["gen_embeds"] = backbone._embed(sequence)[:, first:]
    made["image_logits"] = _image_logits(generator, sequence, first)
    return made


def _captions(prompt: Tensor) -> CaptionIds:
    """The caption between the begin of a prompt and that of its image."""
    return CaptionIds(prompt[:, 1:-1], torch.full((len(prompt),), prompt.shape[1] - 2))


def _first_elements(sequence: SegmentSequence, count: int) -> SegmentSequence:
    rows = torch.arange(len(sequence))[:, None].expand(-1, count)
    columns = torch.arange(count).expand(len(sequence), -1)
    return sequence.taken(rows, columns, valid=torch.ones_like(rows, dtype=torch.bool), padding=0)


def _image_logits(generator: Any, sequence: SegmentSequence, first: int) -> Tensor:
    grammar, state = generator.grammar, int(sequence.states[0, first])
    return generator.backbone.logits(generator.backbone(sequence)[:, first - 1 : -1], grammar.set_numbers[state])


def janus(load: Load, case: Case) -> Tensors:
    generator = load()
    generator.vision.requires_grad_(True)
    with gradients(generator.backbone), gradients(generator.vision), torch.enable_grad():
        made = _janus_passes(generator, case)
        loss = cross_entropy(made["logits"], case.inputs["labels"])
        loss.backward()
        words = case.constructor["text_config"]["vocab_size"]
        made |= {
            "loss": loss[None],
            "grad.model.aligner.fc1.weight": generator.backbone.aligners["features"][0].weight.grad.clone(),
            "grad.model.language_model.embed_tokens.weight": generator.backbone.table.weight.grad[:words].clone(),
            "grad.model.vision_model.embeddings.patch_embedding.weight": generator.vision.patches.weight.grad.clone(),
        }
    generator.vision.requires_grad_(False)
    prompt, scale = case.inputs["prompt"], case.number("greedy_image", "guidance_scale")
    captions, null = _captions(prompt), generator.null_captions(_captions(prompt))
    made["uncond_prompt"] = generator.sequences(None, null, closed=False, begun="image").ids
    drawn = generator.sample(captions, SegmentSampler({"image": greedy(guidance_scale=scale)}))
    made["greedy_image"] = drawn.flatten(1)
    given = [
        _first_elements(generator.sequences(drawn, each), prompt.shape[1] + drawn[0].numel())
        for each in (captions, null)
    ]
    full, nothing = (_image_logits(generator, sequence, prompt.shape[1]) for sequence in given)
    return made | {"greedy_image_logits": nothing + scale * (full - nothing)}


# Emu3.


def _emu3_passes(generator: Any, case: Case) -> Tensors:
    backbone, inputs, tokenizer = generator.backbone, case.inputs, generator.tokenizer
    network = tokenizer.network
    images, video = inputs["pixel_values"], inputs["video"].transpose(1, 2)
    between = network.between(images)
    made = {
        "vq_hidden": between.transpose(1, 2),
        "vq_prequant": network.latents(between).movedim(1, -1).flatten(0, -2),
        "vq_codes": tokenizer.encode(images),
        "video_codes": tokenizer.quantizer.encode(network.encode(video).movedim(1, -1)),
        "decoded_codes": network.decode(tokenizer.embed(inputs["codes"])),
    }
    videos = tokenizer.quantizer.lookup(case.expected["video_codes"]).movedim(-1, 1)
    made["decoded_video_codes"] = network.decode(videos).transpose(1, 2)
    empty = CaptionIds(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    sequence = generator.sequences(inputs["codes"], empty)
    made["decoded_tokens"] = network.decode(tokenizer.embed(generator.images_of(sequence)))
    of_images = generator.sequences(made["vq_codes"], empty)
    places = generator.grammar.states_of("image")[_before_rows(generator) : -len(generator.image.end_ids)]
    made["image_token_ids"] = of_images.ids[torch.isin(of_images.states, places)]
    ids = inputs["input_ids"].clone()
    ids[ids == case.constructor["vocabulary_map"]["<image>"]] = made["image_token_ids"]
    hidden = backbone(SegmentSequence(ids=ids, states=torch.zeros_like(ids), sample=torch.zeros_like(ids)))
    return made | {"hidden_last": hidden, "logits": backbone.logits(hidden)}


def _before_rows(generator: Any) -> int:
    return len(generator.image.begin_ids)


def emu3(load: Load, case: Case) -> Tensors:
    generator = load()
    backbone, grammar = generator.backbone, generator.grammar
    with gradients(backbone), torch.enable_grad():
        made = _emu3_passes(generator, case)
        loss = cross_entropy(made["logits"], case.inputs["labels"])
        loss.backward()
        joined = backbone.blocks[0].attention.query_key_value.weight.grad
        rows, shared = backbone.heads * backbone.head_dim, backbone.key_value_heads * backbone.head_dim
        key = joined[rows : rows + shared].clone()
        made |= {
            "loss": loss[None],
            "grad.model.text_model.embed_tokens.weight": backbone.table.weight.grad.clone(),
            "grad.lm_head.weight": backbone.head.weight.grad.clone(),
            "grad.model.text_model.layers.0.self_attn.k_proj.weight": apart(key, backbone.key_value_heads),
        }
    states = grammar.states_of("image")
    inside = states[_before_rows(generator) :]
    made["allowed_mask"] = grammar.allowed(inside, torch.full((len(inside),), generator.layout.length)).long()
    prompt = case.expected["greedy_constrained"][:, : -len(inside)]
    of_prompt = torch.zeros_like(prompt)
    of_prompt[:, -1] = states[_before_rows(generator) - 1]
    read = SegmentSequence(ids=prompt, states=of_prompt, sample=torch.zeros_like(prompt))
    random = CounterRandom(0, torch.arange(len(prompt)))
    drawn = SegmentSampler({"image": greedy()})(backbone, [read], random, segments=["image"])
    return made | {"greedy_constrained": torch.cat((prompt, drawn.sequence.ids), dim=1)}


# Show-o.


def _drawn_image(generator: Any, ids: Tensor) -> SegmentSequence:
    """Captions with padding in front, and images.

    What stands in front of an image's begin is no end of a text in the case, but stands in the place of one. Padding is
    a sample of its own, which nothing else sees.
    """
    grammar, count = generator.grammar, generator.image.elements
    (padding,) = set(ids[:, 0].tolist())
    first = len(generator.layout.segments[0].begin_ids)
    length = (ids != padding).sum(dim=1, keepdim=True) - count
    number = torch.arange(ids.shape[1]) - (ids.shape[1] - count - length)
    texts = torch.where(number == length - 1, grammar.states_of("text")[-1], first)
    states = torch.where(number == 0, grammar.start, texts)
    states[:, -count:] = grammar.states_of("image")
    return SegmentSequence(ids=ids, states=states, sample=(number >= 0).long(), packed=True)


def _given_image(generator: Any, ids: Tensor) -> SegmentSequence:
    states = generator.grammar.states_of("given_image")
    behind = generator.grammar.states_of("caption")[1].expand(ids.shape[1] - len(states))
    every = torch.cat((states, behind)).expand_as(ids)
    return SegmentSequence(ids=ids, states=every, sample=torch.zeros_like(ids))


def _showo_sequences(generator: Any, case: Case) -> list[SegmentSequence]:
    inputs = case.inputs
    return [
        _drawn_image(generator, inputs["t2i_ids"]),
        in_text(generator, inputs["lm_ids"]),
        _given_image(generator, inputs["mmu_ids"]),
    ]


def _showo_passes(generator: Any, case: Case) -> Tensors:
    backbone = generator.backbone
    return {"logits": torch.cat([backbone.logits(backbone(each)) for each in _showo_sequences(generator, case)])}


def _seen(generator: Any, sequence: SegmentSequence) -> Tensor:
    first, number = sequence.first(), torch.arange(sequence.ids.shape[1])
    last = number + generator.grammar.ahead_of[sequence.states]
    return seen_by(first, last, elements=len(number)).long()


def _showo_draw(generator: Any, case: Case, name: str, scale: float) -> Tensors:
    """Draw greedily, and keep the probabilities of each step."""
    backbone, count = generator.backbone, generator.image.elements
    probabilities = list[Tensor]()
    settings = greedy(guidance_scale=scale)

    def prompts(ids: Tensor) -> SegmentSequence:
        """The captions without padding, which stands in front."""
        whole = _drawn_image(generator, ids)
        inside = whole.sample[:, :-count] == 1
        order = (~inside).to(torch.uint8).argsort(dim=1, stable=True)
        rows = torch.arange(len(ids))[:, None].expand_as(order)
        valid = inside.gather(1, order)
        return replace(whole, packed=False).taken(rows, order, valid=valid, padding=generator.grammar.done)

    logits = backbone.logits

    def watched(hidden: Tensor, number: int | None = None) -> Tensor:
        found = logits(hidden, number)
        probabilities.append(settings.guide(found.chunk(settings.contexts)).softmax(dim=-1))
        return found

    given = [prompts(case.inputs[each]) for each in ("start_ids", "uncond_ids")][: settings.contexts]
    masked = MaskedSteps(steps=int(case.number(name, "timesteps")), choice_temperature=0)
    sampler = SegmentSampler({"image": settings}, masked=masked)
    with patch.object(backbone, "logits", watched):
        drawn = sampler(backbone, given, CounterRandom(0, torch.arange(len(given[0]))), segments=["image"])
    return {name: generator.images_of(drawn.sequence).flatten(1), f"{name}_probs": torch.stack(probabilities)}


def showo(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    backbone, sequences = generator.backbone, _showo_sequences(generator, case)
    pairs, text, given = sequences
    length = pairs.ids.shape[1]
    number = torch.arange(length)
    # Each element of padding by itself.
    alone = replace(pairs, sample=pairs.sample.where(pairs.sample > 0, -number))
    made = {
        "mask_t2i": _seen(generator, pairs),
        "mask_t2i_keep_pad": _seen(generator, replace(pairs, packed=False)),
        "mask_mmu": _seen(generator, given),
        "mask_omni_mixed": torch.cat([_seen(generator, each)[:, 0] for each in (alone, text, given)]),
    }
    with gradients(backbone), torch.enable_grad():
        made |= _showo_passes(generator, case)
        _, of_text, of_given = made["logits"].split([len(each) for each in sequences])
        labels = inputs["t2i_labels"]
        in_front = torch.isin(given.states, generator.grammar.states_of("given_image"))
        hidden = backbone(pairs)
        losses = masked_losses(
            backbone,
            replace(pairs, sample=torch.arange(len(pairs))[:, None].expand_as(pairs.sample)),
            hidden,
            name="image",
            ids=labels[:, -generator.image.elements :][:, 1:-1].clamp(min=0),
            masked=labels[:, -generator.image.elements :][:, 1:-1] >= 0,
            softmax_over=generator.softmax_over,
        )
        terms = {
            "loss_t2i": losses.values.mean()[None],
            "loss_lm": cross_entropy(of_text, inputs["lm_ids"])[None],
            # Of the text behind the image alone.
            "loss_mmu": cross_entropy(of_given, given.ids.masked_fill(in_front, -100))[None],
        }
        torch.cat(list(terms.values())).sum().backward()
        rows = backbone.heads * backbone.head_dim
        query = backbone.blocks[0].attention.query_key_value.weight.grad[:rows]
        # Phi turns the first half of a head, and pairs (i, i + d / 4) there.
        turned, still = query.unflatten(0, (backbone.heads, 2, -1)).unbind(1)
        halves = turned.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        made |= terms | {
            "grad.showo.model.embed_tokens.weight": backbone.table.weight.grad.clone(),
            "grad.showo.model.layers.0.self_attn.q_proj.weight": torch.cat((halves, still), dim=1).flatten(0, 1),
            "grad.showo.lm_head.bias": backbone.head_bias.grad.clone(),
        }
    for name in ("greedy_cfg", "greedy_nocfg"):
        made |= _showo_draw(generator, case, name, 1 + case.number(name, "guidance_scale"))
    return made


OUTPUTS = {"chameleon": chameleon, "emu3": emu3, "janus": janus, "showo": showo}
PASSES = {"chameleon": _chameleon_passes, "emu3": _emu3_passes, "janus": _janus_passes, "showo": _showo_passes}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What network and tokenizer alone give."""
    made = PASSES[case.family](module, case)
    made.pop("masked", None)
    return made


again = network_outputs
