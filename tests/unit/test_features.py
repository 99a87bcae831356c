import pytest
import torch
from torch import nn

from yopo.adapters import Ffn, Slot, find_ffns
from yopo.features import FEATURES, row_features


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gated_ffn(gate, up=None, contract=None, norm=None, bias=None):
    """Make an FFN of given matrices `(F, D)`."""
    modules = {}
    for name, weight in (("gate", gate), ("up", up), ("contract", contract)):
        if weight is not None:
            modules[name] = nn.Linear(1, 1, bias=False)
            modules[name].weight = nn.Parameter(weight)
    if bias is not None:
        modules["gate"].bias = nn.Parameter(bias)
    return Ffn(
        name="mlp",
        path="mlp",
        rows=len(gate),
        expand=tuple(
            Slot(modules[name], "weight", 0) for name in ("gate", "up") if name in modules
        ),
        contract=Slot(modules["contract"], "weight", 0),
        vectors=(Slot(modules["gate"], "bias", 0),) if bias is not None else (),
        norm=norm,
    )


def random_ffn(rows=40, columns=12, seed=0, **parts):
    generator = seeded(seed)
    scale = torch.randn(rows, 1, generator=generator).exp()
    matrices = {
        name: torch.randn(rows, columns, generator=generator, dtype=torch.float64) * scale
        for name in ("gate", "up", "contract")
    }
    return gated_ffn(**matrices | parts)


def standardised(column):
    return (column - column.mean()) / column.std(correction=0)


def test_features_are_what_their_names_say():
    gain = torch.linspace(0.5, 2.0, 12)
    norm = nn.RMSNorm(12, eps=1e-12)
    norm.weight = nn.Parameter(gain)
    bias = torch.randn(40, generator=seeded(9))
    ffn = random_ffn(norm=norm, bias=bias)
    gate, up = (w.double() for w in ffn.expand_weights())
    contract = ffn.contract_weight().double()
    folded = gate * gain
    norms = [m.norm(dim=1).log() for m in (folded, up * gain, contract)]
    expected = {
        "log_norm_gate": norms[0],
        "log_norm_up": norms[1],
        "log_norm_contract": norms[2],
        "log_norm_product": sum(norms),
        "log_norm_gate_without_gain": gate.norm(dim=1).log(),
        # Leverage is the diagonal of the hat matrix, and the squared rows of its left vectors.
        "log_leverage_gate": torch.linalg.svd(folded, full_matrices=False)[0].norm(dim=1).log() * 2,
        "log_leverage_contract": (contract @ torch.linalg.pinv(contract)).diagonal().log(),
        "log_spectral_weight": torch.stack(
            [(gate @ w).square().sum() / w.square().sum() for w in gate]
        ).log(),
        "bias": bias.double(),
        "elimination": torch.arange(40.0, dtype=torch.float64),
    }
    dropped_first_to_last = torch.arange(40)
    features = row_features(ffn, dropped_first_to_last)
    assert features.dtype == torch.float32
    assert tuple(expected) == FEATURES
    for column, (name, value) in enumerate(expected.items()):
        torch.testing.assert_close(
            features[:, column].double(), standardised(value), rtol=1e-3, atol=1e-3, msg=name
        )


def test_features_that_an_ffn_does_not_have_are_zero():
    features = row_features(random_ffn(up=None))
    for name in ("log_norm_up", "bias", "elimination"):
        assert features[:, FEATURES.index(name)].abs().max() == 0


def test_a_row_that_is_dropped_late_has_a_high_position():
    order = torch.tensor([2, 0, 3, 1])
    features = row_features(random_ffn(rows=4, columns=2), order)
    assert features[:, FEATURES.index("elimination")].argsort().tolist() == order.tolist()


def test_features_do_not_depend_on_the_scale_of_a_matrix_or_the_order_of_its_columns():
    one = random_ffn()
    order = torch.randperm(12, generator=seeded())
    other = gated_ffn(
        *(w[:, order] * scale for w, scale in zip(one.expand_weights(), (8.0, 0.5), strict=True)),
        one.contract_weight() * 3,
    )
    torch.testing.assert_close(row_features(one), row_features(other), rtol=1e-3, atol=1e-3)


def test_permuting_the_rows_permutes_the_features():
    one = random_ffn()
    order = torch.randperm(40, generator=seeded())
    other = gated_ffn(*(w[order] for w in one.expand_weights()), one.contract_weight()[order])
    torch.testing.assert_close(row_features(one)[order], row_features(other), rtol=1e-3, atol=1e-3)


RANK_1 = torch.rand(512, 1, generator=seeded(1)) @ torch.rand(1, 256, generator=seeded(2))
DEGENERATE = {
    "zero rows": random_ffn().expand_weights()[0] * (torch.arange(40) % 3 > 0)[:, None],
    "all zero": torch.zeros(40, 12),
    "one row": torch.ones(1, 12),
    "one column": torch.linspace(-1, 1, 40)[:, None],
    "all equal": torch.full((512, 256), 0.3),
    "rank 1": RANK_1,
    "rank 1, wide": RANK_1.T,
    "rank 1 and noise": RANK_1 + 1e-6 * torch.randn(512, 256, generator=seeded()),
    "fewer rows than columns": torch.randn(30, 500, generator=seeded()),
    "outlier column": torch.randn(40, 12, generator=seeded()) * torch.tensor([1e4] + [1.0] * 11),
    "outlier row": torch.randn(40, 12, generator=seeded())
    * (1 + 1e4 * (torch.arange(40) == 7))[:, None],
    "tiny": torch.randn(40, 12, generator=seeded()) * 1e-20,
    "huge": torch.randn(40, 12, generator=seeded()) * 1e15,
    "beyond the square root of float32": torch.randn(40, 12, generator=seeded()) * 1e25,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DEGENERATE)
def test_no_matrix_however_degenerate_gives_nan(name, dtype):
    weight = DEGENERATE[name].to(dtype)
    features = row_features(gated_ffn(weight, weight.clone(), weight.clone()))
    assert features.shape == (len(weight), len(FEATURES))
    assert torch.isfinite(features).all()
    assert features.mean(dim=0).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "phi3", "qwen2_moe", "gpt_oss", "t5"])
def test_rows_of_every_layout_have_features_of_mean_zero_and_variance_one(tiny_model, kind):
    for ffn in find_ffns(tiny_model(kind)):
        features = row_features(ffn)
        assert features.shape == (ffn.rows, len(FEATURES))
        torch.testing.assert_close(
            features.mean(dim=0), torch.zeros(len(FEATURES)), rtol=0, atol=1e-4
        )
        variance = features.square().mean(dim=0)
        assert ((variance - 1).abs() < 1e-3).logical_or(variance == 0).all()


def test_features_do_not_follow_the_default_dtype_or_device(tiny_llama):
    ffns = find_ffns(tiny_llama())
    expected = row_features(ffns[0])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(row_features(ffns[0]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_a_norm_nothing_follows_the_default_dtype_or_device_either():
    ffn = random_ffn()
    expected = row_features(ffn)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(row_features(ffn), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_leverage_says_nothing_where_rows_are_fewer_than_columns():
    weight = DEGENERATE["fewer rows than columns"]
    features = row_features(gated_ffn(weight, weight, weight))
    for name in ("log_leverage_gate", "log_leverage_contract"):
        assert features[:, FEATURES.index(name)].abs().max() == 0
