import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from yopo.parallel import in_pairs
from yopo.spectrum import (
    _SURE,
    Spectrum,
    _pair_bytes,
    ks_distance,
    spectra_of,
    spectral_distances,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def with_spectrum(rows, columns, values):
    left, _, right = torch.linalg.svd(gaussian(rows, columns), full_matrices=False)
    return left * torch.as_tensor(values, dtype=torch.float64) @ right


def log_normal_rows(rows, columns):
    scale = torch.randn(rows, generator=generator(3), dtype=torch.float64).exp()
    return gaussian(rows, columns, 4) * scale[:, None]


MATRICES = {
    "tall": gaussian(96, 40),
    "wide": gaussian(40, 96),
    "square": gaussian(64, 64),
    "one column": gaussian(50, 1),
    "one row": gaussian(1, 50),
    "rank 10 of 40": gaussian(96, 10) @ gaussian(10, 40),
    "rank 10 of 40, wide": gaussian(40, 10) @ gaussian(10, 96),
    "rank 1": torch.ones(96, 40, dtype=torch.float64),
    "zeros": torch.zeros(96, 40, dtype=torch.float64),
    "half of the columns zero": gaussian(96, 40) * (torch.arange(40) < 20),
    "ill-conditioned": with_spectrum(96, 40, torch.logspace(0, -8, 40)),
    "one outlier": with_spectrum(96, 40, [1e3, *torch.linspace(1, 2, 39)]),
    "log-normal rows": log_normal_rows(200, 40),
    "tiny": gaussian(96, 40) * 1e-15,
    "huge": gaussian(96, 40) * 1e15,
}


def kept_rows(rows, keep, draws=3):
    return (
        torch.stack(
            [torch.randperm(rows, generator=generator(seed))[:keep] for seed in range(draws)]
        )
        .sort(dim=1)
        .values
    )


def given(weight):
    return lambda: nullcontext(weight)


def svd(weight):
    """Singular values in float64, with 0 for what float32 could not tell from it."""
    return torch.linalg.svdvals(weight.double()).sort().values


def without_noise(values, largest):
    return torch.where(values > 1e-6 * largest, values, 0.0)


def expected_distance(weight, rows):
    dense, part = svd(weight), svd(weight[rows])
    cleaned = (without_noise(values, dense[-1]).numpy() for values in (dense, part))
    return ks_2samp(*cleaned).statistic


@pytest.mark.parametrize("room", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MATRICES)
def test_the_distance_between_spectra_is_that_of_an_svd_in_float64(name, dtype, room):
    weight = MATRICES[name].to(dtype)
    if not torch.isfinite(weight).all():
        pytest.skip("the matrix does not fit into this dtype")
    spectra = spectra_of([given(weight)], room=room)
    for share in (0.0, 0.1, 0.4, 0.7, 0.95, 1.0):
        kept = kept_rows(len(weight), max(int(share * len(weight)), 1))
        found = spectral_distances(spectra, [kept])
        assert found.dtype == torch.float64
        assert found.shape == (1, 3)
        for rows, distance in zip(kept, found[0], strict=True):
            # A value on the verge of the least that counts may fall on either side of it.
            is_on_verge = name.startswith(("rank", "ill"))
            verge = 1.01 / min(len(rows), weight.shape[1]) if is_on_verge else 1e-12
            assert float(distance) == pytest.approx(expected_distance(weight, rows), abs=verge)


def test_matrices_of_all_shapes_are_measured_together_and_alike():
    weights = [matrix.float() for matrix in MATRICES.values() if len(matrix) >= 40]
    kept = [kept_rows(len(weight), 24) for weight in weights]
    together = spectral_distances(spectra_of(list(map(given, weights))), kept)
    for weight, rows, found in zip(weights, kept, together, strict=True):
        assert torch.equal(spectral_distances(spectra_of([given(weight)]), [rows])[0], found)


@pytest.mark.parametrize("shape", [(3072, 768), (900, 300), (300, 900)])
@pytest.mark.parametrize("kind", ["flat", "log-normal rows", "decaying"])
def test_eigenvalues_of_float32_lie_within_the_bounds_that_decide(shape, kind):
    weight = gaussian(*shape).float()
    if kind == "log-normal rows":
        weight *= gaussian(shape[0], 1, 1).exp()
    elif kind == "decaying":
        weight *= torch.logspace(0, -3, shape[1])
    (spectrum,) = spectra_of([given(weight)])
    exact = svd(weight).square()
    floor, slope = _SURE
    bound = floor * exact[-1] + slope * (len(exact) * exact * exact[-1]).sqrt()
    off = (spectrum.eigenvalues_S.double() - exact).abs() / torch.finfo(torch.float32).eps
    assert bool((off < bound).all())


def test_float64_decides_where_float32_cannot_tell_and_only_there(monkeypatch):
    asked = []

    def spied(spectrum, kept, turn):
        asked.append(spectrum)
        return 0.0

    monkeypatch.setattr(Spectrum, "exact_distance", spied)
    flat, tiny = gaussian(200, 40).float(), MATRICES["ill-conditioned"].float()
    spectral_distances(spectra_of([given(flat)]), [kept_rows(200, 140, draws=20)])
    assert len(asked) <= 1
    spectral_distances(spectra_of([given(tiny)]), [kept_rows(96, 67, draws=5)])
    assert len(asked) >= 5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_distances_do_not_depend_on_the_number_of_threads(threads):
    weights = [gaussian(700, 300, seed).float() for seed in range(3)]
    kept = [kept_rows(700, 490)] * 3
    expected = spectral_distances(spectra_of(list(map(given, weights))), kept)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        spectra = spectra_of(list(map(given, weights)))
        assert torch.equal(spectral_distances(spectra, kept), expected)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


class Gauge:
    """Count how many threads are inside at once."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def count(self, step):
        with self.lock:
            self.now += step
            self.most = max(self.most, self.now)

    @contextmanager
    def around(self, value=None):
        self.count(1)
        time.sleep(0.01)  # long enough that others come, if they may
        yield value
        self.count(-1)


@pytest.mark.parametrize(("pairs", "working", "solving"), [(0, 1, 1), (1, 2, 1), (2, 4, 2)])
def test_in_little_room_few_threads_work_half_of_which_find_eigenvalues(
    pairs, working, solving, monkeypatch
):
    weights = [gaussian(300, 100, seed).float() for seed in range(8)]
    kept = [kept_rows(300, 210, draws=1)] * 8
    expected = spectral_distances(spectra_of(list(map(given, weights))), kept)
    inside, eigenvalues = Gauge(), Gauge()

    def counted(grams, found=torch.linalg.eigvalsh):
        with eigenvalues.around():
            return found(grams)

    monkeypatch.setattr(torch.linalg, "eigvalsh", counted)
    pair = _pair_bytes(300, 100, torch.float32)
    room = pairs * pair
    assert in_pairs(room, [pair // 2, pair])[0] == working
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        spectra = spectra_of([partial(inside.around, weight) for weight in weights], room=room)
        assert torch.equal(spectral_distances(spectra, kept), expected)
    finally:
        torch.set_num_threads(before)
    assert inside.most <= working
    assert eigenvalues.most <= solving


@pytest.mark.parametrize("shape", [(900, 300), (300, 900)])
def test_grams_that_are_not_held_give_the_same_bits(shape):
    weight = gaussian(*shape).float()
    held, made = (spectra_of([given(weight)], room=room)[0] for room in (None, 0))
    for share in (0.2, 0.7):
        rows = kept_rows(len(weight), int(share * len(weight)))
        lower = [spectrum.grams_of_rows(rows).tril() for spectrum in (held, made)]
        assert torch.equal(*lower)


def test_a_matrix_is_neither_held_nor_copied_in_between():
    opened = []

    @contextmanager
    def open_once():
        opened.append("in")
        yield gaussian(30, 10).float()
        opened.append("out")

    spectra = spectra_of([open_once], room=0)
    spectral_distances(spectra, [kept_rows(30, 20, draws=2)])
    assert opened
    assert opened == ["in", "out"] * (len(opened) // 2)
    assert spectra[0].gram is None


SAMPLES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@for_all(SAMPLES, st.lists(SAMPLES, min_size=1, max_size=4))
def test_the_distance_is_that_of_scipy_with_ties_and_any_sizes(first, others):
    size = min(map(len, others))
    others = [other[:size] for other in others]
    distances = ks_distance(
        torch.tensor(sorted(first), dtype=torch.float64),
        torch.tensor([sorted(other) for other in others], dtype=torch.float64),
    )
    assert distances.dtype == torch.float64
    expected = [ks_2samp(first, other).statistic for other in others]
    assert distances.tolist() == pytest.approx(expected, abs=1e-12)


@for_all(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_a_sample_has_distance_zero_from_itself_and_from_its_double(values):
    sample = torch.tensor(sorted(values), dtype=torch.float64)
    double = sample.repeat_interleave(2)
    assert ks_distance(sample, sample[None]).tolist() == [0.0]
    assert ks_distance(sample, double[None]).tolist() == [0.0]


def test_samples_that_do_not_overlap_have_distance_one():
    low, high = torch.arange(3.0), torch.arange(10.0, 15.0)
    assert ks_distance(low, high[None]).tolist() == [1.0]
    assert ks_distance(high, low[None]).tolist() == [1.0]
