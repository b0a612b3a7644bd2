"""Sampling of segments: never an invalid sequence, the exact law, guidance two and three ways, rows that wait."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from helpers.segment_layouts import random_layout, text_segment
from torch import Tensor

from discrete_lit.backbones.segment_grammar import SegmentGrammar
from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment, SegmentLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import Euler
from discrete_lit.samplers import segment_by_segment
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.guidance import guide_twice
from discrete_lit.samplers.islands import MaskedSteps
from discrete_lit.samplers.segment_by_segment import SegmentOutput, SegmentSampler
from discrete_lit.samplers.segment_reader import SegmentReader

DENOISER = GaussianDenoiser(RectifiedPath(), prediction="velocity")


def network(layout: SegmentLayout, spread: float = 0.5, **switches: Any) -> SegmentTransformer:
    return randomise(SegmentTransformer(layout, **{"width": 24, "depth": 1, "heads": 2, **switches}), spread).eval()


def joined(prompt: SegmentSequence, drawn: SegmentSequence, grammar: SegmentGrammar) -> SegmentSequence:
    """What was drawn behind the prompts."""
    both = [torch.cat(pair, dim=1) for pair in ((prompt.ids, drawn.ids), (prompt.states, drawn.states))]
    valid = torch.cat((prompt.sample >= 0, drawn.sample >= 0), dim=1)
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    sample = torch.where(valid, 0, -1)
    whole = SegmentSequence(ids=both[0], states=both[1], sample=sample)
    rows = torch.arange(len(valid))[:, None]
    return whole.taken(rows, order, valid=valid.gather(1, order), padding=grammar.done)


def text_prompt(grammar: SegmentGrammar, count: int, longest: int) -> SegmentSequence:
    text = grammar.layout.segments[0]
    ids = torch.tensor(text.allowed_ids)[torch.randint(len(text.allowed_ids), (count, longest))]
    part = SegmentPart(segment="text", content=ids, lengths=torch.randint(0, longest + 1, (count,)))
    return assemble(grammar, [part], closed=False)


def draw(made: SegmentTransformer, *prompts: SegmentSequence, seed: int = 0, **arguments: Any) -> SegmentOutput:
    sampler = arguments.pop("sampler", SegmentSampler(solver=Euler(2)))
    segments = [segment.name for segment in made.layout.segments]
    arguments = {"segments": segments, "denoiser": DENOISER, **arguments}
    return sampler(made, prompts, CounterRandom(seed, torch.arange(len(prompts[0]))), **arguments)


@pytest.mark.parametrize("seed", range(60))
def test_no_sequence_is_ever_invalid(seed: int) -> None:
    """Random layouts, settings and weights; prompts of different lengths; drawn to the end."""
    torch.manual_seed(seed)
    layout = random_layout(seed)
    made = network(layout, spread=float(torch.rand(()) * 2), head_dim=12)
    settings = DrawSettings(
        temperature=float(torch.rand(())) * 3 + 0.1,
        top_k=[None, 1, 2][seed % 3],
        top_p=[None, 0.5][seed % 2],
        guidance_scale=[1.0, 3.0, -1.0][seed % 3],
    )
    sampler = SegmentSampler({segment.name: settings for segment in layout.segments}, solver=Euler(2))
    text = layout.segments[0]
    # As long as leaves room for the end of the sequence.
    longest = min(text.positions, layout.length - len(text.end_ids) - 1) if layout.interleaved else text.positions
    prompt = text_prompt(made.grammar, 5, max(longest, 0))
    output = draw(made, prompt, text_prompt(made.grammar, 5, 0), sampler=sampler, seed=seed)
    whole = joined(prompt, output.sequence, made.grammar)
    assert torch.equal(made.grammar.read(whole.ids, whole.lengths()), whole.states)
    assert whole.ids.shape[1] <= layout.length or int(whole.lengths().max()) <= layout.length


def test_what_is_drawn_does_not_depend_on_the_batch() -> None:
    for seed in range(4):
        made = network(random_layout(seed), head_dim=12).double()
        longest = 0 if made.layout.interleaved else min(2, made.layout.segments[0].positions)
        prompt = text_prompt(made.grammar, 3, longest)
        together = draw(made, prompt).sequence
        for row in range(3):
            count = int(prompt.lengths()[row])
            alone = SegmentSequence(
                ids=prompt.ids[row : row + 1, :count],
                states=prompt.states[row : row + 1, :count],
                sample=torch.zeros(1, count, dtype=torch.int64),
            )
            segments = [segment.name for segment in made.layout.segments]
            random = CounterRandom(0, torch.tensor([row]))
            one = SegmentSampler(solver=Euler(2))(made, [alone], random, segments=segments, denoiser=DENOISER).sequence
            count = one.ids.shape[1]
            assert torch.equal(one.ids[0], together.ids[row, :count])
            assert (together.sample[row, count:] < 0).all()


def test_padding_that_all_prompts_have_is_not_read() -> None:
    """Texts come as long as the longest that there may be."""
    made = network(random_layout(1), head_dim=12).double()
    prompt = text_prompt(made.grammar, 3, 0)
    count = int(prompt.lengths().max())
    padded = [
        torch.nn.functional.pad(each, (0, 4), value=fill)
        for each, fill in zip((prompt.ids, prompt.states, prompt.sample), (0, made.grammar.done, -1), strict=True)
    ]
    longer = SegmentSequence(ids=padded[0], states=padded[1], sample=padded[2])
    readers = [SegmentReader(made, [each]) for each in (prompt.up_to(count), longer)]
    assert readers[0].flops() == readers[1].flops() > 0
    assert torch.equal(readers[0].hidden, readers[1].hidden)
    assert torch.equal(draw(made, prompt).sequence.ids, draw(made, longer).sequence.ids)


def picture_layout() -> SegmentLayout:
    image = Segment(name="image", shape=(1, 2), ids=(7, 8), begin_ids=(9,), end_ids=(10,))
    return SegmentLayout(segments=(text_segment(2, 2), image), interleaved=True, most_elements=9)


def probabilities(made: SegmentTransformer, prompt: Tensor, **settings: Any) -> Tensor:
    """The law of the two ids of an image behind a prompt `(1, n)`, `(4,)`, by passes over whole sequences."""
    every = torch.tensor([[7, 7], [7, 8], [8, 7], [8, 8]])
    ids = torch.cat((prompt.expand(4, -1), every), dim=1)
    grammar = made.grammar
    states, state = [], torch.full((4,), grammar.start)
    for number in range(ids.shape[1]):
        states.append(state)
        state = grammar.advance(state, ids[:, number])
    sequence = SegmentSequence(ids=ids, states=torch.stack(states, dim=1), sample=torch.zeros_like(ids))
    logits = made.logits(made(sequence), grammar.sets.index((1, (7, 8))))[:, -3:-1]
    return logits.gather(2, (every - 7)[..., None])[..., 0], logits


def test_images_follow_the_exact_law_with_guidance() -> None:
    made = network(picture_layout()).double()
    count, scale, temperature = 4000, 2.5, 0.8
    full, null = torch.tensor([[1, 3, 4, 9]]), torch.tensor([[1, 9]])
    logits = [probabilities(made, prompt)[1] for prompt in (full, null)]
    guided = ((1 - scale) * logits[1] + scale * logits[0]) / temperature
    every = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    expected = guided.log_softmax(dim=-1).gather(2, every[..., None])[..., 0].sum(dim=1).exp()
    text = SegmentPart(segment="text", content=torch.tensor([[3, 4]]).expand(count, 2), lengths=torch.full((count,), 2))
    nothing = SegmentPart(segment="text", content=text.content, lengths=torch.zeros(count, dtype=torch.int64))
    prompts = [assemble(made.grammar, [part], begun="image") for part in (text, nothing)]
    sampler = SegmentSampler({"image": DrawSettings(guidance_scale=scale, temperature=temperature)})
    output = draw(made, *prompts, sampler=sampler, segments=["image"])
    assert output.sequence.ids[:, 2].eq(10).all() and output.sequence.ids.shape[1] == 3
    found = (2 * (output.sequence.ids[:, 0] - 7) + output.sequence.ids[:, 1] - 7).bincount(minlength=4) / count
    torch.testing.assert_close(expected.sum().item(), 1.0)
    assert (found - expected).abs().sum() < 0.06
    # The prompts, then one pass for the second id; the end is written without the network.
    assert (output.sequential_passes, output.network_calls) == (2, 4)


def test_three_way_guidance_is_the_formula() -> None:
    full, image, null = torch.randn(3, 4, 5, dtype=torch.float64)
    found = guide_twice(full, image, null, image_scale=1.2, text_scale=3.0)
    torch.testing.assert_close(found, null + 1.2 * (image - null) + 3 * (full - image))
    torch.testing.assert_close(guide_twice(full, image, null, image_scale=1, text_scale=1), full)


def test_an_image_is_guided_by_an_image_and_by_a_text() -> None:
    """Greedy ids are those of the guided logits of three passes over the prompts."""
    made = network(picture_layout(), spread=1.0).double()
    grammar, count = made.grammar, 8
    before = SegmentPart(segment="image", content=torch.randint(7, 9, (count, 2)))
    text = SegmentPart(segment="text", content=torch.randint(3, 5, (count, 2)), lengths=torch.arange(count) % 3)
    prompts = [assemble(grammar, parts, begun="image") for parts in ([before, text], [before], [text])]
    prompts[2] = assemble(
        grammar,
        [SegmentPart(segment="text", content=text.content, lengths=torch.zeros_like(text.lengths))],
        begun="image",
    )
    of_set = grammar.sets.index((1, (7, 8)))
    logits = []
    for prompt in prompts:
        hidden = made(prompt)[torch.arange(count), prompt.lengths() - 1]
        logits.append(made.logits(hidden, of_set))
    expected = 7 + guide_twice(*logits, image_scale=1.5, text_scale=4.0).argmax(dim=-1)
    settings = DrawSettings(top_k=1, guidance_scale=4.0, image_guidance_scale=1.5)
    output = draw(made, *prompts, sampler=SegmentSampler({"image": settings}), segments=["image"])
    assert torch.equal(output.sequence.ids[:, 0], expected)
    assert output.network_calls == 3 * output.sequential_passes


def test_vectors_are_those_of_the_solver_over_the_whole_sequence() -> None:
    """An island behind prompts of different lengths, guided; without a cache the same vectors."""
    island = Segment(name="image", shape=(2,), input_dim=3, attention="bidirectional", begin_ids=(7,), end_ids=(8,))
    layout = SegmentLayout(segments=(text_segment(), island), interleaved=True, most_elements=12, positions="island")
    made, count = network(layout).double(), 4
    text = SegmentPart(segment="text", content=torch.randint(3, 7, (count, 3)), lengths=torch.arange(count))
    nothing = SegmentPart(segment="text", content=text.content, lengths=torch.zeros_like(text.lengths))
    prompts = [assemble(made.grammar, [part], begun="image") for part in (text, nothing)]
    sampler = SegmentSampler({"image": DrawSettings(guidance_scale=3.0)}, solver=Euler(4))
    random = CounterRandom(0, torch.arange(count))
    output = sampler(made, prompts, random, segments=["image"], denoiser=DENOISER)
    from discrete_lit.core.random import Purpose

    x = random.normal(Purpose.DIFFUSION_START, 6).view(count, 2, 3)
    for step in range(4):
        t = 1 - step / 4
        velocities = []
        for part in (text, nothing):
            vectors = SegmentPart(segment="image", content=x, times=torch.full((count,), t))
            sequence = assemble(made.grammar, [part, vectors])
            inside = made.grammar.is_vector[sequence.states]
            velocities.append(made.predict_vectors(made(sequence)[inside].view(count, 2, -1), segment="image"))
        x = x - (velocities[1] + 3 * (velocities[0] - velocities[1])) / 4
    inside = made.grammar.is_vector[output.sequence.states]
    torch.testing.assert_close(output.sequence.vectors["image"][inside].view(count, 2, 3), x, rtol=1e-5, atol=1e-6)
    assert (output.sequence.ids[:, 2] == 8).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0}, "temperature must be > 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must lie in"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawSettings(**settings)


def test_what_cannot_be_drawn_is_refused() -> None:
    made = network(picture_layout())
    prompt = text_prompt(made.grammar, 2, 1)
    with pytest.raises(ValueError, match="settings of audio; the segments are text, image"):
        draw(made, prompt, sampler=SegmentSampler({"audio": DrawSettings()}))
    with pytest.raises(ValueError, match="guidance needs 2 prompts for each sample, got 1"):
        draw(made, prompt, sampler=SegmentSampler({"image": DrawSettings(guidance_scale=2)}))
    full = SegmentPart(segment="text", content=torch.randint(3, 5, (2, 2)), lengths=torch.full((2,), 2))
    image = SegmentPart(segment="image", content=torch.randint(7, 9, (2, 2)))
    with pytest.raises(ValueError, match="leaves no room for the end"):
        draw(made, assemble(made.grammar, [image, image, full], closed=False), segments=["text"])


def test_an_island_with_its_ends_is_drawn_whole() -> None:
    """Each id by the law that a pass over the prompt, its begin, a mask in its place and its end gives."""
    image = Segment(
        name="image",
        shape=(1,),
        ids=(7, 8),
        begin_ids=(9,),
        end_ids=(10,),
        attention="bidirectional",
        mask_id=11,
        ends_inside=True,
    )
    made, count = network(SegmentLayout(segments=(text_segment(2, 2), image)), 0.8).double(), 4000
    text = SegmentPart(segment="text", content=torch.tensor([[3]]), lengths=torch.tensor([1]))
    whole = assemble(made.grammar, [text, SegmentPart(segment="image", content=torch.tensor([[11]]))])
    assert whole.ids.tolist() == [[1, 3, 2, 9, 11, 10]]
    law = made.logits(made(whole)[0, -2], made.grammar.masked_set("image")).softmax(dim=-1).detach()
    prompt = assemble(made.grammar, [text])
    rows = torch.zeros(count, 1, dtype=torch.int64)
    columns = torch.arange(prompt.ids.shape[1]).expand(count, -1)
    prompts = prompt.taken(rows, columns, valid=torch.ones_like(columns, dtype=torch.bool), padding=made.grammar.done)
    output = draw(made, prompts)
    assert output.sequential_passes == 2 and (output.sequence.ids[:, [0, 2]] == torch.tensor([9, 10])).all()
    found = (output.sequence.ids[:, 1] == 8).double().mean()
    assert abs(float(found - law[1])) < 0.03


def test_the_noise_on_what_is_sure_falls_to_nothing() -> None:
    linear, product = (MaskedSteps(steps=4, choice_temperature=2.0, noise=noise) for noise in ("linear", "product"))
    assert [linear.noise_scale(step, 4) for step in range(4)] == [1.5, 1.0, 0.5, 0.0]
    assert [product.noise_scale(step, 4) for step in range(4)] == [1.5, 0.75, 0.1875, 0.0]
    with pytest.raises(ValueError, match="noise must be 'linear' or 'product'"):
        MaskedSteps(noise="square")  # type: ignore[arg-type]


def test_packed_weights_draw_what_the_network_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8 rows on a CPU multiplies by weights that are laid out once: the same ids."""
    made = network(picture_layout(), width=32, head_dim=16)
    prompt = text_prompt(made.grammar, 12, 1)
    output = draw(made, prompt)
    seen = list[Any]()
    monkeypatch.setattr(segment_by_segment, "packed", lambda network, rows: seen.append(rows) or network)
    assert torch.equal(draw(made, prompt).sequence.ids, output.sequence.ids) and seen == [12]
