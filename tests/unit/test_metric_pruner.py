"""`MetricPruner`: zeros where a metric is lowest, layer by layer or at once, or FFN rows."""

import math
import threading

import pytest
import torch

import yopo
from yopo import InvalidArgumentError, MetricPruner, UnsupportedModelError
from yopo.symbolic import Expression, Statistics, collect_statistics, sparsity_of
from yopo.symbolic.matrices import find_blocks
from yopo.symbolic.undo import put_back_on_error
from yopo.writing import write_tokens

IDS = torch.arange(320).view(20, 16) * 7 % 60 + 3
METRICS = ["pruner-zero", "wanda", "gblm", "magnitude", "sparsegpt"]


def matrices_of(model):
    return {m.name: m for block in find_blocks(model) for m in block.matrices}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "opt", "phi", "gpt2", "t5", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_linear_map_gets_exactly_as_many_zeros_as_asked_for(tiny_model, kind, metric):
    model = tiny_model(kind)
    before, matrices = state_of(model), matrices_of(model)
    MetricPruner(metric, data=IDS).prune(model, 0.3)
    for name, matrix in matrices.items():
        out, into = matrix.weight.shape
        zeros = (matrix.weight == 0).sum(dim=1)
        if metric in ("magnitude", "sparsegpt"):  # whose weights compete beyond their row
            assert int(zeros.sum()) == math.floor(0.3 * out * into + 1e-9), name
        else:
            assert zeros.eq(math.floor(0.3 * into + 1e-9)).all(), name
    inside = {matrix.key for matrix in matrices.values()}
    for name, tensor in model.state_dict().items():
        if name not in inside:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("metric", METRICS)
def test_groups_get_the_zeros_of_their_pattern(tiny_llama, metric):
    model = MetricPruner(metric, data=IDS).prune(tiny_llama(), pattern="2:4")
    for matrix in matrices_of(model).values():
        assert (matrix.weight.reshape(-1, 4) == 0).sum(dim=1).eq(2).all()
    assert set(sparsity_of(model).values()) == {0.5}


def input_norms(model, block):
    """Return √X of the linear maps of a layer on the text, by hooks."""
    norms = {}
    hooks = [
        model.get_submodule(m.key.removesuffix(".weight")).register_forward_hook(
            lambda _, inputs, __, name=m.name: norms.update(
                {name: inputs[0].flatten(0, 1).norm(dim=0)}
            )
        )
        for m in block.matrices
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    return norms


@pytest.mark.parametrize("sequential", [True, False])
def test_wanda_looks_at_inputs_behind_pruned_layers_or_dense_ones(tiny_llama, sequential):
    expected, dense = tiny_llama(), tiny_llama()
    for number, block in enumerate(find_blocks(expected)):
        seen = expected if sequential else dense
        norms = input_norms(seen, find_blocks(seen)[number])
        for matrix in block.matrices:
            scores = matrix.weight.abs() * norms[matrix.name]
            lowest = scores.argsort(dim=1)[:, : matrix.weight.shape[1] // 2]
            matrix.weight.scatter_(1, lowest, 0.0)
    found = MetricPruner("wanda", data=IDS, sequential=sequential).prune(tiny_llama(), 0.5)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_gradients_are_those_of_the_dense_model(tiny_llama):
    model = tiny_llama()
    statistics = collect_statistics(model, terminals=["G"], data=IDS)
    expected = {}
    for name, matrix in matrices_of(model).items():
        weight, gradient = matrix.weight, statistics.gradients[matrix.key]
        order = (weight.square() * (gradient - gradient.min())).argsort(dim=1)
        expected[name] = weight.scatter(1, order[:, : weight.shape[1] // 2], 0.0)
    MetricPruner(data=IDS).prune(model, 0.5)
    for name, matrix in matrices_of(model).items():
        assert torch.equal(matrix.weight, expected[name]), name


def test_statistics_that_are_there_are_not_collected_again(tiny_llama, monkeypatch):
    model = tiny_llama()
    statistics = collect_statistics(model, data=IDS)
    expected = MetricPruner("gblm", data=IDS, sequential=False).prune(tiny_llama(), 0.5)
    for name in ("read_statistics", "inputs_of"):
        monkeypatch.delattr(f"yopo.symbolic.metric_pruner.{name}")
    found = MetricPruner("gblm", statistics=statistics).prune(model, 0.5)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_only_what_is_missing_is_collected(tiny_llama):
    model = tiny_llama()
    gradients = collect_statistics(model, terminals=["G"], data=IDS)
    expected = MetricPruner("gblm", data=IDS).prune(tiny_llama(), 0.5)
    found = MetricPruner("gblm", data=IDS, statistics=gradients).prune(model, 0.5)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_no_data_is_needed_where_the_model_writes_it(tiny_llama):
    first, again, other = (
        MetricPruner("wanda", sequences=8, length=12, seed=seed).prune(tiny_llama(), 0.5)
        for seed in (0, 0, 1)
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_text_is_written_once_for_gradients_and_inputs(tiny_llama, monkeypatch):
    written = []

    def counting(*args, **kwargs):
        written.append(write_tokens(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr("yopo.symbolic.inputs.write_tokens", counting)
    model = MetricPruner("gblm", sequences=8, length=12).prune(tiny_llama(), 0.5)
    assert len(written) == 1
    ids = written[0]["input_ids"]
    expected = MetricPruner("gblm", data=ids).prune(tiny_llama(), 0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_the_dtype_stays(tiny_llama):
    for metric in METRICS:
        model = MetricPruner(metric, data=IDS).prune(tiny_llama(dtype=torch.bfloat16), 0.5)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_compat_arithmetic_can_be_asked_for(tiny_llama):
    model = tiny_llama()
    before = state_of(model)
    overflow = "exp(exp(exp(add(W, exp(exp(W))))))"
    with pytest.raises(InvalidArgumentError, match="is NaN or infinite"):
        MetricPruner(overflow, primitives="compat").prune(model, 0.5)
    assert_unchanged(model, before)


@pytest.mark.parametrize("metric", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_cannot_be_finished_is_undone(tiny_llama, monkeypatch, metric, error):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, :3] = 0.0
    before = state_of(model)
    calls = []

    def failing(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == 10:
                assert not torch.equal(
                    model.model.layers[0].mlp.down_proj.weight,
                    before["model.layers.0.mlp.down_proj.weight"],
                )
                raise error
            return real(*args, **kwargs)

        return call

    name = "dropped" if metric == "wanda" else "sparsegpt"
    place = f"yopo.symbolic.metric_pruner.{name}"
    monkeypatch.setattr(place, failing(getattr(yopo.symbolic.metric_pruner, name)))
    with pytest.raises(error):
        MetricPruner(metric, data=IDS).prune(model, 0.5)
    assert_unchanged(model, before)
    assert not any(thread.name == "yopo-pass" for thread in threading.enumerate())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_weight_that_was_changed_twice_is_as_before_the_first():
    weight = torch.tensor([1.0, 2.0, 0.0, 4.0])

    def spoil(news):
        with put_back_on_error() as change:
            for new in news:
                change(weight, torch.tensor(new))
            raise KeyboardInterrupt

    for second in ([0.0, 0.0, 0.0, 4.0], [3.0, 0.0, 5.0, 6.0]):
        with pytest.raises(KeyboardInterrupt):
            spoil([[0.0, 2.0, 0.0, 4.0], second])
        assert weight.tolist() == [1.0, 2.0, 0.0, 4.0]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "qwen2_moe", "gpt_oss", "phi3"])
def test_rows_are_removed_by_the_sum_of_their_scores(tiny_model, kind):
    model = tiny_model(kind)
    statistics = collect_statistics(model, data=IDS)
    pruner = MetricPruner("mul(W, G)", statistics=statistics)
    plan = pruner.plan(model, 0.25, multiple_of=1)
    for ffn in yopo.find_ffns(model):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        total = torch.zeros(ffn.rows, dtype=torch.float64)
        for slot in (*ffn.expand, ffn.contract):
            gradient = statistics.gradients[names[id(slot.parameter)]]
            whole = slot.parameter.detach().abs() * gradient
            part = whole if slot.expert is None else whole[slot.expert]
            own = part.movedim(slot.axis, 0)[slot.start :: slot.step][: ffn.rows]
            total += own.double().sum(dim=1)
        kept = plan.kept[ffn.name]
        assert 0.6 < len(kept) / ffn.rows < 0.8
        assert kept.tolist() == sorted(total.argsort(descending=True)[: len(kept)].tolist())


def test_a_structured_model_is_smaller_and_the_others_are_not(tiny_llama):
    for metric in ("wanda", "mul(mul(gate_norm, up_norm), down_norm)"):
        model = MetricPruner(metric, data=IDS).prune(tiny_llama(), 0.25, structured=True)
        assert [ffn.rows for ffn in yopo.find_ffns(model)] == [60, 60]
        assert model.config.intermediate_size == 60
    sparse = MetricPruner("wanda", data=IDS).prune(tiny_llama(), 0.25)
    assert sparse.config.intermediate_size == 80


@pytest.mark.parametrize(
    ("settings", "call", "told"),
    [
        ({"metric": "wunda"}, {}, "`metric` must be"),
        ({"primitives": "exact"}, {}, '`primitives` must be "safe" or "compat"'),
        ({}, {"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\)"),
        ({}, {"pattern": "2:5"}, "has 32 inputs, which groups of 5 do not divide"),
        ({}, {"pattern": "2:4", "sparsity": 0.3}, "makes a sparsity of 0.5"),
        ({}, {"structured": True}, "pass their share as `sparsity`"),
        ({}, {"structured": True, "sparsity": 0.5, "pattern": "2:4"}, "and no `pattern`"),
        ({"metric": "sparsegpt"}, {"structured": True, "sparsity": 0.3}, "weights, not rows"),
        ({"metric": "gate_norm"}, {"sparsity": 0.3}, "so it scores rows, not weights"),
        (
            {"metric": "gate_norm", "primitives": "compat"},
            {"sparsity": 0.3, "structured": True},
            "`gate_norm` is of FFN rows",
        ),
        (
            {"metric": "add(gate, W)"},
            {"sparsity": 0.3, "structured": True},
            "`W` is no terminal of rows.* cannot be mixed",
        ),
        ({"metric": "sub(W, W)"}, {"sparsity": 0.3}, "the same score"),
        ({"metric": "add(gate, W)"}, {"sparsity": 0.3}, "`structured=True` with .* rows alone"),
        ({"sequences": 0}, {}, "`sequences` must be a whole number of at least 1"),
        ({"statistics": "folder"}, {}, r"`statistics` must be .*Statistics\.load.*, got a str"),
        ({"statistics": {}}, {}, "`statistics` must be .*, got a dict"),
        ({"metric": "sparsegpt", "sequential": False}, {}, "SparseGPT .* `sequential=False`"),
        ({"metric": "sparsegpt", "statistics": Statistics({}, {})}, {}, "SparseGPT .*`statistics`"),
        ({"data": "text"}, {}, "`tokenizer` is needed"),
    ],
)
def test_bad_arguments_are_told_before_anything_changes(tiny_llama, settings, call, told):
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(InvalidArgumentError, match=told):
        MetricPruner(**settings).prune(model, **call)
    assert_unchanged(model, before)


def test_statistics_of_another_model_are_refused(tiny_llama):
    statistics = collect_statistics(tiny_llama(), data=IDS)
    model = tiny_llama(seed=1)
    for metric in ("pruner-zero", "wanda", "magnitude"):
        with pytest.raises(InvalidArgumentError, match="a model with other weights"):
            MetricPruner(metric, statistics=statistics).prune(model, 0.5)


def test_layers_that_no_token_reaches_are_told(tiny_llama, monkeypatch):
    from yopo.symbolic import passes

    def first_alone(model, blocks, inputs):
        layers = walk(model, blocks, inputs)
        yield next(layers)
        layers.close()

    walk = passes.walk_blocks
    monkeypatch.setattr(passes, "walk_blocks", first_alone)
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"no token reaches `model.layers.1`"):
        MetricPruner("wanda", data=IDS).prune(model, 0.5)
    assert_unchanged(model, before)


def test_an_expression_object_is_a_metric(tiny_llama):
    by_text, by_tree = (
        MetricPruner(metric).prune(tiny_llama(), 0.5)
        for metric in ("sqr(W)", Expression.parse("sqr(W)"))
    )
    for name, tensor in by_text.state_dict().items():
        assert torch.equal(tensor, by_tree.state_dict()[name])


def test_a_sparse_model_is_an_ordinary_checkpoint(tiny_llama, tmp_path):
    model = MetricPruner("magnitude").prune(tiny_llama(), 0.5)
    model.save_pretrained(tmp_path)
    loaded = yopo.load(tmp_path)
    assert sparsity_of(loaded) == sparsity_of(model)
