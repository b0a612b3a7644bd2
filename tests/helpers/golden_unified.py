"""What our models of text and image in one sequence give for the golden cases, by the names of the reference's outputs.

The published ids of Chameleon's images stand in another order than ours, so what has ids is put into the published one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators.text_and_image import CaptionIds
from discrete_lit.pretrained.meta_chameleon import chameleon_codes
from discrete_lit.samplers.segment_by_segment import DrawSettings, SegmentSampler
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_latents import gradients

TOLERANCE = 1e-4
NO_PLACE: dict[str, dict[str, str]] = {}


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


OUTPUTS = {"chameleon": chameleon, "emu3": emu3, "janus": janus}
PASSES = {"chameleon": _chameleon_passes, "emu3": _emu3_passes, "janus": _janus_passes}


def network_outputs(module: Any, case: Case) -> Tensors:
    """What network and tokenizer alone give."""
    made = PASSES[case.family](module, case)
    made.pop("masked", None)
    return made


again = network_outputs
