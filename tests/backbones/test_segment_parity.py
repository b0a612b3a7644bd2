"""The transformer over segments with the weights of Chameleon, Janus and Emu3, against the outputs of their code."""

from typing import Any

import pytest
import torch
from helpers.golden import Case
from helpers.golden_cases import cases_of
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import SegmentSequence
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment, SegmentLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers.segment_by_segment import DrawSettings, SegmentSampler

pytestmark = pytest.mark.parity


def neighbouring(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from Llama's rotary pairs (i, i + d / 2) to neighbouring ones."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def published_weights(made: SegmentTransformer, state: dict[str, Tensor], model: str, settings: dict) -> None:
    """Load the weights of a Llama of `transformers`; ids that the file does not have are 0."""
    heads, shared = settings["num_attention_heads"], settings["num_key_value_heads"]

    def padded(table: Tensor) -> Tensor:
        return F.pad(table, (0, 0, 0, made.layout.vocab_size - len(table)))

    def repeated(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, dim=0).flatten(0, 1)

    weights = {
        "table.weight": padded(state[f"{model}.embed_tokens.weight"]),
        "head.weight": padded(state["lm_head.weight"]),
        "final_norm.weight": state[f"{model}.norm.weight"],
    }
    for layer in range(made.depth):
        theirs, ours = f"{model}.layers.{layer}", f"blocks.{layer}"
        attention = {name: state[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkvo"}
        query, key = neighbouring(attention["q"], heads), neighbouring(attention["k"], shared)
        up = [state[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        weights |= {
            f"{ours}.attention_norm.weight": state[f"{theirs}.input_layernorm.weight"],
            f"{ours}.mlp_norm.weight": state[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.attention.query_key_value.weight": torch.cat((query, repeated(key), repeated(attention["v"]))),
            f"{ours}.attention.out.weight": attention["o"],
            f"{ours}.mlp.expand.weight": torch.cat(up),
            f"{ours}.mlp.contract.weight": state[f"{theirs}.mlp.down_proj.weight"],
        }
        if made.blocks[layer].attention.norms is not None:  # type: ignore[union-attr]
            for kind, own in (("weight", "gains"), ("bias", "offsets")):
                both = [state[f"{theirs}.self_attn.{name}_norm.{kind}"].flatten() for name in "qk"]
                weights[f"{ours}.attention.norms.{own}"] = torch.cat([neighbouring(each, heads) for each in both])
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith(("own_", "aligners", "time_embedding", "vector_heads")) for name in missing)


def llama(layout: SegmentLayout, settings: dict[str, Any], **switches: Any) -> SegmentTransformer:
    return SegmentTransformer(
        layout,
        width=settings["hidden_size"],
        depth=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_hidden=settings["intermediate_size"],
        norm_epsilon=settings["rms_norm_eps"],
        rotary_base=settings["rope_parameters"]["rope_theta"],
        **switches,
    ).eval()


def text_of(words: int, begin: int, end: int, image: list[int]) -> Segment:
    outside = {end, *image}
    return Segment(
        name="text",
        shape=(words,),
        ids=range(words),
        variable=True,
        allowed=tuple(id for id in range(words) if id not in outside),
        begin_ids=(begin,),
        end_ids=(end,),
    )


def in_text(ids: Tensor) -> SegmentSequence:
    """Elements of an interleaved text."""
    return SegmentSequence(ids=ids, states=torch.ones_like(ids), sample=torch.zeros_like(ids))


@pytest.mark.parametrize("case", cases_of(("chameleon",)))
def test_chameleon(case: Case) -> None:
    settings, outputs = case.constructor, case.expected
    words, image_ids = settings["vocab_size"], outputs["img2bpe"]
    side = int(outputs["image_token_ids"].shape[1] ** 0.5)
    image = Segment(name="image", shape=(side, side), ids=tuple(image_ids.tolist()), begin_ids=(61,), end_ids=(62,))
    text = text_of(words, 0, 2, [61, *image_ids.tolist()])
    layout = SegmentLayout(segments=(text, image), interleaved=True, most_elements=128)
    made = llama(layout, settings, qk_norm="layer_per_head")
    published_weights(made, case.state, "model", settings)
    ids = case.inputs["input_ids"].clone()
    ids[ids == settings["vocabulary_map"]["<image>"]] = outputs["image_token_ids"].flatten()
    torch.testing.assert_close(made.table(ids), outputs["hidden_0"])
    hidden = made(in_text(ids))
    torch.testing.assert_close(hidden, outputs["hidden_2"], rtol=1e-4, atol=1e-5)
    logits = made.logits(hidden)
    # The published class never lets an image's id be drawn.
    logits = logits.index_fill(2, image_ids, torch.finfo(torch.float32).min)
    torch.testing.assert_close(logits, outputs["logits"], rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), case.inputs["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss[None], outputs["loss"], rtol=1e-5, atol=1e-6)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    heads = settings["num_attention_heads"]
    query = outputs["grad.model.layers.0.self_attn.q_proj.weight"]
    gains = outputs["grad.model.layers.0.self_attn.q_norm.weight"].flatten()
    for name, rows, expected in (
        ("table.weight", None, outputs["grad.model.embed_tokens.weight"]),
        ("head.weight", None, outputs["grad.lm_head.weight"]),
        ("blocks.0.attention.query_key_value.weight", len(query), neighbouring(query, heads)),
        ("blocks.0.attention.norms.gains", len(gains), neighbouring(gains, heads)),
    ):
        torch.testing.assert_close(gradients[name][:rows], expected, rtol=1e-4, atol=1e-5, msg=name)  # type: ignore[index]
    prompt, greedy = case.inputs["text_ids"], outputs["greedy_text"]
    sampler = SegmentSampler({"text": DrawSettings(top_k=1)})
    drawn = sampler(made, [in_text(prompt)], CounterRandom(0, torch.arange(len(prompt))), segments=["text"])
    count = greedy.shape[1] - prompt.shape[1]
    assert torch.equal(drawn.sequence.ids[:, :count], greedy[:, prompt.shape[1] :])


@pytest.mark.parametrize("case", cases_of(("janus",)))
def test_janus(case: Case) -> None:
    """Understanding from features, and drawing with guidance through an embedding and a head of its own."""
    settings, outputs, state = case.constructor, case.expected, case.state
    text, vision = settings["text_config"], settings["vision_config"]
    words, codes = text["vocab_size"], settings["vq_config"]["num_embeddings"]
    side = int(case.inputs["codes"].shape[1] ** 0.5)
    image_ids = range(words, words + codes)
    layout = SegmentLayout(
        segments=(
            text_of(words, 0, 1, [2]),
            Segment(name="image", shape=(side, side), ids=image_ids, begin_ids=(2,), end_ids=()),
            Segment(
                name="features",
                shape=(outputs["vision_hidden"].shape[1],),
                input_dim=vision["hidden_size"],
                loss_weight=0,
                begin_ids=(words + codes,),
            ),
        ),
        interleaved=True,
        most_elements=60,
    )
    widths = {"own_embeddings": {"image": 8}, "own_heads": {"image": 32}, "aligner_layers": 2}
    made = llama(layout, text, **widths)
    published_weights(made, state, "model.language_model", text)
    renamed = {
        "own_embeddings.image.table.weight": "generation_embeddings.weight",
        "own_embeddings.image.aligner.0.{}": "generation_aligner.fc1.{}",
        "own_embeddings.image.aligner.2.{}": "generation_aligner.hidden_layers.0.{}",
        "own_heads.image.expand.{}": "generation_head.proj_out.{}",
        "own_heads.image.output.{}": "generation_head.vision_head.{}",
        "aligners.features.0.{}": "aligner.fc1.{}",
        "aligners.features.2.{}": "aligner.hidden_layers.0.{}",
    }
    kinds = ("weight", "bias")
    rest = {own.format(kind): state[f"model.{name.format(kind)}"] for own, name in renamed.items() for kind in kinds}
    missing, unexpected = made.load_state_dict(rest, strict=False)
    assert not unexpected and not set(missing) & set(rest)
    grammar = made.grammar

    # Understanding.
    ids = case.inputs["input_ids"]
    placeholder = ids == settings["image_token_id"]
    states = torch.ones_like(ids)
    states[placeholder] = grammar.states_of("features").repeat(len(ids))
    vectors = torch.zeros(*ids.shape, vision["hidden_size"])
    vectors[placeholder] = outputs["vision_hidden"].flatten(0, 1)
    read = SegmentSequence(
        ids=ids.masked_fill(placeholder, 0), states=states, sample=torch.zeros_like(ids), vectors={"features": vectors}
    )
    hidden = made(read)
    torch.testing.assert_close(hidden, outputs["hidden_last"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.logits(hidden)[..., :words], outputs["logits"], rtol=1e-4, atol=1e-5)

    # Drawing: teacher-forced, then greedily with guidance.
    prompt, given = case.inputs["prompt"], case.inputs["codes"]
    whole = torch.cat((prompt, given + words), dim=1)
    states = torch.ones_like(whole)
    states[:, prompt.shape[1] :] = grammar.states_of("image")
    sequence = SegmentSequence(ids=whole, states=states, sample=torch.zeros_like(whole))
    embedded = made._embed(sequence)[:, prompt.shape[1] :]
    torch.testing.assert_close(embedded, outputs["gen_embeds"], rtol=1e-4, atol=1e-5)
    of_image = grammar.sets.index((1, tuple(image_ids)))
    logits = made.logits(made(sequence)[:, prompt.shape[1] - 1 : -1], of_image)
    torch.testing.assert_close(logits, outputs["image_logits"], rtol=1e-4, atol=1e-5)
    sampler = SegmentSampler({"image": DrawSettings(top_k=1, guidance_scale=5.0)})
    prompts = [in_text(prompt), in_text(outputs["uncond_prompt"])]
    drawn = sampler(made, prompts, CounterRandom(0, torch.arange(len(prompt))), segments=["image"])
    assert torch.equal(drawn.sequence.ids - words, outputs["greedy_image"])


@pytest.mark.parametrize("case", cases_of(("emu3",)))
def test_emu3(case: Case) -> None:
    """The logits of its language model, its ids at each position of an image, and its constrained draw."""
    settings, outputs = case.constructor["text_config"], case.expected
    height, width = case.inputs["codes"].shape[1:]
    ids = [case.constructor["vocabulary_map"][f"<|visual token {code:06d}|>"] for code in range(24)]
    image = Segment(
        name="image",
        shape=(height, width),
        ids=ids,
        begin_ids=(7,),
        row_end_id=6,
        end_ids=(8, 9, settings["eos_token_id"]),
    )
    text = Segment(name="text", shape=(5,), ids=range(10), variable=True, begin_ids=(1,), end_ids=(53,))
    layout = SegmentLayout(segments=(text, image))
    grammar = SegmentGrammar(layout)
    inside = grammar.states_of("image")[1:]
    mask = outputs["allowed_mask"].bool()
    assert torch.equal(grammar.allowed(inside, torch.full((len(inside),), 99)), mask)
    made = llama(layout, settings)
    published_weights(made, case.state, "model.text_model", settings)
    prompt = outputs["greedy_constrained"][:, : -len(inside)]
    states = torch.zeros_like(prompt)
    states[:, -1] = grammar.states_of("image")[0]
    read = SegmentSequence(ids=prompt, states=states, sample=torch.zeros_like(prompt))
    sampler = SegmentSampler({"image": DrawSettings(top_k=1)})
    drawn = sampler(made, [read], CounterRandom(0, torch.arange(len(prompt))), segments=["image"])
    assert torch.equal(drawn.sequence.ids, outputs["greedy_constrained"][:, -len(inside) :])
