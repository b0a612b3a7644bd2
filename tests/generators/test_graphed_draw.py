"""A draw that is recorded and replayed gives what a draw gives: for every sampler, label, index and batch."""

import warnings

import pytest
import torch
from helpers.every_sampler import make_drawer, names
from helpers.recorded_graph import RecordedGraph, RecordedGraphs

from discrete_lit.backbones import cpu_kernels, execution
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import GraphedDraw
from discrete_lit.samplers import MaskGITSampler

ASKS = "tau-gaussian"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ways of a CPU, whose packed weights no operator can write to."""
    monkeypatch.setattr(cpu_kernels, "_SWITCH", "0")
    monkeypatch.setattr(execution, "casting_pays", lambda device: True)


def batches(classes: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The one that warms up, the one that is recorded, and a smaller one of other labels and indices."""
    return [
        (torch.arange(5) % classes, torch.arange(5)),
        ((torch.arange(5) + 1) % classes, torch.arange(5, 10)),
        (torch.tensor([2, 0, 1]) % classes, torch.tensor([7, 2**40, 3])),
    ]


@pytest.mark.slow_but(30)
@pytest.mark.parametrize("name", [name for name in names() if name != ASKS])
def test_a_replayed_draw_is_the_draw(name: str) -> None:
    drawer, recorder = make_drawer(name), RecordedGraphs()
    draw = GraphedDraw(drawer, seed=3, batch_size=5, recorder=recorder)
    for number, (labels, indices) in enumerate(batches()):
        output = draw(labels, indices)
        expected = drawer.draw(labels, CounterRandom(3, indices))
        assert torch.equal(output.tokens, expected.tokens), number
        assert draw.recorded == (number > 0) and draw.reason is None
        # What is recorded asks the network also where nothing is drawn.
        assert output.network_calls >= expected.network_calls
    assert (recorder.warmed_up, len(recorder.graphs)) == (1, 1)
    assert output.flops > 0 and output.trace is None


def test_a_result_outlasts_the_next_replay() -> None:
    drawer = make_drawer("raster")
    draw = GraphedDraw(drawer, batch_size=5, recorder=RecordedGraphs())
    outputs = [(draw(*batch).tokens, drawer.draw(batch[0], CounterRandom(0, batch[1])).tokens) for batch in batches()]
    for tokens, expected in outputs:
        assert torch.equal(tokens, expected)


def test_what_cannot_be_recorded_is_drawn_and_named() -> None:
    drawer = make_drawer(ASKS)
    draw = GraphedDraw(drawer, batch_size=5, recorder=RecordedGraphs())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for labels, indices in batches():
            assert torch.equal(draw(labels, indices).tokens, drawer.draw(labels, CounterRandom(0, indices)).tokens)
    assert [str(warning.message) for warning in seen] == [f"the draw is not recorded as a CUDA graph: {draw.reason}"]
    assert (
        draw.reason is not None and draw.reason.startswith("TauLeapingSampler waits to be told") and not draw.recorded
    )


def test_a_failing_recorder_is_named_once() -> None:
    class Failing(RecordedGraphs):
        def record(self, run):
            run()
            try:
                raise RuntimeError("CUDA error: out of graphs\nlong explanation")
            finally:
                raise RuntimeError("the recording was broken by an earlier error")

    drawer = make_drawer("maskgit")
    draw = GraphedDraw(drawer, batch_size=5, recorder=Failing())
    draw(*batches()[0])
    with pytest.warns(UserWarning, match=r"not recorded as a CUDA graph: CUDA error: out of graphs$"):
        draw(*batches()[1])
    for labels, indices in batches():
        assert torch.equal(draw(labels, indices).tokens, drawer.draw(labels, CounterRandom(0, indices)).tokens)


def test_a_cpu_has_no_graphs() -> None:
    drawer = make_drawer("maskgit")
    draw = GraphedDraw(drawer, batch_size=5)
    assert draw.reason == "a cpu has no CUDA graphs"
    for labels, indices in batches():
        assert torch.equal(draw(labels, indices).tokens, drawer.draw(labels, CounterRandom(0, indices)).tokens)
    assert not draw.recorded


def test_sharded_weights_are_not_recorded() -> None:
    class Sharded(torch.nn.Parameter):
        pass

    drawer = make_drawer("maskgit")
    drawer.backbone.class_embedding.weight = Sharded(drawer.backbone.class_embedding.weight.data)
    assert GraphedDraw(drawer, batch_size=2, recorder=RecordedGraphs()).reason == "the weights are sharded"


@pytest.mark.parametrize("name", ["raster", "maskgit", "ancestral-absorbing", "ancestral-uniform"])
def test_broken_weights_are_told_after_the_replay(name: str) -> None:
    """Also where they broke after the recording; and a draw goes on where they were mended."""
    drawer = make_drawer(name)
    draw = GraphedDraw(drawer, batch_size=5, recorder=RecordedGraphs())
    expected = [draw(*batch).tokens for batch in batches()[:2]][1]
    weight = drawer.backbone.blocks[0].mlp.expand.weight.detach()
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are NaN"):
        draw(*batches()[1])
    weight.copy_(kept)
    assert torch.equal(draw(*batches()[1]).tokens, expected)


def test_labels_out_of_range_are_told_after_the_replay() -> None:
    draw = GraphedDraw(make_drawer("maskgit"), batch_size=5, recorder=RecordedGraphs())
    for batch in batches()[:2]:
        draw(*batch)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\] \(2 is the null label\), got \[0, 7\]"):
        draw(torch.tensor([0, 7, 1, 1, 1]), torch.arange(5))


def test_weights_that_change_in_place_are_used() -> None:
    drawer = make_drawer("maskgit")
    draw = GraphedDraw(drawer, batch_size=5, recorder=RecordedGraphs())
    labels, indices = batches()[0]
    before = [draw(labels, indices).tokens for _ in range(2)][1]
    with torch.no_grad():
        for parameter in drawer.backbone.parameters():
            parameter.copy_(parameter.roll(1, 0) * 1.5)
    after = draw(labels, indices).tokens
    assert torch.equal(after, drawer.draw(labels, CounterRandom(0, indices)).tokens) and not torch.equal(after, before)


@pytest.mark.parametrize("name", ["raster", "maskgit", "next_scale", "bar", "ancestral-absorbing"])
def test_another_precision_is_recorded_anew(name: str) -> None:
    drawer, recorder = make_drawer(name), RecordedGraphs()
    draw = GraphedDraw(drawer, batch_size=5, recorder=recorder)
    labels, indices = batches()[0]
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            expected = drawer.draw(labels, CounterRandom(0, indices)).tokens
            for _ in range(3):
                assert torch.equal(draw(labels, indices).tokens, expected)
    assert (recorder.warmed_up, len(recorder.graphs)) == (2, 2)


def test_weights_are_cast_once_a_draw() -> None:
    """With autocast's cache off, as while a graph is recorded, each pass would cast all of them."""
    drawer = make_drawer("raster")
    recorder = RecordedGraphs()
    draw = GraphedDraw(drawer, batch_size=5, recorder=recorder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches()[:2]:
            draw(*batch)
    weights = {parameter.data_ptr() for parameter in drawer.backbone.parameters() if parameter.ndim == 2}
    casts = [
        args[0].data_ptr()
        for func, args, *_ in recorder.graphs[0].calls
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights
    ]
    assert len(casts) == len(set(casts)) == 8  # four of each block


def test_too_many_labels() -> None:
    draw = GraphedDraw(make_drawer("maskgit"), batch_size=2, recorder=RecordedGraphs())
    with pytest.raises(ValueError, match="was made for 2 labels at a time, got 5"):
        draw(*batches()[0])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        GraphedDraw(make_drawer("maskgit"), batch_size=0)
    empty = torch.zeros(0, dtype=torch.int64)
    assert draw(empty, empty).tokens.shape == (0, 6)


@pytest.mark.parametrize("family", ["masked", "autoregressive", "next_scale"])
def test_generators(family: str, make_generator, make_next_scale) -> None:
    """With their own order and layout of the tokens."""
    if family == "next_scale":
        generator = make_next_scale(spread=0.5)
    else:
        own = {"order": (2, 0, 1)} if family == "autoregressive" else {"sampler": MaskGITSampler(steps=2)}
        generator = make_generator(family, spread=0.5, **own)
    draw = GraphedDraw(generator, seed=2, batch_size=5, recorder=RecordedGraphs())
    for labels, indices in batches():
        assert torch.equal(draw(labels, indices).tokens, generator.sample(labels, seed=2, indices=indices))
    assert draw.recorded


def test_the_recorder_refuses_what_waits() -> None:
    values = torch.arange(4.0)
    for ask in (lambda: values.sum().item(), lambda: values[values > 1], lambda: bool(values.any()), values.nonzero):
        with pytest.raises(RuntimeError, match="not permitted while a stream is captured"), RecordedGraph():
            ask()
    with RecordedGraph() as graph:
        result = (values + 1).cumsum(0)[1:]
    values.fill_(0)
    graph.replay()
    assert result.tolist() == [2.0, 3.0, 4.0]
    assert graph.operators().total() == 2
