"""The floors that speeds on a GPU are held against: bytes and operations of tiny backbones, counted by hand."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_parts import speed
from gpu_parts.part import Machine, Setting
from side_by_side.floors import (
    Work,
    cache_bytes,
    decoding,
    decoding_seconds,
    joint_entropy_work,
    nearest_code_work,
    training_flops,
    weight_bytes,
)
from side_by_side.host_work import host_work, host_work_between_passes, of_runtime_calls
from side_by_side.passes import bare_passes
from side_by_side.recipes import make_generator, make_tokenizer
from side_by_side.timing import Repeated

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.core.random import CounterRandom

CPU, BF16 = torch.device("cpu"), torch.bfloat16
WIDTH, DEPTH, HEADS, HIDDEN, CODES, LENGTH = 8, 2, 2, 16, 32, 4
# A block of SwiGLU without biases: queries, keys and values, their output, gate and value, contraction.
BLOCK = WIDTH * 3 * WIDTH + WIDTH * WIDTH + WIDTH * 2 * HIDDEN + HIDDEN * WIDTH


def backbone(attention: str = "causal", **settings: object) -> Transformer:
    layout = SequenceLayout(CODES, (2, 2), num_classes=3, attention=attention, mask_token=attention != "causal")  # type: ignore[arg-type]
    switches = {"mlp": "swiglu", "norm": "rms", "bias": False, "mlp_hidden": HIDDEN} | settings
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=HEADS, **switches).eval()  # type: ignore[arg-type]


def test_a_cached_pass_reads_blocks_in_the_precision_of_products_and_logits_in_float32():
    assert weight_bytes(backbone(), BF16) == 2 * DEPTH * BLOCK + 4 * WIDTH * CODES
    assert weight_bytes(backbone(), torch.float32) == 4 * (DEPTH * BLOCK + WIDTH * CODES)


def test_a_tied_table_is_read_as_the_logits_matrix():
    assert weight_bytes(backbone(tied=True), BF16) == weight_bytes(backbone(), BF16)


def test_modulations_are_read_where_they_change_along_the_sequence():
    modulations = DEPTH * (6 * WIDTH * WIDTH + 6 * WIDTH) + 2 * WIDTH * WIDTH + 2 * WIDTH
    plain = weight_bytes(backbone(), BF16)
    assert weight_bytes(backbone(conditioning="prefix_adaln"), BF16) == plain
    changing = backbone(conditioning="prefix_adaln", condition_positions=True)
    assert weight_bytes(changing, BF16) == plain + 2 * modulations


def test_the_passes_of_decoding_read_the_cache_as_it_grows_and_multiply_one_position():
    network, rows = backbone(), 6
    passes = decoding(network, rows, BF16)
    assert len(passes) == LENGTH
    for token, work in enumerate(passes):
        elements = 1 + token  # the class stands before the tokens
        assert cache_bytes(network, rows, elements, BF16) == 2 * DEPTH * rows * WIDTH * elements * 2
        assert work.bytes == weight_bytes(network, BF16) + cache_bytes(network, rows, elements, BF16)
        # Two operations for each weight and row; queries with keys, and weights with values.
        assert work.flops == 2 * rows * (DEPTH * BLOCK + WIDTH * CODES) + DEPTH * 2 * 2 * rows * WIDTH * elements


def test_the_floor_of_decoding_is_the_sum_over_its_passes_of_the_longer_of_two_times():
    network = backbone()
    moved = sum(work.bytes for work in decoding(network, 2, BF16))
    multiplied = sum(work.flops for work in decoding(network, 2, BF16))
    assert decoding_seconds(network, 2, BF16, bandwidth=1e3, rate=1e12) == pytest.approx(moved / 1e3)
    assert decoding_seconds(network, 2, BF16, bandwidth=1e12, rate=1e3) == pytest.approx(multiplied / 1e3)
    assert (Work(10, 4) + Work(bytes=10)).seconds(bandwidth=2.0, rate=1.0) == 10.0
    assert Work(10, 40).seconds(bandwidth=2.0, rate=1.0) == 40.0


def test_training_counts_three_forward_passes():
    elements, rows = LENGTH, 5
    products = 2 * rows * elements * (DEPTH * BLOCK + WIDTH * CODES)
    attention = DEPTH * 2 * 2 * rows * WIDTH * elements * elements
    assert training_flops(backbone(), rows, LENGTH - 1) == 3 * (products + attention)


def test_quantizers_are_counted_by_their_products():
    assert nearest_code_work(100, 50, 8) == Work(4 * 8 * 150 + 800, 2 * 100 * 50 * 8)
    assert joint_entropy_work(10, 5) == Work(16 * 10 * (4 + 8), 6 * 10 * 4 * 8)


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("llamagen_b_imagenet256", 111),
        ("rar_b_imagenet256", 259),
        ("maskgit_imagenet256", 172),
    ],
)
def test_generators_have_the_sizes_of_their_recipes(recipe: str, millions: int):
    made = make_generator(recipe, device=torch.device("meta"))
    assert round(sum(parameter.numel() for parameter in made.backbone.parameters()) / 1e6) == millions
    assert made.length == 256


def test_no_weights_of_a_recipe_are_zero():
    """Products with zeros are faster than others."""
    networks = [
        make_generator("rar_b_imagenet256", device=CPU, tiny=True),
        make_tokenizer("llamagen_vq16_imagenet256", device=CPU, tiny=True),
    ]
    matrices = [parameter for network in networks for parameter in network.parameters() if parameter.ndim >= 2]
    assert all(bool(parameter.any()) for parameter in matrices)


@pytest.mark.parametrize("recipe", ["maskgit_imagenet256", "var_d16_imagenet256", "sedd_absorb"])
def test_the_bare_passes_of_a_draw_have_its_rows(recipe: str):
    generator = make_generator(recipe, device=CPU, tiny=True, sampler={"guidance_scale": 2.0}, label_dropout=0.1)
    labels, shapes = torch.arange(3), []
    generator.backbone.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    drawn = generator.draw(labels, CounterRandom(0, labels))
    of_draw = shapes.copy()
    shapes.clear()
    with torch.no_grad():
        bare_passes(generator.backbone, labels, drawn.sequential_passes)()
    assert shapes == of_draw and {rows for rows, _ in shapes} == {6}


def test_what_the_host_does_is_counted():
    values = torch.randn(4)
    work = host_work(lambda: float((values * 2 + 1).sum().view(1)), CPU)
    assert work == (3, 0, 1)


def test_what_the_host_does_is_counted_between_two_passes():
    network = nn.Identity()

    def run() -> None:
        for number in range(5):
            values = network(torch.zeros(2)) + number
            if number == 3:
                float(values.sum())

    early = host_work_between_passes(network, run, CPU, passes=(1, 3))
    assert early.waits == 0 and early.launches >= 2
    assert host_work_between_passes(network, run, CPU, passes=(1, 4)).waits == 1
    with pytest.raises(ValueError, match="only 5 were made"):
        host_work_between_passes(network, run, CPU, passes=(1, 9))


def test_calls_of_cuda_are_told_apart_by_their_names():
    calls = {
        "cudaLaunchKernel": 3,
        "cuLaunchKernelEx": 2,
        "cudaMemcpyAsync": 1,
        "cudaMemsetAsync": 1,
        "cudaGraphLaunch": 1,
        "cudaStreamSynchronize": 2,
        "cudaDeviceSynchronize": 5,
        "cudaStreamIsCapturing": 7,
        "aten::mm": 9,
        "Memcpy DtoD (Device -> Device)": 1,
    }
    assert of_runtime_calls(name for name, count in calls.items() for _ in range(count)) == (7, 1, 2)


def setting(device: str, tmp_path: Path) -> Setting:
    machine = Machine(name="a card", bandwidth=1e12, rates={"bfloat16": 1e15}, memory=1)
    return Setting(device=torch.device(device), tiny=False, golden=None, output=tmp_path, machine=machine, seconds=60.0)


def test_rows_hold_amounts_a_second_against_the_floor_and_the_peer(tmp_path: Path):
    taken = Repeated(2.0, 1.9, 2.1, 5)
    more = {"least": 1.0, "least_of": "bytes", "peer": ("theirs", 5.0)}
    row = speed.measurement(
        setting("cuda", tmp_path), "draw", "", taken, amount=64, unit="images/s", share=0.5, times=2.5, **more
    )
    assert (row.value, row.floor and row.floor.value, row.peer and row.peer.value) == (32.0, 64.0, 12.8)
    assert row.met and row.share == 0.5 and row.times_the_peer == 2.5
    assert row.target == "at least 50% of the floor, at least 2.5 times theirs"
    for missed in ({"share": 0.51}, {"times": 2.6}, {"share": 0.5, "times": 2.6}):
        assert speed.measurement(setting("cuda", tmp_path), "", "", taken, **missed, **more).met is False
    in_milliseconds = speed.measurement(setting("cpu", tmp_path), "", "", taken, share=0.5, **more)
    assert (in_milliseconds.value, in_milliseconds.share, in_milliseconds.met) == (2000.0, 0.5, None)


def test_a_peer_that_is_missing_or_fails_is_named_in_a_note():
    assert speed.against("torch", "torch", lambda: 3) == (3, "")
    assert speed.against("no_such_package", "theirs", lambda: 3) == (None, "peer theirs not installed")
    assert speed.against("torch", "theirs", lambda: 1 // 0) == (
        None,
        "peer theirs failed: ZeroDivisionError: integer division or modulo by zero",
    )
