"""The Fréchet distance against independent formulas, and streaming moments against NumPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from discrete_lit.metrics import moments
from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.metrics.frechet import FDR6_DENOMINATORS, FrechetDistance, FrechetRatio, compare, frechet_distance
from discrete_lit.metrics.moments import FeatureMoments, Moments


class Flatten(FeatureExtractor):
    """Pixels as features."""

    name = "Pixels"
    protocol = "none"
    weights_sha256 = "0" * 64

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def extract(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def random_features(count: int, dim: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, dim)) @ random.normal(size=(dim, dim)) + random.normal(size=dim)


def moments_of(features: np.ndarray) -> Moments:
    streaming = FeatureMoments(Flatten(features.shape[1]))
    streaming.update(torch.from_numpy(features))
    return streaming.compute()


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_matches_scipy_sqrtm(dim):
    first, second = random_features(500, dim, 0), random_features(300, dim, 1)
    covariances = np.cov(first.T).reshape(dim, dim), np.cov(second.T).reshape(dim, dim)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(expected, rel=1e-9)


def test_diagonal_gaussians_have_a_closed_form():
    means = torch.tensor([[0.0, 1.0, -2.0], [3.0, 1.0, 0.5]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0, 0.0], [0.5, 2.0, 3.0]], dtype=torch.float64)
    first, second = (Moments(means[i], torch.diag(deviations[i] ** 2)) for i in (0, 1))
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_identical_moments_are_at_distance_zero_exactly():
    moments = moments_of(random_features(50, 12, 0))
    copy = Moments(moments.mean.clone(), moments.covariance.clone(), count=moments.count)
    assert frechet_distance(moments, copy) == 0.0


def test_never_negative_and_symmetric():
    first, second = moments_of(random_features(60, 20, 0)), moments_of(random_features(60, 20, 0) * (1 + 1e-9))
    assert 0 <= frechet_distance(first, second) < 1e-6
    third = moments_of(random_features(60, 20, 3))
    assert frechet_distance(first, third) == pytest.approx(frechet_distance(third, first), rel=1e-10)


@pytest.mark.parametrize("counts", [(30, 25), (30, 500), (500, 30), (2, 3)])
def test_fewer_samples_than_features(counts):
    """tr (S1 S2)^1/2 is the nuclear norm of the product of the centred, scaled data: no root of a singular matrix."""
    dim = 64
    data = [random_features(count, dim, seed) for seed, count in enumerate(counts)]
    scaled = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in data]
    cross = np.linalg.svd(scaled[0] @ scaled[1].T, compute_uv=False).sum()
    expected = np.sum((data[0].mean(0) - data[1].mean(0)) ** 2) + sum(np.sum(x**2) for x in scaled) - 2 * cross
    # Without the rank that the counts imply, the rounding noise of the null space alone is 1e-8 of the distance.
    assert frechet_distance(moments_of(data[0]), moments_of(data[1])) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("counts", [(30, 25), (30, 500), (2, 3), (64, 200)])
def test_few_features_are_a_factor_of_their_covariance(counts, monkeypatch):
    data = [random_features(count, 64, seed) for seed, count in enumerate(counts)]
    expected = frechet_distance(*map(moments_of, data))
    moments = [
        Moments.of_features(torch.from_numpy(features)) if len(features) <= 64 else moments_of(features)
        for features in data
    ]
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("eigenvectors"))
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(moments[0], Moments.of_features(torch.from_numpy(data[0]))) == 0.0
    for each, features in zip(moments, data, strict=True):
        np.testing.assert_allclose(each.covariance.numpy(), np.cov(features.astype(np.float64).T), atol=1e-12)
        assert float(each.trace) == pytest.approx(np.trace(np.cov(features.T)), rel=1e-10)


@pytest.mark.parametrize(("count", "message"), [(1, "at least 2 samples, got 1"), (65, "more than make a factor")])
def test_other_numbers_of_features_are_no_factor(count, message):
    with pytest.raises(ValueError, match=message):
        Moments.of_features(torch.zeros(count, 64))


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "64 values of its mean are not finite"), (1e60, "beyond")])
def test_a_factor_without_a_finite_distance_is_refused(value, message):
    features = torch.zeros(9, 64).double()
    features[3] = value
    with pytest.raises(ValueError, match=message):
        frechet_distance(Moments.of_features(features), moments_of(random_features(9, 64, 0)))


def test_the_features_of_a_file_stand_for_its_covariance_and_others_do_not(tmp_path, monkeypatch):
    data, others = (torch.from_numpy(random_features(30, 64, seed)) for seed in range(2))
    path = tmp_path / "moments.npz"
    moments_of(data.numpy()).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigvalsh", lambda *_: pytest.fail("eigenvalues"))
        stored = Moments.load(path, features=data)
    assert stored.factor is not None and stored.count == 30
    torch.testing.assert_close(stored.covariance, Moments.load(path).covariance, rtol=0, atol=1e-12)
    for wrong in (others, data[:29], torch.full_like(data, torch.nan)):
        assert Moments.load(path, features=wrong).factor is None
    broken = moments_of(data.numpy())
    broken.covariance[3, 3] = -1e3
    broken.save(path)
    with pytest.raises(ValueError, match="a covariance has none below 0"):
        Moments.load(path, features=others)


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match="width 3 and 4"):
        frechet_distance(moments_of(random_features(9, 3, 0)), moments_of(random_features(9, 4, 0)))


def test_streaming_is_float64_mean_and_covariance():
    features = random_features(101, 5, 0).astype(np.float32) + 1000  # float32 sums would lose the covariance
    streaming = FeatureMoments(Flatten(5))
    for batch in np.array_split(features, 7):
        streaming.update(torch.from_numpy(batch))
    moments = streaming.compute()
    np.testing.assert_allclose(moments.mean.numpy(), features.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features.astype(np.float64).T), rtol=1e-8)
    assert moments.count == 101 and moments.mean.dtype == moments.covariance.dtype == torch.float64


def test_two_halves_merge_to_the_whole():
    features = torch.from_numpy(random_features(40, 6, 0))
    extractor = Flatten(6)
    halves = [FeatureMoments(extractor) for _ in range(2)]
    whole = FeatureMoments(extractor)
    whole.update(features)
    halves[0].update(features[:13])
    halves[1].update(features[13:])
    halves[0].merge_state(halves[1])
    merged, expected = halves[0].compute(), whole.compute()
    torch.testing.assert_close(merged.mean, expected.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.covariance, expected.covariance, rtol=1e-11, atol=1e-13)
    assert merged.count == 40


def test_one_sample_has_no_covariance():
    streaming = FeatureMoments(Flatten(3))
    streaming.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        streaming.compute()


def test_saved_moments_come_back(tmp_path):
    moments = moments_of(random_features(9, 4, 0))
    moments.save(tmp_path / "moments.npz")
    loaded = Moments.load(tmp_path / "moments.npz")
    assert torch.equal(loaded.mean, moments.mean) and torch.equal(loaded.covariance, moments.covariance)
    assert (loaded.count, loaded.extractor, loaded.weights_sha256) == (9, "Pixels", "0" * 64)


def test_adm_reference_is_readable(tmp_path):
    """ADM's files hold mu and sigma, of sFID too, and images."""
    features = random_features(9, 4, 0)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu=features.mean(0),
        sigma=np.cov(features.T),
        mu_s=np.zeros(2),
        sigma_s=np.eye(2),
    )
    loaded = Moments.load(tmp_path / "adm.npz")
    assert frechet_distance(loaded, moments_of(features)) == pytest.approx(0, abs=1e-8)
    assert (loaded.count, loaded.extractor, loaded.weights_sha256) == (None, None, None)


def test_a_file_without_moments_is_refused(tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"arr_0.*'mu'"):
        Moments.load(tmp_path / "samples.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"\(3,\) and 'sigma' \(2, 2\)"):
        Moments.load(tmp_path / "odd.npz")


def test_a_pickled_and_a_truncated_file_of_moments_are_refused(tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.array([object()], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle"):
        Moments.load(tmp_path / "moments.npz")
    moments_of(random_features(70, 5, 1)).save(tmp_path / "whole.npz")
    data = (tmp_path / "whole.npz").read_bytes()
    for kept in (0, 100, len(data) // 2, len(data) - 10):
        (tmp_path / "cut.npz").write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"cut\.npz"):
            Moments.load(tmp_path / "cut.npz")


def test_result_says_what_it_is():
    extractor = Flatten(8)
    few, many = moments_of(random_features(5, 8, 0)), moments_of(random_features(90, 8, 1))
    result = compare(extractor, few, many, "shards/test")
    assert result.metric == "FD-Pixels"
    assert (result.count, result.reference, result.reference_count) == (5, "shards/test", 90)
    assert (result.extractor, result.weights_sha256, result.protocol) == ("Pixels", "0" * 64, "none")
    assert result.value == frechet_distance(few, many)
    assert len(result.notes) == 1 and result.notes[0].startswith("samples: 5 for 8 features")
    assert compare(extractor, many, many, "itself").notes == ()


def test_reference_of_another_extractor_is_refused():
    samples = moments_of(random_features(9, 4, 0))
    other = Moments(samples.mean, samples.covariance, count=9, extractor="Other", weights_sha256="f" * 64)
    with pytest.raises(ValueError, match=r"made by Other .*this is Pixels"):
        compare(Flatten(4), samples, other, "reference.npz")
    with pytest.raises(ValueError, match=r"has 3 features, Pixels gives 4"):
        compare(Flatten(4), samples, moments_of(random_features(9, 3, 0)), "reference.npz")
    unsaid = Moments(samples.mean, samples.covariance)
    assert "does not say which extractor" in compare(Flatten(4), samples, unsaid, "reference.npz").notes[0]


def saved(path, sigma, mu=None, **more) -> str:
    mu = np.zeros(len(sigma)) if mu is None else mu
    np.savez(path / "moments.npz", mu=mu, sigma=sigma, **more)
    return str(path / "moments.npz")


SYMMETRIC = np.array([[2.0, 0.5], [0.5, 1.0]])


@pytest.mark.parametrize(
    ("sigma", "mu", "message"),
    [
        (np.full((2, 2), np.nan), None, "4 values of its covariance are not finite"),
        (np.diag([1.0, np.inf]), None, "1 values of its covariance are not finite"),
        (SYMMETRIC, np.array([0.0, -np.inf]), "1 values of its mean are not finite"),
        (-SYMMETRIC, None, "has the eigenvalue -2.2.*none below 0"),
        (np.diag([1.0, -1e-3]), None, "has the eigenvalue -0.001"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), None, "has the eigenvalue -1"),
        (np.array([[2.0, 0.5], [0.4, 1.0]]), None, "not symmetric"),
        (np.diag([1.0, 1e308]), None, "its covariance has values beyond"),
        (SYMMETRIC + 0j, None, "'sigma' is of complex128"),
        (SYMMETRIC.astype(str), None, "'sigma' is of <U"),
        (SYMMETRIC.astype("datetime64[s]"), None, "'sigma' is of datetime64"),
        (SYMMETRIC > 1, None, "'sigma' is of bool"),
        (SYMMETRIC, np.zeros(2, complex), "'mu' is of complex128"),
        (np.zeros((0, 0)), None, r"\(0,\) and 'sigma' \(0, 0\)"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused_by_name(tmp_path, sigma, mu, message):
    with pytest.raises(ValueError, match=rf"moments\.npz'.*{message}"):
        Moments.load(saved(tmp_path, sigma, mu))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"count": np.nan}, "its count is float64"),
        ({"count": 1}, "at least 2 images, its count is 1"),
        ({"count": [3, 4]}, r"its count is int64 \(2,\)"),
        ({"count": 2}, "more directions than 2 images"),
        ({"extractor": 3}, "its extractor is int64"),
        ({"weights_sha256": b"a"}, "its weights_sha256 is"),
        ({"apply_exif": 1}, "its apply_exif is int64"),
        ({"image_size": 64}, r"its image_size is int64 \(\), it must be a height and a width"),
    ],
)
def test_what_a_file_says_of_its_moments_is_checked(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        Moments.load(saved(tmp_path, SYMMETRIC, **more))


def test_float32_moments_are_read(tmp_path):
    features = random_features(500, 40, 0)
    covariance = np.cov(features.T).astype(np.float32)
    covariance[0, 1] = np.nextafter(covariance[0, 1], np.float32(np.inf))
    loaded = Moments.load(saved(tmp_path, covariance, features.mean(0).astype(np.float32)))
    assert frechet_distance(loaded, moments_of(features)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("broken", [-torch.eye(3), torch.full((3, 3), torch.nan), torch.diag(torch.tensor([1, 1, -1]))])
@pytest.mark.parametrize("first", [True, False])
def test_broken_moments_are_at_no_distance_not_even_of_themselves(broken, first):
    broken, intact = Moments(torch.zeros(3).double(), broken.double()), moments_of(random_features(9, 3, 0))
    with pytest.raises(ValueError, match=f"the {'first' if first else 'second'} moments: "):
        frechet_distance(*((broken, intact) if first else (intact, broken)))
    with pytest.raises(ValueError, match="the first moments: "):
        frechet_distance(broken, broken)


def test_eigenvalues_are_looked_at_once_and_of_sums_never(tmp_path, monkeypatch):
    stored = saved(tmp_path, SYMMETRIC)
    looked = []
    original = moments._lowest_is_below
    monkeypatch.setattr(moments, "_lowest_is_below", lambda *given: looked.append(given) or original(*given))
    reference, own = Moments.load(stored), FeatureMoments(Flatten(2))
    own.update(torch.from_numpy(random_features(30, 2, 0)))
    for _ in range(2):
        assert frechet_distance(own.compute(), reference) > 0
    assert len(looked) == 1  # when it was read
    reference.covariance[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the second moments: 1 values of its covariance are not finite"):
        frechet_distance(own.compute(), reference)


@pytest.mark.parametrize(("mean", "scale"), [(0, 1e200), (0, 1e308), (1e155, 1)])
def test_moments_whose_distance_is_not_finite_are_refused(mean, scale):
    large = Moments(torch.full((3,), mean, dtype=torch.float64), torch.eye(3).double() * scale)
    with pytest.raises(ValueError, match=r"reference 'large\.npz': its (mean|covariance) has values beyond 1e\+100"):
        compare(Flatten(3), moments_of(random_features(9, 3, 0)), large, "large.npz")


def test_the_largest_moments_have_a_finite_distance():
    first, second = (Moments(torch.full((3,), m, dtype=torch.float64), torch.eye(3).double() * 9e99) for m in (0, 9e99))
    assert 0 < frechet_distance(first, second) < 1e202


def test_the_metric_is_the_distance_of_all_batches() -> None:
    features, reference = random_features(90, 5, 0), moments_of(random_features(70, 5, 1))
    metric = FrechetDistance(Flatten(5), reference)
    for batch in torch.from_numpy(features).split(31):
        metric.update(batch)
    expected = frechet_distance(moments_of(features), reference)
    found = metric.compute()
    assert found.dtype == torch.float64 and float(found) == pytest.approx(expected, rel=1e-12)
    assert metric.metric_name == "FD-Pixels"
    metric.reset()
    metric.update(torch.from_numpy(features))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)


def test_the_metric_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Network(torch.nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).double()

    random = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, 256, (60, 3, 2, 2), dtype=torch.uint8, generator=random) // part for part in (1, 2)]
    theirs = FrechetInceptionDistance(feature=Network()).set_dtype(torch.float64)
    moments = FeatureMoments(Flatten(12))
    for images in sets[0].split(17):
        theirs.update(images, real=True)
        moments.update(images.flatten(1))
    ours = FrechetDistance(Flatten(12), moments.compute())
    for images in sets[1].split(17):
        theirs.update(images, real=False)
        ours.update(images.flatten(1))
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_the_metric_is_that_of_torch_fidelity() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    samples, reference = (torch.from_numpy(random_features(90, 7, seed)) for seed in (0, 1))
    statistics = [fid_features_to_statistics(features) for features in (samples, reference)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    metric = FrechetDistance(Flatten(7), moments_of(reference.numpy()))
    metric.update(samples)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-9)


def test_the_metric_refuses_what_has_no_distance() -> None:
    reference = moments_of(random_features(70, 5, 1))
    reference.weights_sha256, reference.extractor = "b" * 64, "Other"
    with pytest.raises(ValueError, match="'stored' was made by Other"):
        FrechetDistance(Flatten(5), reference, reference_name="stored")
    with pytest.raises(ValueError, match="reference 'reference' has 5 features, Pixels gives 4"):
        FrechetDistance(Flatten(4), reference)
    metric = FrechetDistance(Flatten(5), moments_of(random_features(70, 5, 1)))
    with pytest.raises(ValueError, match=r"are not \(B, 5\), which Pixels gives"):
        metric.update(torch.zeros(3, 4))
    metric.update(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="needs at least 2 samples, got 1"):
        metric.compute()
    metric.update(torch.full((2, 5), torch.nan))
    with pytest.raises(ValueError, match="the samples: 5 values of its mean are not finite"):
        metric.compute()


def test_sums_stay_in_float64_in_a_module_of_half_precision() -> None:
    module = torch.nn.ModuleDict({"fd": FrechetDistance(Flatten(5), moments_of(random_features(70, 5, 1)))})
    module.to(torch.bfloat16)
    module["fd"].update(torch.from_numpy(random_features(90, 5, 0)))
    assert module["fd"].outer.dtype == torch.float64 and not module.state_dict()


def test_the_halves_of_one_set_are_at_the_floor() -> None:
    """It is not 0, as the halves are two samples, and far below a shift of the mean by 0.3, which adds 4 · 0.3²."""
    features = torch.randn(4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    halves = [moments_of(half.numpy()) for half in features.chunk(2)]
    assert 0 < frechet_distance(*halves) < 0.02
    assert frechet_distance(halves[0], moments_of(features[2000:].numpy() + 0.3)) > 0.3


def test_spatial_moments_are_those_with_an_s(tmp_path) -> None:
    """As in the references of ADM: mu, sigma of the pooled features, mu_s, sigma_s of the spatial ones."""
    pooled, spatial = moments_of(random_features(70, 5, 1)), moments_of(random_features(70, 3, 2))
    pooled.save(tmp_path / "both.npz", spatial)
    space = SpatialFlatten(5).space("spatial")
    found = Moments.load(tmp_path / "both.npz", space)
    assert torch.equal(found.mean, spatial.mean) and torch.equal(found.covariance, spatial.covariance)
    assert found.extractor == "Pixels-spatial" and found.count == 70
    assert torch.equal(Moments.load(tmp_path / "both.npz", Flatten(5)).mean, pooled.mean)
    pooled.save(tmp_path / "pooled.npz")
    with pytest.raises(ValueError, match=r"a file of spatial moments holds 'mu_s'"):
        Moments.load(tmp_path / "pooled.npz", space)


class SpatialFlatten(Flatten):
    """Pixels as features, of which the first three are a part of their own."""

    @property
    def dims(self) -> dict[str, int]:
        return {"pool": self.dim, "spatial": 3}

    def extract_parts(self, images: Tensor, parts) -> dict[str, Tensor]:
        features = self.extract(images)
        return {"pool": features, "spatial": features[:, :3]}


def test_the_ratio_is_the_mean_over_extractors() -> None:
    extractors = {"small": Flatten(3), "large.timm": Flatten(5)}
    features = {name: torch.from_numpy(random_features(40, each.dim, 0)) for name, each in extractors.items()}
    references = {name: moments_of(random_features(50, each.dim, 1)) for name, each in extractors.items()}
    denominators = {"large.timm": 4.0, "small": 0.5}
    distances = {name: FrechetDistance(each, references[name]) for name, each in extractors.items()}
    ratio = FrechetRatio(distances, denominators)
    for index in torch.arange(40).split(13):
        ratio.update({name: rows[index] for name, rows in features.items()})
    expected = {
        name: frechet_distance(moments_of(rows.numpy()), references[name]) / denominators[name]
        for name, rows in features.items()
    }
    found = {name: float(value) for name, value in ratio.compute().items()}
    assert found["frechet_ratio"] == pytest.approx(sum(expected.values()) / 2, rel=1e-9)
    assert found["frechet_ratio/large.timm"] == pytest.approx(expected["large.timm"], rel=1e-9)
    ratio.reset()
    with pytest.raises(ValueError, match="needs at least 2 samples, got 0"):
        ratio.members[0].moments()


def test_a_ratio_of_other_names_or_by_nothing_is_refused() -> None:
    distance = FrechetDistance(Flatten(3), moments_of(random_features(50, 3, 1)))
    with pytest.raises(ValueError, match=r"distances \['a'\] and denominators \['b'\]"):
        FrechetRatio({"a": distance}, {"b": 1.0})
    for value in (0.0, float("nan")):
        with pytest.raises(ValueError, match="denominators must be above 0"):
            FrechetRatio({"a": distance}, {"a": value})
    with pytest.raises(ValueError, match=r"features of \['b'\], the distances are of \['a'\]"):
        FrechetRatio({"a": distance}, {"a": 1.0}).update({"b": torch.zeros(2, 3)})


def test_the_denominators_of_fdr6_name_networks_of_timm() -> None:
    from timm.models import is_model_pretrained

    names = [name.rpartition("@")[0] for name in FDR6_DENOMINATORS if name != "InceptionV3"]
    assert len(names) == 5 and all(map(is_model_pretrained, names))
