import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from yopo.spectrum import Spectrum, ks_distance


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


def svd(weight):
    return torch.linalg.svdvals(weight.double()).sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_are_those_of_an_svd_in_float64(name, dtype):
    weight = MATRICES[name].to(dtype)
    if not torch.isfinite(weight).all():
        pytest.skip("the matrix does not fit into this dtype")
    spectrum = Spectrum.of(weight)
    # A root of an eigenvalue that is off by the rounding of a product, relative to the largest.
    off = (1e-7 if dtype == torch.float64 else 1e-3) * svd(weight)[-1].item()
    assert spectrum.singular_values_S.dtype == torch.float64
    torch.testing.assert_close(spectrum.singular_values_S, svd(weight), rtol=1e-5, atol=off)
    for share in (0.0, 0.1, 0.4, 0.7, 0.95, 1.0):
        kept = kept_rows(len(weight), max(int(share * len(weight)), 1))
        values = spectrum.of_rows(kept)
        assert values.dtype == torch.float64
        for rows, one in zip(kept, values, strict=True):
            torch.testing.assert_close(one, svd(weight[rows]), rtol=1e-5, atol=off)


@pytest.mark.parametrize("name", MATRICES)
def test_the_distance_between_spectra_is_that_of_an_svd_in_float64(name):
    weight = MATRICES[name].float()
    spectrum = Spectrum.of(weight)
    for share in (0.3, 0.7, 0.95, 1.0):
        kept = kept_rows(len(weight), max(int(share * len(weight)), 1))
        distances = ks_distance(spectrum.singular_values_S, spectrum.of_rows(kept))
        for rows, distance in zip(kept, distances, strict=True):
            # What is zero but for rounding must not count; one value may lie on the verge.
            zero = 7e-4 * svd(weight)[-1]
            dense, part = (values * (values > zero) for values in (svd(weight), svd(weight[rows])))
            expected = ks_2samp(dense, part).statistic
            assert float(distance) == pytest.approx(expected, abs=1.01 / len(part)), share


def test_a_matrix_is_measured_where_and_as_it_is():
    weight = torch.randn(6, 4, generator=generator(0)).bfloat16()
    spectrum = Spectrum.of(weight)
    assert spectrum.weight_FD is weight
    assert torch.equal(spectrum.of_rows(torch.arange(6)[None])[0], spectrum.singular_values_S)


SAMPLES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@given(SAMPLES, st.lists(SAMPLES, min_size=1, max_size=4))
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


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_a_sample_has_distance_zero_from_itself_and_from_its_double(values):
    sample = torch.tensor(sorted(values), dtype=torch.float64)
    double = sample.repeat_interleave(2)
    assert ks_distance(sample, sample[None]).tolist() == [0.0]
    assert ks_distance(sample, double[None]).tolist() == [0.0]


def test_samples_that_do_not_overlap_have_distance_one():
    low, high = torch.arange(3.0), torch.arange(10.0, 15.0)
    assert ks_distance(low, high[None]).tolist() == [1.0]
    assert ks_distance(high, low[None]).tolist() == [1.0]
