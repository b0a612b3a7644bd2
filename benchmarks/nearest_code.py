"""The search for the nearest code, in evaluation: ours, vector-quantize-pytorch's, and the bare matrix products.

    OMP_NUM_THREADS=2 python benchmarks/nearest_code.py
    OMP_NUM_THREADS=2 python benchmarks/nearest_code.py --size 262144 --dim 8 --rounds 10

8,192 random latents and K random codes of width D. The arms take turns of 0.4 s in every round, so that they meet the
same state of the machine: `VectorQuantizer.encode`; `VectorQuantize` of vector-quantize-pytorch in eval mode (its whole
forward, which gives the ids; not at K = 262,144, where its distances take 8 GiB and more); the products of latents and
codes alone, in chunks of 64 MB written over one another; and the same in tiles that stay in the cache, as the search
forms them, where nothing is done with them. The ids are compared with a search in float64. Then peak memory is
measured: the most that the process holds during the search above what it held before it, in a process of its own.

Measured on 22 November 2026, 2 threads on 2 cores of an Intel Xeon that did nothing else, 7 rounds: K = 16,384, D =
8: 51x faster than vector-quantize-pytorch, 1.47x the bare products (1.39 to 1.44 in three other runs), 27 MB; D = 256:
5.4x, 1.35x, 98 MB; K = 262,144, D = 8: 1.09x the products, 50 MB; all ids those of float64.
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side.memory import in_own_process, peak_of
from side_by_side.peers import vector_quantize_search
from side_by_side.timing import alternate, milliseconds, ratio
from torch import Tensor

from discrete_lit.tokenizers.quantizers import VectorQuantizer

LATENTS = 8192
CASES = ((16_384, 8), (16_384, 256), (262_144, 8))
# Our ratio to the other package at each case, and to the bare products at all of them.
TARGETS = {(16_384, 8): 5.0, (16_384, 256): 3.0}
PRODUCTS_TARGET, MEMORY_TARGET = 1.5, 256
# Products of a chunk, and a tile: rows by codes.
CHUNK, TILE = 2**24, (256, 1024)
# Seconds that an arm is called for in each round.
TURN = 0.4


def build(size: int, dim: int) -> tuple[VectorQuantizer, Tensor]:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(size, dim, codebook_init="uniform").eval()
    quantizer.codebook.codes.normal_()
    return quantizer, torch.randn(LATENTS, dim)


def bare_products(codes: Tensor, latents: Tensor, tile: tuple[int, int]) -> Callable[[], None]:
    products = torch.empty(tile)

    def run() -> None:
        for rows in latents.split(tile[0]):
            for part in codes.split(tile[1]):
                torch.mm(rows, part.T, out=products)

    return run


def wrong_ids(ids: Tensor, codes: Tensor, latents: Tensor) -> tuple[int, float]:
    """How many ids differ from a float64 search, and by how much their squared distance is larger at most."""
    wrong, excess = 0, 0.0
    doubles = codes.double()
    for rows, found in zip(latents.double().split(128), ids.split(128), strict=True):
        distances = doubles.square().sum(dim=1) - 2 * rows @ doubles.T
        best = distances.min(dim=1)
        wrong += int((best.indices != found).sum())
        excess = max(excess, float((distances.gather(1, found[:, None])[:, 0] - best.values).max()))
    return wrong, excess


def peak_memory(size: int, dim: int) -> int:
    """Bytes held at most during the search above what was held before it."""
    quantizer, latents = build(size, dim)
    quantizer.encode(latents[:1])  # the libraries' own buffers
    return peak_of(lambda: quantizer.encode(latents))


def measure(size: int, dim: int, rounds: int) -> None:
    quantizer, latents = build(size, dim)
    codes = quantizer.codebook.codes
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: quantizer.encode(latents),
        "bare products": bare_products(codes, latents, (CHUNK // size, size)),
        "bare products in tiles": bare_products(codes, latents, TILE),
    }
    if size <= 2**16:
        arms["vector-quantize-pytorch"] = vector_quantize_search(codes, latents)
    with torch.no_grad():
        taken = alternate(arms, rounds, at_least=TURN)
    wrong, excess = wrong_ids(quantizer.encode(latents), codes, latents)
    memory = in_own_process(peak_memory, size, dim) / 2**20
    print(f"\nK {size}, D {dim}, {LATENTS} latents, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"  {memory:.0f} MB at most (target {MEMORY_TARGET})")
    for name, times in taken.items():
        print(f"  {name:24s} {milliseconds(times)}")
    ours = taken["ours"]
    print(f"  ours / bare products: {ratio(ours, taken['bare products'], f'at most {PRODUCTS_TARGET}')}")
    print(f"  ours / those in tiles: {ratio(ours, taken['bare products in tiles'])}")
    if "vector-quantize-pytorch" in taken:
        target = f"at least {TARGETS[size, dim]}" if (size, dim) in TARGETS else ""
        print(f"  vector-quantize-pytorch / ours: {ratio(taken['vector-quantize-pytorch'], ours, target)}")
    print(f"  ids unlike a float64 search: {wrong}, their squared distance larger by at most {excess:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="K; all three cases if left out")
    parser.add_argument("--dim", type=int, default=8, help="D, with --size")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    for size, dim in [(options.size, options.dim)] if options.size else CASES:
        measure(size, dim, options.rounds)


if __name__ == "__main__":
    main()
