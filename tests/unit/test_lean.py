"""Choosing and restoring from a few inputs, against the same sums done at length in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from yopo import lean
from yopo.adapters import find_ffns
from yopo.errors import UnsupportedModelError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEPT = torch.arange(80)[torch.arange(80) % 8 < 5]
FEW, MANY = 40, 400
"""Fewer inputs than the 50 rows of `KEPT`, and more."""


def inputs_of(tokens):
    """Return inputs that fill three directions out of 32, so that units have much in common."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 32, generator=generator)
    return torch.randn(tokens, 3, generator=generator) @ directions / 2


def case(tiny_model, bias, tokens, dtype=torch.float32):
    """Return a model, its second FFN, inputs, and in float64 its units, columns and bias."""
    model = tiny_model("llama", mlp_bias=bias, dtype=dtype)
    ffn, inputs = find_ffns(model)[1], inputs_of(tokens)
    mlp, wide = model.model.layers[1].mlp, inputs.double()
    gate, up = (
        wide @ part.weight.detach().double().T + (part.bias.detach().double() if bias else 0.0)
        for part in (mlp.gate_proj, mlp.up_proj)
    )
    columns = mlp.down_proj.weight.detach().double().T
    shift = mlp.down_proj.bias.detach().double() if bias else None
    return model, ffn, inputs, silu(gate) * up, columns, shift


def least(units, columns, kept, ridge):
    """Return the least of ‖X_K Δ - X_C W_C‖² + μ‖Δ‖², by least squares."""
    lost = columns.clone()
    lost[kept] = 0.0
    rows = torch.cat([units[:, kept], ridge.sqrt() * torch.eye(len(kept)).double()])
    wanted = torch.cat([units @ lost, torch.zeros(len(kept), columns.shape[1]).double()])
    return (rows @ torch.linalg.lstsq(rows, wanted).solution - wanted).square().sum()


def losses_of(units, columns, alive):
    """Return by how much the least grows with each alive row that goes."""
    ridge = units[:, alive].square().sum() / (4 * len(units))
    now = least(units, columns, alive, ridge)
    without = [torch.cat([alive[:place], alive[place + 1 :]]) for place in range(len(alive))]
    return torch.stack([least(units, columns, kept, ridge) - now for kept in without])


def chosen_at_length(units, columns, keep, rounds):
    alive, rows = torch.arange(units.shape[1]), units.shape[1]
    for step in range(rounds):
        width = rows - (rows - keep) * (step + 1) // rounds
        loss = losses_of(units, columns, alive)
        alive = alive[loss.argsort()[len(alive) - width :].sort().values]
    return alive


def solved_at_length(units, columns, kept, bias):
    """Return the ridge solution on the inputs that are fitted, as a least-squares problem.

    With it comes how far off float32 may be, as a share of the largest entry: by its rounding times
    the condition number of the normal equations.
    """
    fitted = units[torch.arange(len(units)) % 8 != 7]
    mean = fitted.mean(dim=0) if bias is not None else torch.zeros(80).double()
    central = fitted - mean
    dropped = torch.tensor([row for row in range(80) if row not in kept])
    ridge = central[:, kept].square().sum() / (4 * len(fitted))
    rows = torch.cat([central[:, kept], ridge.sqrt() * torch.eye(len(kept)).double()])
    lost = torch.cat([central[:, dropped] @ columns[dropped], torch.zeros(len(kept), 32).double()])
    solved = columns[kept] + torch.linalg.lstsq(rows, lost).solution
    new_bias = None if bias is None else bias + mean @ columns - mean[kept] @ solved
    share = torch.finfo(torch.float32).eps * float(torch.linalg.cond(rows)) ** 2
    return solved, new_bias, share


def as_norm(part, share=2e-5):
    """Return how far apart two tensors may be: a share of the larger one's norm."""
    return {"rtol": 0.0, "atol": share * float(part.abs().max())}


@pytest.mark.parametrize("bias", [False, True])
def test_units_and_outputs_are_those_of_the_ffn(tiny_model, bias):
    model, ffn, inputs, units, columns, shift = case(tiny_model, bias, 100)
    found = lean.read_units(model, ffn, inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.T.double(), units, **as_norm(units))
    expected = units @ columns + (shift if bias else 0.0)
    torch.testing.assert_close(lean.ffn_output(ffn, found).double(), expected, **as_norm(expected))


def test_sets_of_inputs_are_read_each_for_itself(tiny_model):
    model, ffn, inputs, *_ = case(tiny_model, True, 100)
    alone = lean.read_units(model, ffn, inputs[:40])
    both = lean.read_units(model, ffn, inputs[:40], inputs[40:])
    assert both.shape == (80, 100)
    assert torch.equal(both[:, :40], alone)
    assert torch.equal(both[:, 40:], lean.read_units(model, ffn, inputs[40:]))
    assert torch.equal(lean.ffn_output(ffn, both[:, :40]), lean.ffn_output(ffn, alone))


@pytest.mark.parametrize("kind", ["llama", "phi", "phi3", "gpt2"])
def test_outputs_are_those_of_the_models_own_module(tiny_model, kind, monkeypatch):
    monkeypatch.setattr(lean, "_BLOCK", 9)
    model, inputs = tiny_model(kind), inputs_of(30)
    for ffn in find_ffns(model):
        with torch.no_grad():
            expected = model.get_submodule(ffn.path)(inputs[None])[0]
        output = lean.ffn_output(ffn, lean.read_units(model, ffn, inputs))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_share_a_tensor_are_read_each_for_itself(tiny_model, monkeypatch):
    monkeypatch.setattr(lean, "_BLOCK", 7)
    inputs = inputs_of(30)
    gpt_oss, qwen = tiny_model("gpt_oss"), tiny_model("qwen2_moe")
    ffn = next(ffn for ffn in find_ffns(gpt_oss) if ffn.name.endswith("1.mlp.experts.2"))
    experts = gpt_oss.model.layers[1].mlp.experts
    both = (inputs @ experts.gate_up_proj[2] + experts.gate_up_proj_bias[2]).detach()
    gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    units = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    output = (units @ experts.down_proj[2] + experts.down_proj_bias[2]).detach()
    found = lean.read_units(gpt_oss, ffn, inputs)
    torch.testing.assert_close(found.T, units, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lean.ffn_output(ffn, found), output, rtol=1e-4, atol=1e-5)
    ffn = next(ffn for ffn in find_ffns(qwen) if ffn.name.endswith("1.mlp.experts.3"))
    gate, up = qwen.model.layers[1].mlp.experts.gate_up_proj[3].detach().chunk(2)
    units = silu(inputs @ gate.T) * (inputs @ up.T)
    torch.testing.assert_close(lean.read_units(qwen, ffn, inputs).T, units, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("rounds", [1, 3])
def test_rows_are_chosen_as_at_length(tiny_model, bias, tokens, rounds):
    model, ffn, inputs, units, columns, _ = case(tiny_model, bias, tokens)
    if bias:
        units = units - units.mean(dim=0)
    kept = lean.choose_rows(ffn, lean.read_units(model, ffn, inputs), keep=50, rounds=rounds)
    assert torch.equal(kept, chosen_at_length(units, columns, 50, rounds))
    assert kept.dtype == torch.int64


def test_looking_again_finds_what_to_keep_of_rows_that_repeat_each_other(tiny_model):
    model = tiny_model("llama")
    mlp, ffn = model.model.layers[1].mlp, find_ffns(model)[1]
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[40:] = part.weight[:40]
    inputs = torch.randn(MANY, 32, generator=torch.Generator().manual_seed(0))
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=40, rounds=40)
    assert sorted(int(row) % 40 for row in kept) == list(range(40))
    restored = lean.restore_units(ffn, units, kept_K=kept)
    assert restored.error < 0.02 * restored.error_before


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_restoring_is_the_ridge_solution(tiny_model, bias, tokens):
    model, ffn, inputs, units, columns, shift = case(tiny_model, bias, tokens)
    solved, new_bias, share = solved_at_length(units, columns, KEPT, shift)
    restored = lean.restore_units(ffn, lean.read_units(model, ffn, inputs), kept_K=KEPT)
    torch.testing.assert_close(restored.contract_KD.double(), solved, **as_norm(solved, share))
    if bias:
        torch.testing.assert_close(restored.bias_D.double(), new_bias, **as_norm(new_bias, share))
    else:
        assert restored.bias_D is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_errors_are_those_of_the_rounded_weights_on_inputs_that_were_not_fitted(
    tiny_model, dtype, bias, tokens
):
    model, ffn, inputs, units, columns, shift = case(tiny_model, bias, tokens, dtype)
    restored = lean.restore_units(ffn, lean.read_units(model, ffn, inputs), kept_K=KEPT)
    assert restored.contract_KD.dtype == dtype
    units = units[7::8]
    target, moved = units @ columns, 0.0
    if bias:
        assert restored.bias_D.dtype == dtype
        moved = restored.bias_D.double() - shift
    total = float(target.square().sum())
    plain = (units[:, KEPT] @ columns[KEPT] - target).square().sum()
    solved = (units[:, KEPT] @ restored.contract_KD.double() + moved - target).square().sum()
    assert restored.error_before == pytest.approx(float(plain) / total, rel=1e-3)
    assert restored.error == pytest.approx(float(solved) / total, rel=1e-3)
    assert restored.error < restored.error_before


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_the_size_of_a_block_changes_nothing_but_rounding(tiny_model, tokens, monkeypatch):
    model, ffn, inputs, *_ = case(tiny_model, True, tokens)

    def all_of_it():
        units = lean.read_units(model, ffn, inputs)
        kept = lean.choose_rows(ffn, units, keep=50)
        restored = lean.restore_units(ffn, units, kept_K=kept)
        output = lean.ffn_output(ffn, units)
        return [units, kept, restored.contract_KD, restored.bias_D, output]

    whole, again = all_of_it(), all_of_it()
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    for size in (1, 11, 79):
        monkeypatch.setattr(lean, "_BLOCK", size)
        for found, expected in zip(all_of_it(), whole, strict=True):
            if expected.is_floating_point():
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(found, expected)


def test_reading_leaves_the_units_and_the_weights_as_they_are(tiny_model):
    model, ffn, inputs, *_ = case(tiny_model, True, FEW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = lean.read_units(model, ffn, inputs)
    kept_units = units.clone()
    lean.restore_units(ffn, units, kept_K=lean.choose_rows(ffn, units, keep=50))
    assert torch.equal(units, kept_units)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tokens", [1, 3, 9, MANY])
@pytest.mark.parametrize("keep", [1, 79, 80])
@pytest.mark.parametrize("bias", [False, True])
def test_few_inputs_and_few_rows_never_make_the_output_worse(tiny_model, tokens, keep, bias):
    model, ffn, inputs, *_ = case(tiny_model, bias, tokens)
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=keep)
    assert len(kept) == keep
    restored = lean.restore_units(ffn, units, kept_K=kept)
    assert restored.error <= restored.error_before
    assert torch.isfinite(restored.contract_KD).all()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_rows_that_are_always_silent_go_first(tiny_model, tokens):
    model, ffn, inputs, *_ = case(tiny_model, False, tokens)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[20:50] = 0.0
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=50)
    assert kept.tolist() == [*range(20), *range(50, 80)]
    restored = lean.restore_units(ffn, units, kept_K=kept)
    assert torch.equal(restored.contract_KD, ffn.contract_weight()[kept])
    assert restored.error == restored.error_before == 0.0


def test_an_ffn_that_is_silent_altogether_stays_as_it_is(tiny_model, caplog):
    model, ffn, inputs, *_ = case(tiny_model, False, FEW)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=50)
    restored = lean.restore_units(ffn, units, kept_K=kept)
    assert torch.equal(restored.contract_KD, ffn.contract_weight()[kept])
    assert not caplog.text


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_a_bias_takes_over_from_units_that_never_change(tiny_model, tokens):
    model, ffn, inputs, *_ = case(tiny_model, True, tokens)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[:30] = 0.0
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=50)
    assert kept.tolist() == list(range(30, 80))
    restored = lean.restore_units(ffn, units, kept_K=kept)
    assert restored.error < 1e-9 < restored.error_before


def test_solutions_beyond_the_range_of_the_dtype_are_not_taken_and_the_ffn_is_named(
    tiny_model, caplog
):
    model, ffn, inputs, *_ = case(tiny_model, False, MANY, torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(ffn.contract_weight().T.sign() * 6.5e4)
    restored = lean.restore_units(ffn, lean.read_units(model, ffn, inputs), kept_K=KEPT)
    assert torch.equal(restored.contract_KD, ffn.contract_weight()[KEPT])
    assert restored.error == restored.error_before > 0
    assert f"`{ffn.name}`" in caplog.text
    assert "left as they are" in caplog.text


def test_units_of_any_scale_are_chosen_alike(tiny_model):
    model, ffn, inputs, *_ = case(tiny_model, False, FEW)
    units = lean.read_units(model, ffn, inputs)
    kept = lean.choose_rows(ffn, units, keep=50)
    for scale in (2.0**-40, 2.0**40):
        assert torch.equal(lean.choose_rows(ffn, units * scale, keep=50), kept)


def test_an_unknown_activation_is_named(tiny_model):
    model = tiny_model("llama")
    ffn = find_ffns(model)[1]
    del model.model.layers[1].mlp.act_fn
    with pytest.raises(UnsupportedModelError, match=r"activation of `model.layers.1.mlp`"):
        lean.read_units(model, ffn, inputs_of(10))


MEMORY = """
import torch, transformers
from cost import cost_of
from yopo import lean
from yopo.adapters import find_ffns

torch.set_num_threads(1)
config = transformers.LlamaConfig(
    hidden_size=1536, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=12,
    vocab_size=64,
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
ffn, inputs = find_ffns(model)[0], torch.randn(1536, 1536)

def both():
    units = lean.read_units(model, ffn, inputs)
    lean.restore_units(ffn, units, kept_K=lean.choose_rows(ffn, units, keep=2816))

print(cost_of(both)["mebibytes"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the pages of a process")
def test_the_work_takes_no_more_memory_than_three_times_the_ffn_in_half_precision():
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        env={
            "PYTHONPATH": str(BENCHMARKS),
            "PATH": "",
            "MALLOC_MMAP_THRESHOLD_": str(2**20),  # what is freed goes back at once
        },
    )
    assert float(told.stdout) < 3 * (3 * 2 * 4096 * 1536 / 2**20)
