"""The codebook alone: how codes begin, follow the latents, and come back to life."""

import copy

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import Codebook

both_updates = pytest.mark.parametrize("update", ["ema", "gradient"])


def step(codebook: Codebook, latents: torch.Tensor) -> torch.Tensor:
    codebook.prepare(latents)
    ids = codebook.search(latents)
    codebook.observe(latents, ids)
    return ids


def clusters(count: int, dim: int, members: int, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres far apart, and latents around them in a random order."""
    centres = F.normalize(torch.randn(count, dim), dim=1) * 20
    latents = centres.repeat(members, 1) + torch.randn(count * members, dim) * spread
    return centres, latents[torch.randperm(len(latents))]


@both_updates
def test_kmeans_finds_clear_clusters(update) -> None:
    _, latents = clusters(12, 8, 30)
    codebook = Codebook(12, 8, update=update, init="kmeans")
    codebook.prepare(latents)
    ids = codebook.search(latents)
    assert (ids.bincount(minlength=12) == 30).all()
    for code in range(12):
        torch.testing.assert_close(codebook.codes[code].detach(), latents[ids == code].mean(dim=0))
    if update == "ema":
        torch.testing.assert_close(codebook.embedding_sum, codebook.codes * codebook.cluster_size[:, None])


def test_kmeans_on_the_sphere_finds_directions() -> None:
    centres, latents = clusters(6, 4, 20)
    latents = latents * torch.rand(len(latents), 1).add(0.1)
    codebook = Codebook(6, 4, init="kmeans", normalize=True)
    codebook.prepare(latents)
    ids = codebook.search(latents)
    assert (ids.bincount(minlength=6) == 20).all()
    for code in range(6):
        mean = F.normalize(latents[ids == code], dim=1).mean(dim=0)
        torch.testing.assert_close(codebook.lookup(torch.tensor(code)), F.normalize(mean, dim=0))
    assert F.cosine_similarity(codebook.codes[:, None], centres, dim=2).amax(dim=1).min() > 0.999


def test_kmeans_of_many_codes_lowers_the_distance() -> None:
    """More codes than seeding rounds: several seeds at once; better than codes that are some of the latents."""
    latents = torch.randn(2000, 3)
    distance = {}
    for init in ("data", "kmeans"):
        codebook = Codebook(400, 3, init=init)
        codebook.prepare(latents)
        ids = codebook.search(latents)
        assert len(ids.unique()) == 400
        distance[init] = float(F.mse_loss(codebook.lookup(ids), latents))
    assert distance["kmeans"] < 0.8 * distance["data"]


@pytest.mark.parametrize("init", ["data", "kmeans"])
@pytest.mark.parametrize("coarse", [False, True])
def test_first_codes_do_not_depend_on_the_order_of_latents(init, coarse: bool) -> None:
    latents = torch.randn(300, 3)
    if coarse:  # ties in every channel
        latents = latents.mul(2).round()
    codes = []
    for order in (torch.arange(300), torch.randperm(300)):
        codebook = Codebook(16, 3, init=init)
        codebook.prepare(latents[order])
        codes.append(codebook.codes)
    torch.testing.assert_close(codes[0], codes[1])


@both_updates
@pytest.mark.parametrize("init", ["data", "kmeans"])
def test_latents_that_are_not_finite_are_left_out(update, init) -> None:
    latents = torch.randn(60, 3)
    poisoned = torch.cat((latents, torch.tensor([[torch.nan, 0, 0], [0, torch.inf, 0], [1, 1, -torch.inf]])))
    poisoned = poisoned[torch.randperm(63)]
    clean, dirty = (Codebook(8, 3, update=update, init=init, revive_below=1.0) for _ in range(2))
    for _ in range(3):
        step(clean, latents)
        step(dirty, poisoned)
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(dirty.state_dict()[name], value)


def test_a_batch_without_finite_latents_starts_nothing() -> None:
    codebook = Codebook(4, 2)
    codebook.prepare(torch.full((5, 2), torch.nan))
    assert not codebook.started
    codebook.prepare(torch.ones(5, 2) * 7)
    assert codebook.started and (codebook.codes == 7).all()


@both_updates
@pytest.mark.parametrize("normalize", [False, True])
def test_revival_brings_usage_up(update, normalize: bool) -> None:
    used = {}
    for revive_below in (None, 1.0):
        codebook = Codebook(
            64, 4, update=update, decay=0.9, init="uniform", normalize=normalize, revive_below=revive_below, seed=3
        )
        codebook.codes.data[1:] = codebook.codes.data[:1] + 1e-4 * torch.randn(63, 4)  # collapsed
        if update == "ema":
            codebook.embedding_sum.copy_(codebook.codes)
        for _ in range(40):
            ids = step(codebook, torch.randn(512, 4) + 2)
        used[revive_below] = len(ids.unique()) / 64
    assert used[1.0] > 0.9
    assert used[None] < 0.8


@both_updates
def test_a_revived_code_is_a_latent_with_fresh_statistics(update) -> None:
    codebook = Codebook(8, 2, update=update, decay=0.5, init="uniform", revive_below=1.5)
    latents = torch.randn(30, 2)
    ids = torch.arange(30) % 4  # codes 4 to 7 have no latents
    before = codebook.codes.detach().clone()
    codebook.observe(latents, ids)
    revived = codebook.codes.detach()[4:]
    assert len(revived.unique(dim=0)) == 4
    assert all((latents == code).all(dim=1).any() for code in revived)
    assert (codebook.cluster_size[4:] == 1.5).all()
    assert codebook.cluster_size[:4].tolist() == pytest.approx([0.5 * 1.5 + 0.5 * count for count in (8, 8, 7, 7)])
    if update == "ema":
        torch.testing.assert_close(codebook.embedding_sum[4:], revived * 1.5)
    else:
        assert torch.equal(codebook.codes.detach()[:4], before[:4])


def test_the_least_used_codes_come_first_where_latents_are_few() -> None:
    codebook = Codebook(6, 2, update="gradient", decay=0.5, init="uniform", revive_below=1.0)
    codebook.cluster_size.copy_(torch.tensor([0.9, 0.1, 0.5, 9.0, 0.3, 0.8]))
    before = codebook.codes.detach().clone()
    latents = torch.ones(2, 2)
    codebook.observe(latents, torch.tensor([3, 3]))
    changed = (codebook.codes.detach() != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]


def test_revival_draws_anew_at_every_step_and_by_the_seed() -> None:
    latents, ids = torch.randn(200, 2), torch.zeros(200, dtype=torch.int64)

    def revived(seed: int) -> list[torch.Tensor]:
        codebook = Codebook(5, 2, update="gradient", decay=0.0, init="uniform", revive_below=1.0, seed=seed)
        drawn = []
        for _ in range(2):
            codebook.observe(latents, ids)
            drawn.append(codebook.codes.detach()[1:].clone())
        return drawn

    first, second = revived(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, revived(0)[0]) and not torch.equal(first, revived(1)[0])


@both_updates
@pytest.mark.parametrize("init", ["kmeans", "data", "normal"])
def test_resumed_training_goes_on_exactly(update, init) -> None:
    batches = torch.randn(6, 50, 3)
    straight = Codebook(32, 3, update=update, init=init, revive_below=1.0)
    for batch in batches[:3]:
        step(straight, batch)
    resumed = Codebook(32, 3, update=update, init=init, revive_below=1.0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    torch.rand(7)
    for batch in batches[3:]:
        step(straight, batch)
        step(resumed, batch)
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_codes_on_the_sphere_are_directions_of_running_sums() -> None:
    """Spherical k-means by hand; a code without latents keeps its direction when its sum has decayed to nothing."""
    codebook = Codebook(3, 2, decay=0.5, init="uniform", normalize=True)
    codebook.codes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]) * 5)
    codebook.embedding_sum.copy_(F.normalize(codebook.codes, dim=1))
    latents = torch.tensor([[3.0, 1.0], [0.1, 0.9], [2.0, 0.0]])
    assert codebook.search(latents).tolist() == [0, 1, 0]
    codebook.observe(latents, codebook.search(latents))
    units = F.normalize(latents, dim=1)
    expected = F.normalize(torch.stack((0.5 * (units[0] + units[2]) + torch.tensor([0.5, 0.0]), units[1])), dim=1)
    expected[1] = F.normalize(0.5 * units[1] + 0.5 * torch.tensor([0.0, 1.0]), dim=0)
    torch.testing.assert_close(codebook.lookup(torch.tensor([0, 1])), expected)
    for _ in range(300):
        codebook.observe(latents, codebook.search(latents))
    torch.testing.assert_close(codebook.lookup(torch.tensor(2)), torch.full((2,), -(0.5**0.5)))


def test_normalised_search_looks_at_angles_alone() -> None:
    codebook = Codebook(2, 2, update="gradient", init="uniform", normalize=True)
    codebook.codes.data.copy_(torch.tensor([[0.1, 0.0], [5.0, 5.0]]))
    assert codebook.search(torch.tensor([[9.0, 1.0], [0.001, 0.001]])).tolist() == [0, 1]
    torch.testing.assert_close(codebook.lookup(torch.tensor(1)), torch.full((2,), 0.5**0.5))
    assert codebook.lookup(torch.tensor(0)).requires_grad


@both_updates
def test_nothing_moves_in_eval_mode(update) -> None:
    codebook = Codebook(8, 2, update=update, revive_below=1.0).eval()
    before = copy.deepcopy(codebook.state_dict())
    step(codebook, torch.randn(20, 2))
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


def test_random_starts() -> None:
    assert Codebook(50, 4, init="uniform").codes.abs().max() <= 1 / 50
    assert 19 / 500 < Codebook(500, 4, init="vaex").codes.abs().max() <= 20 / 500
    assert Codebook(500, 64, init="normal").codes.std() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "must be positive, got 0 and 2"),
        ({"update": "mean"}, "must be 'ema' or 'gradient', got 'mean'"),
        ({"init": "zeros"}, "one of data, kmeans, uniform, unit_uniform, vaex, normal, got 'zeros'"),
        ({"decay": -0.1}, r"decay must lie in \[0, 1\), got -0.1"),
        ({"revive_below": 0.0}, "revive_below must be > 0, or None"),
        ({"revive_below": float("nan")}, "revive_below must be > 0, or None"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(**{"size": 4, "dim": 2, **arguments})


def test_uniform_codes_of_unit_length() -> None:
    """LlamaGen's start: directions of the uniform one, of length 1."""
    torch.manual_seed(0)
    uniform = Codebook(50, 3, update="gradient", init="uniform", normalize=True)
    torch.manual_seed(0)
    unit = Codebook(50, 3, update="gradient", init="unit_uniform", normalize=True)
    assert uniform.codes.abs().max() <= 1 / 50
    torch.testing.assert_close(unit.codes, uniform.codes / uniform.codes.norm(dim=1, keepdim=True))
