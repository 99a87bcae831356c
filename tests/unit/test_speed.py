import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.loading import load
from yopo.speed import Speed, SpeedReport, benchmark, machine, time_in_turn
from yopo.speed.machine import bound_of, forget_peak, measure_rates, peak

CAUSAL = ["llama", "opt", "gpt2", "phi", "qwen2_moe"]

MATRICES = {
    "llama": 2 * (4 * 32 * 32 + 3 * 80 * 32) + 64 * 32,
    "opt": 2 * (4 * 32 * 32 + 2 * 96 * 32) + 64 * 32,
    "gpt2": 2 * (4 * 32 * 32 + 2 * 128 * 32) + 64 * 32,
    "phi": 2 * (4 * 32 * 32 + 2 * 96 * 32) + 64 * 32,
    # two of four experts, one shared expert with its gate, a router, and half as many keys
    "qwen2_moe": 2 * (3 * 32 * 32 + (2 * 24 + 48) * 3 * 32 + 4 * 32 + 32) + 64 * 32,
}
"""Numbers of the matrices that a token meets: layers, and a head, tied or not."""

TABLES = {"llama": 64, "opt": 64 + 2, "gpt2": 64, "phi": 64, "qwen2_moe": 64}
"""Rows of the tables that are only looked up: tokens, or positions where the head is tied."""


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch):
    monkeypatch.setattr(machine, "PRODUCT_ON_CPU", (8, 16))
    monkeypatch.setattr(machine, "READ", (64, 64))


@pytest.fixture
def saved(tiny_model, tmp_path):
    path = tmp_path / "model"
    tiny_model("llama").save_pretrained(path)
    return path


def watch(model, seen, name="model"):
    """Record, of every forward pass: who runs, the tokens, those cached before, the logits."""

    def record(module, args, kwargs, output):
        cache = kwargs.get("past_key_values")
        seen.append(
            SimpleNamespace(
                name=name,
                ids=kwargs["input_ids"].clone(),
                cached=0
                if cache is None
                else cache.get_seq_length() - kwargs["input_ids"].shape[1],
                logits=getattr(output, "logits", torch.empty(0)).clone(),
                training=module.training,
                gradients=torch.is_grad_enabled(),
            )
        )

    model.register_forward_hook(record, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_token_but_the_prompt_is_one_pass_over_one_token_with_what_was_cached(
    tiny_model, kind
):
    passes = []
    model = watch(tiny_model(kind), passes)
    report = benchmark(model, batch=2, prompt=7, new_tokens=3, repeats=1)
    assert [tuple(seen.ids.shape) for seen in passes] == 3 * [(2, 7), (2, 1), (2, 1), (2, 1)]
    assert [seen.cached for seen in passes] == 3 * [0, 7, 8, 9]
    assert not any(seen.training or seen.gradients for seen in passes)
    assert len(report.model.prefill) == len(report.model.decode) == 1
    assert min(*report.model.prefill, *report.model.decode) > 0


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_is_written_is_what_the_model_finds_likeliest_without_a_cache(tiny_model, kind):
    passes, model = [], tiny_model(kind)
    hooked = watch(model, passes)
    benchmark(hooked, batch=2, prompt=7, new_tokens=3, repeats=1)
    written = torch.cat([seen.ids for seen in passes[-4:]], dim=1)
    with torch.no_grad():
        logits = tiny_model(kind)(input_ids=written, use_cache=False).logits
    assert torch.equal(logits[:, 6:-1].argmax(dim=-1), written[:, 7:])
    torch.testing.assert_close(
        torch.cat([seen.logits for seen in passes[-4:]], dim=1), logits, rtol=1e-4, atol=1e-4
    )


def test_two_models_run_in_turn(tiny_model):
    passes = []
    small = watch(tiny_model("llama", intermediate_size=56), passes, "small")
    dense = watch(tiny_model("llama"), passes, "dense")
    report = benchmark(small, dense, prompt=4, new_tokens=2, repeats=3)
    prompts = [seen.name for seen in passes if seen.ids.shape[1] == 4]
    assert prompts == ["small", "dense"] * (2 + 3)  # one turn warms up, one tells the memory
    assert len(report.against.prefill) == len(report.against.decode) == 3
    assert report.speed_up_bound("decode") > 1


def test_models_of_other_vocabularies_are_compared(tiny_model):
    report = benchmark(tiny_model("gpt2"), tiny_model("llama", vocab_size=40), repeats=1, prompt=4)
    assert report.speed_up("prefill") > 0


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_bytes_are_those_of_the_checkpoint(tiny_model, tmp_path, kind, dtype):
    model = tiny_model(kind, dtype=dtype)
    model.save_pretrained(tmp_path)
    stored = transformers.modeling_utils.load_state_dict(tmp_path / "model.safetensors")
    report = benchmark(model, prompt=4, new_tokens=1, repeats=1)
    assert report.model.parameters == sum(weight.numel() for weight in stored.values())
    assert report.model.bytes == dtype.itemsize * report.model.parameters


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_bound_is_the_slower_of_operations_and_bytes(tiny_model, kind):
    model = tiny_model(kind, dtype=torch.bfloat16)
    operations = 2 * MATRICES[kind]
    numbers = sum(weight.numel() for weight in model.parameters()) - 32 * TABLES[kind]
    if kind == "qwen2_moe":
        numbers -= 2 * 2 * 24 * 3 * 32  # two layers, two experts that a token is not sent to
    for tokens in (1, 96):
        assert bound_of(model, tokens, (1e3, 1e30)) == pytest.approx(1e3 / operations)
        assert bound_of(model, tokens, (1e30, 1e3)) == pytest.approx(tokens * 1e3 / (2 * numbers))
        both = tokens / max(operations * tokens / 1e5, 2 * numbers / 1e4)
        assert bound_of(model, tokens, (1e5, 1e4)) == pytest.approx(both)


def test_prefill_is_bound_by_all_tokens_of_a_pass_and_decode_by_one_of_each_sequence(tiny_model):
    model = tiny_model("llama")
    speed = benchmark(model, batch=2, prompt=8, new_tokens=1, repeats=2).model
    rates = speed.operations_per_second, speed.bytes_per_second
    assert speed.prefill_bound == bound_of(model, 16, rates)
    assert speed.decode_bound == bound_of(model, 2, rates)


def test_the_best_rates_of_all_turns_set_the_bounds(tiny_model, monkeypatch):
    found = iter([(5.0, 2.0), (4.0, 7.0)])
    monkeypatch.setattr("yopo.speed.timing.measure_rates", lambda *_: next(found))
    (speed,) = time_in_turn([tiny_model("opt")], batch=1, prompt=4, new_tokens=1, repeats=2)
    assert (speed.operations_per_second, speed.bytes_per_second) == (5.0, 7.0)


def test_rates_are_work_over_the_least_of_three_times_after_a_first(monkeypatch):
    clock = iter([0, 100, 100, 104, 104, 106, 106, 109, 0, 1, 1, 9, 9, 17, 17, 25])
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    operations, read = measure_rates(torch.device("cpu"), torch.float32)
    assert operations == 2 * 8 * 16 * 16 / 2
    assert read == 4 * 64 * 64 / 8


def test_modes_generators_and_gradients_are_left_as_they_were(tiny_model):
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    benchmark(model, prompt=4, new_tokens=1, repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_modes_are_put_back_if_a_model_fails(tiny_model, monkeypatch):
    model = tiny_model("llama").train()
    monkeypatch.setattr("yopo.speed.timing.wait", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark(model, prompt=4, repeats=1)
    assert all(module.training for module in model.modules())


def test_a_model_without_a_head_is_only_read(tiny_model):
    passes = []
    model = watch(tiny_model("llama").model, passes)
    report = benchmark(model, prompt=4, repeats=1)
    assert [tuple(seen.ids.shape) for seen in passes] == 3 * [(1, 4)]
    assert (report.model.decode, report.model.decode_bound) == (None, None)
    assert report.speed_up("decode") is None
    assert "decode" in str(report)


def test_a_checkpoint_is_loaded_as_asked_and_its_loading_timed(saved):
    report = benchmark(saved, str(saved), prompt=4, repeats=1, dtype="bfloat16", device="cpu")
    for speed in (report.model, report.against):
        assert (speed.name, speed.device, speed.dtype) == (str(saved), "cpu", "bfloat16")
        assert speed.bytes == 2 * speed.parameters
        assert speed.load_seconds > 0
        assert speed.load_peak is None or speed.load_peak >= 0


def test_what_the_first_loading_sets_up_counts_for_neither_model(saved, tmp_path, monkeypatch):
    other = shutil.copytree(saved, tmp_path / "other")
    clock, loaded = [0.0], []

    def load_slowly_at_first(source, **settings):
        clock[0] += 1.0 if source in loaded else 100.0
        loaded.append(source)
        return load(source, **settings)

    monkeypatch.setattr("yopo.speed.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr("yopo.speed.load", load_slowly_at_first)
    report = benchmark(saved, other, prompt=4, new_tokens=1, repeats=1)
    assert report.model.load_seconds == report.against.load_seconds == 1.0


def test_a_checkpoint_joins_a_model_in_memory_where_that_is(saved, tiny_model):
    report = benchmark(saved, tiny_model("llama"), prompt=4, repeats=1)
    assert (report.model.device, report.against.name) == ("cpu", "LlamaForCausalLM")
    assert report.against.load_seconds is report.against.load_peak is None


def test_the_peak_counts_what_was_held_and_given_back_in_between():
    cpu, size = torch.device("cpu"), 64 * 2**20
    held = forget_peak(cpu)
    if held is None:
        pytest.skip("this system does not tell the peak of a process")
    block = torch.ones(size, dtype=torch.uint8)
    del block
    assert 0.95 * size < peak(cpu) - held < 2 * size  # the system counts in lumps of pages
    forget_peak(cpu)
    assert peak(cpu) - held < size // 2


def test_no_peak_is_told_where_the_system_forbids_it(monkeypatch):
    def forbid(path, *_):
        raise PermissionError(path)

    monkeypatch.setattr("pathlib.Path.write_text", forbid)
    assert forget_peak(torch.device("cpu")) is None
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    assert forget_peak(torch.device("cpu")) is None


def test_an_accelerator_tells_its_own_peak_if_it_can(monkeypatch):
    told = []
    module = SimpleNamespace(
        reset_peak_memory_stats=told.append,
        memory_allocated=lambda device: 200,
        max_memory_allocated=lambda device: 700,
    )
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert (forget_peak(device), peak(device), told) == (200, 700, [device])
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert forget_peak(device) is None


SPEED = Speed(
    name="small",
    device="cpu",
    dtype="float32",
    parameters=750_000,
    bytes=3_000_000,
    prefill=(30.0, 20.0, 90.0),
    decode=(4.0, 2.0, 3.0),
    prefill_bound=60.0,
    decode_bound=6.0,
    run_peak=None,
    operations_per_second=5e9,
    bytes_per_second=2e9,
    load_seconds=1.5,
)


def test_speed_ups_are_medians_of_the_ratios_of_each_turn():
    dense = Speed(**_fields(SPEED) | {"prefill": (10.0, 20.0, 45.0), "decode": (4.0, 1.0, 1.0)})
    report = SpeedReport(SPEED, dense, 1, 8, 2)
    assert report.speed_up("prefill") == 2.0  # of 3, 1 and 2; the medians would give 1.5
    assert report.speed_up("decode") == 2.0  # of 1, 2 and 3
    assert report.speed_up_bound("prefill") == 1.0
    assert SpeedReport(SPEED, None, 1, 8, 2).speed_up("prefill") is None
    assert SpeedReport(SPEED, None, 1, 8, 2).speed_up_bound("decode") is None


def test_the_table_puts_what_was_measured_beside_what_is_possible():
    changes = {"name": "dense", "bytes": 4_000_000, "prefill": (15.0, 10.0, 45.0)}
    dense = Speed(**_fields(SPEED) | changes | {"prefill_bound": 40.0, "decode": None})
    text = str(SpeedReport(SPEED, dense, 1, 8, 2))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if row}
    assert table[""] == ["small", "dense", "times"]
    assert table["weights, MB"] == ["3.00", "4.00", "0.75"]
    assert table["loading, s"] == ["1.50", "1.50", ""]
    assert table["peak of a run, MB more"] == ["", "", ""]
    assert table["prefill, tokens/s"] == ["30.0 (20.0 to 90.0)", "15.0 (10.0 to 45.0)", "2.00"]
    bounds, shares = (row[1:] for row in rows[-6 + 1 : -6 + 3])
    assert bounds == ["60.0", "40.0", "1.50"]
    assert shares == ["50%", "38%", ""]
    assert table["decode, tokens/s"] == ["3.0 (2.0 to 4.0)", "", ""]
    alone = str(SpeedReport(SPEED, None, 1, 8, 2))
    assert "dense" not in alone
    assert "times" not in alone


def test_a_report_survives_json():
    found = json.loads(json.dumps(SpeedReport(SPEED, SPEED, 1, 8, 2).to_dict()))
    assert found["model"]["prefill"] == [30.0, 20.0, 90.0]
    assert found["speed_up"] == found["speed_up_bound"] == {"prefill": 1.0, "decode": 1.0}
    reader = replace(SPEED, decode=None, decode_bound=None)
    for report in (SpeedReport(SPEED, SPEED, 1, 8, 2), SpeedReport(reader, None, 1, 8, 2)):
        assert SpeedReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def _fields(speed):
    return {name: getattr(speed, name) for name in Speed.__dataclass_fields__}


@pytest.mark.parametrize("name", ["batch", "prompt", "new_tokens", "repeats"])
@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_numbers_that_are_not_positive_integers_are_refused(tiny_llama, name, count):
    with pytest.raises(InvalidArgumentError, match=rf"`{name}` must be a positive integer, got"):
        benchmark(tiny_llama(), **{name: count})


@pytest.mark.parametrize("source", ["model", "path"])
def test_more_tokens_than_a_model_can_read_are_refused_before_it_runs_or_loads(
    tiny_opt, tmp_path, monkeypatch, source
):
    model = tiny_opt()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("yopo.speed._load", None)
    given = model if source == "model" else tmp_path
    with pytest.raises(InvalidArgumentError, match=r"take 65 positions.* has 64"):
        benchmark(given, prompt=60, new_tokens=5)


def test_as_many_tokens_as_a_model_can_read_are_read(tiny_opt):
    benchmark(tiny_opt(), prompt=60, new_tokens=4, repeats=1)
    benchmark(tiny_opt().model, prompt=64, new_tokens=4, repeats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, '`dtype` must be "auto" or a floating dtype'),
        ({"dtype": "float31"}, "got 'float31'"),
        ({"device": "meta"}, "`device` must be one of .*cpu here, got 'meta'"),
        ({"device": "nowhere"}, "got 'nowhere'"),
        ({"against": 3}, "`against` must be a folder, a name on the hub or a model, got 3"),
    ],
)
def test_what_cannot_be_loaded_or_run_is_refused(saved, arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        benchmark(saved, **arguments)


@pytest.mark.parametrize("arguments", [{"dtype": torch.bfloat16}, {"device": "cpu"}])
def test_models_in_memory_are_not_moved(tiny_llama, arguments):
    with pytest.raises(InvalidArgumentError, match=r"model\.to\(device, dtype\)"):
        benchmark(tiny_llama(), tiny_llama(), **arguments)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="holds no model"):
        benchmark(tmp_path)


def test_code_that_comes_with_a_model_is_refused_without_a_question(saved, monkeypatch):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "own.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InvalidArgumentError, match=r"contains custom code.*load it yourself"):
        benchmark(saved)


def test_a_damaged_checkpoint_is_refused(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InvalidArgumentError, match=r"model\.safetensors` is cut short"):
        benchmark(saved)


def test_models_that_are_not_timed_are_refused_with_what_is(tiny_model):
    for model in (nn.Linear(2, 2), tiny_model("t5")):
        with pytest.raises(UnsupportedModelError, match="causal language models with a key-value"):
            benchmark(model)
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            benchmark(tiny_model("llama"), model)


def test_a_model_that_writes_without_a_cache_of_keys_and_values_is_refused():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with torch.random.fork_rng():
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    with pytest.raises(UnsupportedModelError, match="returns no `past_key_values`"):
        benchmark(model, prompt=4, repeats=1)


def test_weights_that_are_elsewhere_or_packed_are_refused(tiny_llama):
    with pytest.raises(UnsupportedModelError, match="meta device"):
        benchmark(tiny_llama().to("meta"))
    model = tiny_llama()
    model.lm_head.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        benchmark(model)


def test_too_little_memory_is_said_with_the_ways_out(tiny_llama, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("yopo.speed.time_in_turn", fail)
    with pytest.raises(UnsupportedModelError, match="measure each model alone"):
        benchmark(tiny_llama(), tiny_llama())
