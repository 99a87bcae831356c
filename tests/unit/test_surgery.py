import copy
import hashlib
import logging
import os
import pickle
import signal
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, LlamaForCausalLM

import yopo
from yopo import InvalidArgumentError, PruningPlan, UnsupportedModelError, surgery
from yopo.plan import plan_widths

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
CONTRACTS = {"llama": "down_proj", "opt": "fc2", "phi": "fc2", "phi3": "down_proj", "t5": "wo"}


def random_plan(model, ratio=0.3, seed=0):
    """Plan to keep random rows, other ones in every FFN."""
    ffns = yopo.find_ffns(model)
    generator = torch.Generator().manual_seed(seed)
    widths = plan_widths(ffns, ratio, multiple_of=1)
    kept = {
        ffn.name: torch.randperm(ffn.rows, generator=generator)[: widths[ffn.name]].sort().values
        for ffn in ffns
    }
    return PruningPlan(kept=kept, rows={ffn.name: ffn.rows for ffn in ffns}, ratio=ratio)


def uneven_plan(model):
    """Plan widths that no config can express: the first FFN loses a third, the others nothing."""
    kept = {ffn.name: torch.arange(ffn.rows) for ffn in yopo.find_ffns(model)}
    first = next(iter(kept))
    kept[first] = kept[first][::3]
    rows = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    return PruningPlan(kept=kept, rows=rows, ratio=0.2)


def with_rows_zeroed(model, kind, plan):
    """Return a copy of the dense model in which the dropped rows contribute nothing.

    Names and axes of the contract matrices are written out here, not asked of yopo.
    """
    model = copy.deepcopy(model)
    for name, kept in plan.kept.items():
        dropped = torch.ones(plan.rows[name], dtype=torch.bool).scatter(0, kept, False)
        path, _, last = name.rpartition(".")
        with torch.no_grad():
            if kind == "gpt2":
                model.get_submodule(name).c_proj.weight[dropped] = 0
            elif kind == "gpt_oss":
                model.get_submodule(path).down_proj[int(last)][dropped] = 0
            elif kind == "qwen2_moe" and last.isdigit():
                model.get_submodule(path).down_proj[int(last)][:, dropped] = 0
            else:
                contract = CONTRACTS.get(kind, "down_proj")
                model.get_submodule(name).get_submodule(contract).weight[:, dropped] = 0
    return model


def difference(first, second):
    return float((first - second).double().norm() / second.double().norm())


def fingerprint(model):
    """Return a digest of all that a call may change: weights, sizes, config, what hangs on it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.shape} {parameter.requires_grad}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        sizes = {k: v for k, v in vars(module).items() if isinstance(v, int | float | tuple)}
        digest.update(
            f"{name} {sorted(sizes.items())} {'save_pretrained' in vars(module)}".encode()
        )
    digest.update(model.config.to_json_string().encode())
    return digest.hexdigest()


LAYOUTS = ["llama", "opt", "phi", "phi3", "gpt2", "t5", "qwen2_moe", "gpt_oss"]


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=6)
@given(ratio=st.floats(0.0, 0.95), seed=st.integers(0, 999), data=st.data())
def test_a_cut_model_equals_the_dense_one_without_the_contribution_of_those_rows(
    tiny_model, logits, kind, ratio, seed, data
):
    # In half precision, rounding may send a token to another expert; in double, experts cannot run.
    routed = kind in ("qwen2_moe", "gpt_oss")
    dtype = torch.float32 if routed else data.draw(st.sampled_from(list(TOLERANCE)))
    model = tiny_model(kind, dtype=dtype)
    plan = random_plan(model, ratio, seed)
    expected = logits(with_rows_zeroed(model, kind, plan))
    yopo.apply_plan(model, plan)
    assert {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)} == plan.widths
    assert difference(logits(model), expected) < TOLERANCE[dtype]


@settings(max_examples=8)
@given(
    hidden=st.sampled_from([8, 16, 24]),
    rows=st.integers(1, 70),
    layers=st.integers(1, 3),
    ratio=st.floats(0.0, 0.9),
)
def test_any_shape_can_be_cut(tiny_llama, logits, hidden, rows, layers, ratio):
    model = tiny_llama(
        hidden_size=hidden, intermediate_size=rows, num_hidden_layers=layers, dtype=torch.float64
    )
    assume(int((1 - ratio) * rows) > 0)
    plan = random_plan(model, ratio)
    expected = logits(with_rows_zeroed(model, "llama", plan))
    yopo.apply_plan(model, plan)
    assert difference(logits(model), expected) < 1e-12
    assert model.config.intermediate_size == int((1 - ratio) * rows)


@pytest.mark.parametrize("kind", ["llama", "opt", "phi"])
def test_hidden_states_are_those_of_the_reference(golden, kind):
    from transformers import LlamaModel, OPTModel, PhiModel

    figures, tensors = golden
    model_class = {"llama": LlamaModel, "opt": OPTModel, "phi": PhiModel}[kind]
    model = model_class(model_class.config_class(**figures["configs"][kind])).eval()
    prefix = f"slicing.{kind}."
    weights = {
        key.removeprefix(prefix + "dense."): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix + "dense.")
    }
    model.load_state_dict(weights)
    rows = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    kept = {name: tensors[f"{prefix}kept.{i}"].sort().values for i, name in enumerate(rows)}
    yopo.apply_plan(model, PruningPlan(kept=kept, rows=rows, ratio=0.3))
    with torch.no_grad():
        states = model(input_ids=tensors[prefix + "input_ids"]).last_hidden_state
    torch.testing.assert_close(
        states, tensors[prefix + "pruned_last_hidden_state"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_parameters_stay_the_same_objects_with_all_their_properties(tiny_model, kind):
    model = tiny_model(kind)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.data = parameter.data.to([torch.float32, torch.bfloat16][number % 2])
        parameter.mark = name
        if parameter.dim() == 2 and number % 4 < 2:
            parameter.data = parameter.data.T.contiguous().T
        if parameter.dim() == 3:
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
    before = {
        name: (p, p.dtype, p.device, p.requires_grad, p.stride(), type(p), tuple(p.shape))
        for name, p in model.named_parameters()
    }
    yopo.apply_plan(model, random_plan(model))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (old, dtype, device, requires_grad, stride, kind_, shape) in before.items():
        new = after[name]
        assert new is old
        assert new.mark == name
        assert (new.dtype, new.device, new.requires_grad) == (dtype, device, requires_grad)
        assert type(new) is kind_ is torch.nn.Parameter

        def order(strides):
            return sorted(range(len(strides)), key=strides.__getitem__)

        assert order(new.stride()) == order(stride)
        assert sum(a != b for a, b in zip(new.shape, shape, strict=True)) <= 1
        assert new.is_leaf


def test_gradients_that_no_longer_fit_are_dropped_and_training_goes_on(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(12).view(1, 12) + 3
    model(input_ids=ids, labels=ids).loss.backward()
    kept = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    with torch.inference_mode():
        yopo.apply_plan(model, random_plan(model))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, kept)
    assert all(p.grad is None for layer in model.model.layers for p in layer.mlp.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for parameter in model.parameters():
        assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"intermediate_size": 56}),
        ("opt", {"ffn_dim": 67}),
        ("phi3", {"intermediate_size": 56}),
        ("gpt2", {"n_inner": 89}),
        ("t5", {"d_ff": 56}),
        ("qwen2_moe", {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 33}),
        ("gpt_oss", {"intermediate_size": 32}),
    ],
)
def test_the_config_and_the_modules_know_the_new_width(tiny_model, kind, fields):
    model = tiny_model(kind)
    before = model.config.to_dict()
    yopo.apply_plan(model, random_plan(model))
    after = model.config.to_dict()
    assert {key: after[key] for key in fields} == fields
    assert {key for key in after if after[key] != before.get(key)} == fields.keys()
    fresh = type(model)(copy.deepcopy(model.config))
    for (name, module), (_, built) in zip(
        model.named_modules(), fresh.named_modules(), strict=True
    ):
        for key in ("in_features", "out_features", "nx", "nf", "intermediate_size", "expert_dim"):
            assert getattr(module, key, None) == getattr(built, key, None), (name, key)
        assert repr(module) == repr(built)
    for (name, parameter), (_, built) in zip(
        model.named_parameters(), fresh.named_parameters(), strict=True
    ):
        assert parameter.shape == built.shape, name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_stock_from_pretrained_loads_what_was_cut(tiny_model, logits, tmp_path, kind):
    model = tiny_model(kind)
    yopo.apply_plan(model, random_plan(model))
    model.save_pretrained(tmp_path)
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))


def test_what_has_nothing_to_do_with_the_width_stays_as_the_user_set_it(tiny_llama):
    model = tiny_llama()
    model.model.rotary_emb.max_seq_len_cached = 77
    model.model.layers[0].self_attn.note = 80  # the number of rows, by chance
    model.model.layers[0].mlp.note = 80
    model.train()
    yopo.apply_plan(model, random_plan(model))
    assert model.model.rotary_emb.max_seq_len_cached == 77
    assert model.model.layers[0].self_attn.note == model.model.layers[0].mlp.note == 80
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
def test_cutting_twice_equals_cutting_once(tiny_model, kind):
    one, two = tiny_model(kind), tiny_model(kind)
    first = random_plan(two, 0.25, seed=1)
    yopo.apply_plan(two, first)
    second = random_plan(two, 0.5, seed=2)
    yopo.apply_plan(two, second)
    both = {name: kept[second.kept[name]] for name, kept in first.kept.items()}
    yopo.apply_plan(one, PruningPlan(kept=both, rows=first.rows, ratio=0.6))
    assert fingerprint(one) == fingerprint(two)


def test_cutting_nothing_changes_nothing(tiny_llama):
    model = tiny_llama()
    before = fingerprint(model)
    yopo.apply_plan(model, random_plan(model, 0.0))
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_model_on_the_meta_device_gets_its_new_shapes(tiny_model, kind):
    model = tiny_model(kind)
    plan = random_plan(model)
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    yopo.apply_plan(model, plan)
    yopo.apply_plan(empty, plan)
    assert all(parameter.is_meta for parameter in empty.parameters())
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert [tuple(parameter.shape) for parameter in empty.parameters()] == shapes
    assert empty.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "t5"])
def test_tied_embeddings_stay_tied(tiny_model, logits, tmp_path, kind):
    model = tiny_model(kind, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    yopo.apply_plan(model, random_plan(model))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("share", ["modules", "weights"])
def test_layers_that_share_an_ffn_are_cut_once(tiny_llama, logits, share):
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    if share == "modules":
        model.model.layers[1].mlp = first
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            second.get_submodule(name).weight = first.get_submodule(name).weight
    plan = random_plan(model)
    assert len(plan.kept) == 1
    expected = logits(with_rows_zeroed(model, "llama", plan))
    yopo.apply_plan(model, plan)
    assert difference(logits(model), expected) < 1e-5
    assert all(layer.mlp.gate_proj.out_features == 56 for layer in model.model.layers)


def test_a_model_whose_last_layers_were_dropped_is_cut(tiny_llama, logits):
    model = tiny_llama()
    model.model.layers = model.model.layers[:1]
    plan = random_plan(model)
    expected = logits(with_rows_zeroed(model, "llama", plan))
    yopo.apply_plan(model, plan)
    assert difference(logits(model), expected) < 1e-5


def test_a_plan_of_another_model_is_refused_by_name(tiny_llama, tiny_opt):
    def refusal(plan):
        model = tiny_llama()
        before = fingerprint(model)
        with pytest.raises(
            InvalidArgumentError, match=r"the plan does not fit this model"
        ) as caught:
            yopo.apply_plan(model, plan)
        assert fingerprint(model) == before
        return str(caught.value)

    assert "`model.layers.0.mlp` has 80 rows, the plan does not name it" in refusal(
        random_plan(tiny_opt())
    )
    assert "`model.layers.0.mlp` has 80 rows, the plan was made for 96" in refusal(
        random_plan(tiny_llama(intermediate_size=96))
    )
    assert "which has no FFN `model.layers.2.mlp`" in refusal(
        random_plan(tiny_llama(num_hidden_layers=3))
    )
    assert "`model.layers.1.mlp` has 80 rows, the plan does not name it" in refusal(
        random_plan(tiny_llama(num_hidden_layers=1))
    )


@pytest.mark.parametrize("plan", ["plan", None, {"model.layers.0.mlp": torch.arange(3)}])
def test_what_is_no_plan_is_refused_with_the_way_to_load_one(tiny_llama, plan):
    with pytest.raises(
        InvalidArgumentError, match=r"`plan` must be a PruningPlan, got .* `PruningPlan\.load"
    ):
        yopo.apply_plan(tiny_llama(), plan)


def test_experts_in_one_tensor_need_one_width(tiny_model):
    model = tiny_model("gpt_oss")
    before = fingerprint(model)
    with pytest.raises(InvalidArgumentError, match=r"experts\.0` and `.*experts\.1` lie in one"):
        yopo.apply_plan(model, uneven_plan(model))
    assert fingerprint(model) == before


def test_ffns_found_before_an_earlier_cut_do_no_harm(tiny_llama):
    model = tiny_llama()
    ffns, plan = yopo.find_ffns(model), random_plan(model)
    yopo.apply_plan(model, plan, ffns=ffns)
    before = fingerprint(model)
    with pytest.raises(yopo.YopoError):
        yopo.apply_plan(model, plan, ffns=ffns)
    assert fingerprint(model) == before


def test_a_class_that_refuses_the_new_width_is_found_out_before_the_cut(tiny_llama, monkeypatch):
    model = tiny_llama()
    before, plan = fingerprint(model), random_plan(model)
    build = LlamaForCausalLM.__init__

    def picky(self, config):
        if config.intermediate_size == 56:
            raise ValueError("56 is not a multiple of 5")
        build(self, config)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", picky)
    with pytest.raises(UnsupportedModelError) as caught:
        yopo.apply_plan(model, plan)
    assert str(caught.value) == (
        "LlamaForCausalLM cannot be built with intermediate_size=56: 56 is not a multiple of 5"
    )
    assert fingerprint(model) == before


def test_a_class_that_would_build_other_shapes_is_found_out_before_the_cut(tiny_llama, monkeypatch):
    model = tiny_llama()
    before, plan = fingerprint(model), random_plan(model)
    build = LlamaForCausalLM.__init__

    def rounding(self, config):
        config = copy.deepcopy(config)
        config.intermediate_size = config.intermediate_size // 16 * 16
        build(self, config)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", rounding)
    with pytest.raises(
        UnsupportedModelError, match=r"with shape \(56, 32\), but .* build \(48, 32\)"
    ):
        yopo.apply_plan(model, plan)
    assert fingerprint(model) == before


@pytest.fixture
def interrupt_in_the_middle(monkeypatch):
    """Send this process Ctrl-C from another thread while the third matrix is cut."""
    cut, calls = surgery._cut_parameter, []

    def interrupted(slots):
        calls.append(None)
        if len(calls) == 3:
            thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
            thread.start()
            thread.join()
        cut(slots)

    monkeypatch.setattr(surgery, "_cut_parameter", interrupted)


def test_ctrl_c_waits_until_the_cut_is_complete(tiny_llama, logits, interrupt_in_the_middle):
    model = tiny_llama()
    plan = random_plan(model)
    expected = logits(with_rows_zeroed(model, "llama", plan))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        yopo.apply_plan(model, plan)
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.config.intermediate_size == 56
    assert difference(logits(model), expected) < 1e-5


def test_a_handler_of_the_user_hears_of_ctrl_c_once_the_cut_is_complete(
    tiny_llama, interrupt_in_the_middle
):
    model = tiny_llama()
    heard = []
    previous = signal.signal(
        signal.SIGINT, lambda number, frame: heard.append(model.config.intermediate_size)
    )
    try:
        yopo.apply_plan(model, random_plan(model))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert heard == [56]


def test_a_cut_in_another_thread_works(tiny_llama):
    model = tiny_llama()
    thread = threading.Thread(target=yopo.apply_plan, args=(model, random_plan(model)))
    thread.start()
    thread.join()
    assert model.config.intermediate_size == 56


def test_unequal_widths_are_told_when_cut_and_when_saved(tiny_llama, tmp_path, caplog):
    model = tiny_llama()
    yopo.apply_plan(model, uneven_plan(model))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot express the new widths of 2 FFNs" in caplog.text
    assert "load the model with `yopo.load(path)`" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert "stock `from_pretrained` will refuse the saved files" in caplog.text
    assert model.config.yopo_widths == {"model.layers.0.mlp": 27, "model.layers.1.mlp": 80}
    assert model.config.intermediate_size == 80


def test_equal_widths_are_not_worth_a_word(tiny_llama, tmp_path, caplog):
    model = tiny_llama()
    yopo.apply_plan(model, random_plan(model))
    model.save_pretrained(tmp_path)
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "t5"])
def test_unequal_widths_cut_the_right_rows_and_can_be_cut_again(tiny_model, logits, kind):
    model = tiny_model(kind, dtype=torch.float64)
    for plan in (uneven_plan, lambda model: random_plan(model, 0.2), uneven_plan):
        made = plan(model)
        expected = logits(with_rows_zeroed(model, kind, made))
        yopo.apply_plan(model, made)
        assert difference(logits(model), expected) < 1e-12
        assert model.config.yopo_widths == made.widths


def test_a_model_of_unequal_widths_can_be_copied_and_pickled(tiny_llama, logits, tmp_path, caplog):
    model = tiny_llama()
    yopo.apply_plan(model, uneven_plan(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        caplog.clear()
        twin.save_pretrained(tmp_path)
        assert "stock `from_pretrained` will refuse" in caplog.text
        assert logits(yopo.load(tmp_path)).abs().max() == 0


def test_cutting_the_encoder_alone_leaves_the_decoders_config(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    half = BertConfig(**sizes, intermediate_size=48)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(half, copy.deepcopy(half))
    model = EncoderDecoderModel(config=config).eval()
    rows = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    kept = {name: torch.arange(48)[:: 2 if name.startswith("encoder") else 1] for name in rows}
    yopo.apply_plan(model, PruningPlan(kept=kept, rows=rows, ratio=0.25))
    assert model.config.encoder.intermediate_size == 24
    assert model.config.decoder.intermediate_size == 48
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoderModel.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
