import copy

import pytest
import torch
from transformers import LlamaModel

import yopo
from yopo import InvalidArgumentError, UnsupportedModelError, find_ffns
from yopo.evidence import Evidence
from yopo.imagining import imagine_moments
from yopo.moments import read_moments
from yopo.writing import can_write


def independent_units(model, ids, module):
    """Return what enters `module`, as plain hooks see it."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return torch.cat([states.reshape(-1, states.shape[-1]) for states in seen]).double()


@pytest.mark.parametrize(
    ("kind", "contract"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("phi3", "model.layers.1.mlp.down_proj"),
    ],
)
def test_moments_are_means_over_all_tokens_of_what_enters_the_contract_matrix(
    tiny_model, kind, contract
):
    model = tiny_model(kind)
    ids = torch.randint(3, 60, (40, 12), generator=torch.Generator().manual_seed(0))
    units = independent_units(model, ids, model.get_submodule(contract))
    ffn = find_ffns(model)[1]
    moments = read_moments(model, [ffn], {"input_ids": ids})[ffn.name]
    assert moments.tokens == len(units) == 480
    torch.testing.assert_close(moments.second_FF, units.T @ units / 480, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.mean_F, units.mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        moments.covariance(), torch.cov(units.T, correction=0), rtol=1e-3, atol=1e-5
    )


def test_an_expert_is_judged_by_the_tokens_that_are_sent_to_it(tiny_model):
    model = tiny_model("qwen2_moe")
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    experts = model.model.layers[0].mlp.experts
    seen = []
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    (states, chosen, _), expert = seen[0], 2
    mine = states[(chosen == expert).any(dim=-1)]
    gate, up = (mine @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    units = (torch.nn.functional.silu(gate) * up).detach().double()
    ffn = next(f for f in find_ffns(model) if f.name == f"model.layers.0.mlp.experts.{expert}")
    moments = read_moments(model, [ffn], {"input_ids": ids})[ffn.name]
    assert 0 < moments.tokens == len(units) < 48
    torch.testing.assert_close(
        moments.second_FF, units.T @ units / len(units), rtol=1e-4, atol=1e-6
    )


def test_reading_leaves_the_expert_implementation_and_the_mode_as_they_were(tiny_model):
    model = tiny_model("qwen2_moe").train()
    before = model.config._experts_implementation
    read_moments(model, find_ffns(model), {"input_ids": torch.ones(1, 4, dtype=torch.int64)})
    assert model.config._experts_implementation == before
    assert model.training


def test_a_model_without_a_head_cannot_write_and_is_judged_from_its_weights(tiny_model):
    headless = tiny_model("llama").model
    assert isinstance(headless, LlamaModel)
    assert not can_write(headless)
    with pytest.raises(UnsupportedModelError, match="evidence='weights'"):
        list(Evidence("self", seed=0).moments(headless, find_ffns(headless)))
    imagined = list(Evidence("auto", seed=0).moments(headless, find_ffns(headless)))
    assert len(imagined) == 2


@pytest.mark.parametrize("kind", ["nonsense", torch.zeros(3), torch.zeros(2, 3), torch.zeros(0, 4)])
def test_unusable_evidence_is_refused_by_name(kind):
    with pytest.raises(InvalidArgumentError, match="`evidence`"):
        Evidence(kind, seed=0)


def test_moments_are_remembered_only_for_the_same_weights(tiny_model, monkeypatch):
    model = tiny_model("llama")
    evidence = Evidence(torch.arange(3, 43).view(4, 10), seed=0)
    first = {ffn.name: found for ffn, found in evidence.moments(model, find_ffns(model))}
    twin = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr("yopo.evidence.read_moments", None)
        for ffn, found in evidence.moments(twin, find_ffns(twin)):
            assert found is first[ffn.name]
    with torch.no_grad():
        twin.model.layers[0].mlp.gate_proj.weight[0, 0] += 1
    changed = {ffn.name: found for ffn, found in evidence.moments(twin, find_ffns(twin))}
    name = "model.layers.0.mlp"
    assert not torch.equal(changed[name].second_FF, first[name].second_FF)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((2, 8), 99), r"\[0, 64\)"),
        (torch.full((2, 8), -1), r"\[0, 64\)"),
        (torch.ones(1, 65, dtype=torch.int64), "at most 64 tokens"),
    ],
)
def test_tokens_that_the_model_cannot_read_are_refused(tiny_model, ids, message):
    model = tiny_model("opt")
    with pytest.raises(InvalidArgumentError, match=message):
        list(Evidence(ids, seed=0).moments(model, find_ffns(model)))


def test_a_unit_whose_mean_is_large_keeps_its_variance(tiny_model):
    model = tiny_model("opt")
    ffn = find_ffns(model)[0]
    with torch.no_grad():
        ffn.vectors[0].read(ffn.rows)[:] = 3e4
    ids = torch.randint(3, 60, (64, 12), generator=torch.Generator().manual_seed(0))
    units = independent_units(model, ids, model.get_submodule("model.decoder.layers.0.fc2"))
    covariance = read_moments(model, [ffn], {"input_ids": ids})[ffn.name].covariance()
    torch.testing.assert_close(covariance, torch.cov(units.T, correction=0), rtol=1e-2, atol=1e-6)


def moments_of(evidence, model):
    return {ffn.name: found for ffn, found in evidence.moments(model, find_ffns(model))}


def test_moments_that_do_not_fit_together_are_read_one_after_another(tiny_model, monkeypatch):
    model = tiny_model("llama")
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    together = moments_of(Evidence(ids, seed=0), model)
    reads = []
    read = yopo.evidence.read_moments
    monkeypatch.setattr(
        yopo.evidence, "read_moments", lambda *given: reads.append(given[1]) or read(*given)
    )
    size = 8 * find_ffns(model)[0].rows ** 2
    monkeypatch.setattr(yopo.evidence, "memory_left", lambda device: 11 * size)
    apart = Evidence(ids, seed=0)
    for name, found in moments_of(apart, model).items():
        assert torch.equal(found.second_FF, together[name].second_FF)
    assert [len(group) for group in reads] == [1, 1]


@pytest.mark.parametrize(("memory", "reads"), [(16, 1), (15, 2)])
def test_moments_are_remembered_where_they_take_little_memory(
    tiny_model, monkeypatch, memory, reads
):
    model = tiny_model("llama")
    seen = []
    monkeypatch.setattr(
        yopo.evidence, "read_moments", lambda *given: seen.append(0) or read_moments(*given)
    )
    size = 8 * find_ffns(model)[0].rows ** 2
    monkeypatch.setattr(yopo.evidence, "memory_left", lambda device: memory * size)
    evidence = Evidence(torch.ones(1, 8, dtype=torch.int64), seed=0)
    moments_of(evidence, model)
    moments_of(evidence, model)
    assert len(seen) == reads


def test_text_is_written_once_even_if_moments_are_not_remembered(tiny_model, monkeypatch):
    model = tiny_model("llama")
    texts = []
    write = yopo.evidence.write_tokens
    monkeypatch.setattr(
        yopo.evidence, "write_tokens", lambda *a, **k: texts.append(0) or write(*a, **k)
    )
    size = 8 * find_ffns(model)[0].rows ** 2
    monkeypatch.setattr(yopo.evidence, "memory_left", lambda device: 11 * size)
    evidence = Evidence("self", seed=0)
    moments_of(evidence, model)
    moments_of(evidence, model)
    assert len(texts) == 1


def out_of_memory_above(count, read):
    def reads(model, group, inputs):
        if len(group) > count:
            raise torch.OutOfMemoryError("out of memory")
        return read(model, group, inputs)

    return reads


def test_when_memory_runs_out_fewer_ffns_are_read_at_once(tiny_model, monkeypatch):
    model = tiny_model("llama")
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    together = moments_of(Evidence(ids, seed=0), model)
    monkeypatch.setattr(yopo.evidence, "read_moments", out_of_memory_above(1, read_moments))
    apart = moments_of(Evidence(ids, seed=0), model)
    assert list(apart) == list(together)


@pytest.mark.parametrize("kind", ["tokens", "weights"])
def test_an_ffn_whose_moments_do_not_fit_is_refused_with_a_way_out(tiny_model, monkeypatch, kind):
    model = tiny_model("llama")
    evidence = Evidence(torch.ones(1, 8, dtype=torch.int64) if kind == "tokens" else kind, seed=0)

    def fail(*given, **named):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(yopo.evidence, "read_moments", fail)
    monkeypatch.setattr(yopo.evidence, "imagine_moments", fail)
    with pytest.raises(UnsupportedModelError, match="device with more memory"):
        moments_of(evidence, model)
    monkeypatch.setattr(yopo.evidence, "memory_left", lambda device: 1000)
    with pytest.raises(UnsupportedModelError, match="reward='spectral'"):
        moments_of(evidence, model)


def test_other_failures_of_the_model_stay_what_they_are(tiny_model, monkeypatch):
    model = tiny_model("llama")

    def fail(*given):
        raise RuntimeError("something else")

    monkeypatch.setattr(yopo.evidence, "read_moments", fail)
    with pytest.raises(RuntimeError, match="something else"):
        moments_of(Evidence(torch.ones(1, 8, dtype=torch.int64), seed=0), model)


def test_a_model_that_knows_no_limit_reads_tokens_of_any_length(tiny_model):
    model = tiny_model("llama")
    model.config.max_position_embeddings = -1
    moments_of(Evidence(torch.ones(1, 8, dtype=torch.int64), seed=0), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_checksum_knows_one_number_from_another_wherever_it_is(dtype):
    def model_with(values):
        model = torch.nn.Module()
        model.odd = torch.nn.Parameter(values.to(dtype))
        model.other = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        return model

    values = torch.linspace(-1, 1, 37)
    same = yopo.evidence.checksum_of(model_with(values))
    assert same == yopo.evidence.checksum_of(model_with(values.clone()))
    swapped = values.clone()
    swapped[[3, 30]] = values[[30, 3]]
    last = values.clone()
    last[-1] = 0.5
    negative = values.clone()
    negative[0] = 1.0
    others = {yopo.evidence.checksum_of(model_with(v)) for v in (swapped, last, negative)}
    assert len(others | {same}) == 4
    assert same != yopo.evidence.checksum_of(model_with(values.view(1, 37)))


def test_a_model_whose_units_overflow_on_a_text_is_refused(tiny_model):
    model = tiny_model("opt")
    ffn = find_ffns(model)[1]
    with torch.no_grad():
        ffn.vectors[0].read(ffn.rows)[3] = float("inf")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1.*wider `dtype`"):
        read_moments(model, [ffn], {"input_ids": torch.ones(2, 8, dtype=torch.int64)})


def test_an_ffn_that_no_token_reaches_is_judged_from_weights_alone(tiny_model, caplog):
    model = tiny_model("qwen2_moe")
    ffns = find_ffns(model)
    caplog.set_level("INFO", logger="yopo")
    evidence = Evidence(torch.full((2, 8), 7), seed=0)  # tokens all alike go to two experts of four
    found = {ffn.name: moments for ffn, moments in evidence.moments(model, ffns)}
    unseen = [ffn for ffn in ffns if found[ffn.name].tokens == 0]
    assert 0 < len(unseen) < len(ffns)
    assert f"No token reaches {len(unseen)} FFNs" in caplog.text
    imagined = imagine_moments(model, unseen, tokens=128 * 256, seed=0)
    for ffn in unseen:
        assert torch.equal(found[ffn.name].second_FF, imagined[ffn.name].second_FF)
        assert found[ffn.name].second_FF.diagonal().min() > 0


def test_an_ffn_that_neither_text_nor_weights_tell_of_is_named(tiny_model, monkeypatch, caplog):
    def fail(*_, **__):
        raise UnsupportedModelError("its activation is not found.")

    monkeypatch.setattr("yopo.evidence.imagine_moments", fail)
    model = tiny_model("qwen2_moe")
    found = moments_of(Evidence(torch.full((2, 8), 7), seed=0), model)
    assert "rows go as they come, for its activation is not found." in caplog.text
    assert {ffn.name for ffn in find_ffns(model)} == set(found)
