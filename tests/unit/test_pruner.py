import copy
import logging
import random

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    DbrxConfig,
    DbrxForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import yopo
from yopo import (
    InvalidArgumentError,
    NotFittedError,
    PolicyFileError,
    PolicyMismatchError,
    PolicyPruner,
    UnsupportedModelError,
)
from yopo.criteria import norm_product, plan_by_criterion, random_rows, row_norm
from yopo.evidence import Evidence
from yopo.restore import restore_contract
from yopo.spectrum import spectra_of, spectral_distances

TOKENS = torch.arange(8 * 24).view(8, 24) * 11 % 60 + 3


def spectral(**changes):
    """Return a pruner that learns from the weights alone."""
    return PolicyPruner(**{"reward": "spectral", "restore": False, "episodes": 3} | changes)


def with_trained_rows(model, seed=0):
    """Give the rows of every FFN log-normal lengths, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            scale = (0.7 * torch.randn(layer.mlp.gate_proj.out_features, generator=generator)).exp()
            layer.mlp.gate_proj.weight.mul_(scale[:, None])
            layer.mlp.up_proj.weight.mul_(scale[:, None] ** 0.3)
            layer.mlp.down_proj.weight.mul_(scale**0.3)
    return model


def state(model):
    """Return all that pruning may change, comparable bit by bit."""
    return (
        {name: (tensor.shape, tensor.clone()) for name, tensor in model.state_dict().items()},
        model.config.to_dict(),
        {name: repr(module) for name, module in model.named_modules()},
        model.training,
        sorted(vars(model)),
        [parameter.grad for parameter in model.parameters()],
    )


def unchanged(model, before):
    after = state(model)
    assert after[1:] == before[1:]
    for name, (shape, tensor) in after[0].items():
        assert shape == before[0][name][0]
        assert torch.equal(tensor.view(torch.uint8), before[0][name][1].view(torch.uint8)), name
    return True


def mean_distance(model, plan):
    ffns = yopo.find_ffns(model)
    spectra = spectra_of([ffn.gate for ffn in ffns])
    return float(spectral_distances(spectra, [plan.kept[ffn.name][None] for ffn in ffns]).mean())


def test_a_fitted_pruner_prunes_in_place_to_an_ordinary_checkpoint(tiny_llama, logits, tmp_path):
    model = tiny_llama()
    pruner = PolicyPruner(ratio=0.3, evidence=TOKENS)
    assert pruner.fit(model) is pruner
    assert pruner.prune(model, ratio=0.3) is model
    assert model.config.intermediate_size == 56
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "call",
    [
        lambda pruner, model: pruner.plan(model),
        lambda pruner, model: pruner.prune(model, 0.3),
        lambda pruner, model: pruner.save_policy("policy"),
    ],
    ids=["plan", "prune", "save_policy"],
)
@pytest.mark.parametrize("make", [PolicyPruner, PolicyPruner.prunenet, PolicyPruner.lean])
def test_nothing_can_be_asked_of_a_pruner_before_it_has_a_policy(tiny_llama, make, call):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(NotFittedError) as caught:
        call(make(), model)
    assert str(caught.value) == (
        "this pruner has no policy yet. Call `fit(model)`, or load one with "
        "`PolicyPruner.from_policy(path)`."
    )
    assert unchanged(model, before)


@pytest.mark.parametrize("make", [PolicyPruner, PolicyPruner.prunenet])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 1.0),
        ("ratio", float("nan")),
        ("ratio", True),
        ("ratio", "0.3"),
        ("episodes", -1),
        ("episodes", 2.5),
        ("learning_rate", 0),
        ("discount", 1.5),
        ("seed", -1),
    ],
)
def test_a_bad_argument_is_refused_at_once_and_by_name(make, name, value):
    with pytest.raises(InvalidArgumentError, match=f"^`{name}` must .* got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 1),
        ("multiple_of", 0),
        ("reward", "money"),
        ("evidence", "wikitext"),
        ("evidence", torch.ones(2, 3)),
        ("evidence", torch.tensor([1, 2, 3])),
        ("evidence", torch.ones(0, 3, dtype=torch.int64)),
        ("evidence", None),
        ("restore", 1),
    ],
    ids=str,
)
def test_a_bad_argument_of_the_default_recipe_is_refused_at_once_and_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=f"^`{name}` "):
        PolicyPruner(**{name: value})


def test_hyperparameters_are_keywords():
    with pytest.raises(TypeError):
        PolicyPruner(0.3)
    with pytest.raises(TypeError):
        PolicyPruner.prunenet(0.3)


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_from_spectra_beats_its_start_and_random_rows_and_the_best_norm(tiny_llama, seed):
    model = tiny_llama(seed=seed, hidden_size=48, intermediate_size=160, num_hidden_layers=3)
    with_trained_rows(model, seed)
    pruner = spectral(ratio=0.3, episodes=20, seed=seed).fit(model)
    learned = mean_distance(model, pruner.plan(model))
    first, last = (sum(pruner.history[i].ks) / 3 for i in (0, -1))
    assert last < 0.6 * first
    assert learned < 0.6 * first
    by_chance = torch.tensor(
        [
            mean_distance(model, plan_by_criterion(model, 0.3, criterion=random_rows(i)))
            for i in range(20)
        ]
    )
    assert learned < by_chance.mean() - 5 * by_chance.std()
    one_value = 1 / 48 / 3  # the smallest step by which a mean distance can differ
    for criterion in (row_norm, norm_product):
        closed_form = mean_distance(model, plan_by_criterion(model, 0.3, criterion=criterion))
        assert learned <= closed_form + 1.01 * one_value


LEARNED = {
    "spectral": lambda: spectral(episodes=3),
    "prunenet": lambda: PolicyPruner.prunenet(episodes=3),
    "output": lambda: PolicyPruner(episodes=3, evidence=TOKENS),
    "divergence": lambda: PolicyPruner(episodes=3, evidence="weights", reward="divergence"),
}
EVERY = LEARNED | {"lean": PolicyPruner.lean}


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch):
    """Let predictions be compared on little text."""
    monkeypatch.setattr("yopo.divergence._LENGTH", 64)


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
class TestEveryMethodThatLearns:
    def test_it_keeps_a_history_of_every_layer_and_episode(self, make, tiny_llama):
        history = make().fit(tiny_llama()).history
        assert [episode.number for episode in history] == [0, 1, 2]
        for episode in history:
            for values in (episode.loss, episode.reward, episode.gradient_norm, episode.ks):
                assert len(values) == 2 or values == () == episode.ks
                assert np.isfinite(values).all()

    def test_ctrl_c_keeps_the_best_policy_so_far_and_warns(
        self, make, tiny_llama, monkeypatch, caplog
    ):
        expected, model = make(), tiny_llama()
        expected._recipe = copy.copy(expected._recipe)
        object.__setattr__(expected._recipe, "episodes", 2)
        expected.fit(model)
        interrupt_in_episode(monkeypatch, 2)
        pruner = make().fit(model)
        assert pruner.history == expected.history
        assert pruner.plan(model) == expected.plan(model)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert caplog.messages == [
            "Interrupted after 2 of 3 episodes; the best policy so far is kept."
        ]

    def test_ctrl_c_before_an_episode_is_done_goes_through(self, make, tiny_llama, monkeypatch):
        interrupt_in_episode(monkeypatch, 0)
        pruner = make()
        with pytest.raises(KeyboardInterrupt):
            pruner.fit(tiny_llama())
        with pytest.raises(NotFittedError):
            pruner.plan(tiny_llama())


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
class TestEveryMethod:
    def test_it_leaves_the_model_and_the_global_generators_as_they_were(self, make, tiny_llama):
        model = tiny_llama().train()
        before = state(model)
        hooks = [len(module._forward_hooks) for module in model.modules()]
        torch_state = torch.get_rng_state()
        numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
        pruner = make().fit(model)
        pruner.plan(model)
        assert unchanged(model, before)
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        pruner.prune(model)
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == numpy_state).all()
        assert random.getstate() == python_state

    def test_it_repeats_itself_to_the_bit(self, make, tiny_llama):
        runs = []
        for disturbance in range(2):
            torch.manual_seed(disturbance)
            model = tiny_llama()
            pruner = make().fit(model)
            plan = pruner.plan(model)
            weights = [parameter.clone() for parameter in pruner.prune(model).parameters()]
            runs.append((pruner.history, plan, weights))
        assert runs[0][0] == runs[1][0]
        assert runs[0][1] == runs[1][1]
        assert all(torch.equal(*pair) for pair in zip(runs[0][2], runs[1][2], strict=True))

    def test_fitting_again_forgets_what_was_learned_before(self, make, tiny_llama):
        other = make().fit(tiny_llama(seed=1))
        again = make().fit(tiny_llama(seed=0)).fit(tiny_llama(seed=1))
        assert again.history == other.history
        assert again.plan(tiny_llama()) == other.plan(tiny_llama())

    def test_what_it_plans_is_what_it_prunes(self, make, tiny_llama):
        model = tiny_llama()
        pruner = make().fit(model)
        plan = pruner.plan(model, 0.4)
        gates = [layer.mlp.gate_proj.weight.detach().clone() for layer in model.model.layers]
        pruner.prune(model, 0.4)
        for layer, gate, kept in zip(model.model.layers, gates, plan.kept.values(), strict=True):
            assert torch.equal(layer.mlp.gate_proj.weight, gate[kept])

    def test_rows_of_zeros_do_no_harm(self, make, tiny_llama, logits):
        model = tiny_llama()
        with torch.no_grad():
            for matrix in model.model.layers[0].mlp.children():
                if isinstance(matrix, torch.nn.Linear):
                    (matrix.weight if matrix.in_features == 32 else matrix.weight.T)[::3] = 0
            for matrix in model.model.layers[1].mlp.parameters():
                matrix.zero_()
        assert torch.isfinite(logits(make().fit(model).prune(model))).all()

    def test_every_ratio_works_from_one_fit(self, make, tiny_llama, logits):
        pruner = make().fit(tiny_llama())
        for ratio in (0.0, 0.05, 0.3, 0.5, 0.9, 0.98):
            model = pruner.prune(tiny_llama(), ratio)
            assert abs(1 - model.config.intermediate_size / 80 - ratio) <= 1 / 80
            assert torch.isfinite(logits(model)).all()


def interrupt_in_episode(monkeypatch, number):
    """Raise what Ctrl-C raises when an episode is all but done."""
    from yopo import published, reinforce

    record = reinforce.Episode

    def interrupted(*args, **kwargs):
        episode = record(*args, **kwargs)
        if episode.number == number:
            raise KeyboardInterrupt
        return episode

    for module in (published, reinforce):
        monkeypatch.setattr(module, "Episode", interrupted)


def test_one_policy_serves_every_ratio_and_models_of_other_shapes(tiny_llama, tiny_opt, tmp_path):
    pruner = spectral().fit(with_trained_rows(tiny_llama()))
    pruner.save_policy(tmp_path / "policy")
    loaded = PolicyPruner.from_policy(tmp_path / "policy")
    for ratio in (0.0, 0.2, 0.5, 0.75):
        for sizes in ({}, {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 160}):
            model = tiny_opt(**sizes)
            plan = pruner.plan(model, ratio)
            assert plan.ratio_reached == pytest.approx(ratio, abs=0.011)
            assert loaded.plan(model, ratio) == plan
            assert loaded.plan(model, ratio, sample=True) == pruner.plan(model, ratio, sample=True)


def test_a_loaded_policy_prunes_to_the_same_weights(tiny_llama, tmp_path):
    pruner = PolicyPruner(evidence="weights").fit(tiny_llama())
    pruner.save_policy(tmp_path)
    one, same = pruner.prune(tiny_llama()), PolicyPruner.from_policy(tmp_path).prune(tiny_llama())
    for first, second in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_policy_fitted_on_tokens_asks_for_them_when_it_is_loaded(tiny_llama, tmp_path):
    pruner = PolicyPruner(evidence=TOKENS).fit(tiny_llama())
    pruner.save_policy(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"pass them as `evidence`"):
        PolicyPruner.from_policy(tmp_path)
    loaded = PolicyPruner.from_policy(tmp_path, evidence=TOKENS)
    assert loaded.plan(tiny_llama()) == pruner.plan(tiny_llama())


def test_the_default_prefers_and_the_published_method_draws(tiny_llama):
    model = tiny_llama()
    for make, draws in ((spectral, False), (PolicyPruner.prunenet, True)):
        plans = [make(episodes=1, seed=seed).fit(model) for seed in (0, 0, 1)]
        default, drawn, preferred = (
            [pruner.plan(model, sample=sample) for pruner in plans]
            for sample in (None, True, False)
        )
        assert default == (drawn if draws else preferred)
        assert drawn[0] == drawn[1] != drawn[2]
        assert preferred[0] == preferred[1]
        assert drawn[0] != preferred[0]


def test_the_published_method_keeps_exactly_the_published_widths(tiny_opt):
    pruner = PolicyPruner.prunenet(episodes=1).fit(tiny_opt())
    for ratio in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5):
        assert set(pruner.plan(tiny_opt(), ratio).widths.values()) == {int((1 - ratio) * 96)}


def test_the_published_policy_refuses_another_width_and_names_the_way_out(tiny_llama, tiny_opt):
    pruner = PolicyPruner.prunenet(episodes=1).fit(tiny_llama())
    model = tiny_opt(hidden_size=48, word_embed_proj_dim=48)
    before = state(model)
    for call in (pruner.plan, pruner.prune):
        with pytest.raises(PolicyMismatchError) as caught:
            call(model, 0.3)
        assert str(caught.value) == (
            "this policy scores rows of width 32, but `model.decoder.layers.0` has width 48. "
            "Fit a new policy on this model."
        )
    assert unchanged(model, before)


def test_the_published_method_does_not_fit_a_model_of_two_widths():
    halves = [
        BertConfig(
            vocab_size=64,
            hidden_size=size,
            num_attention_heads=4,
            num_hidden_layers=1,
            intermediate_size=48,
        )
        for size in (32, 16)
    ]
    model = EncoderDecoderModel(config=EncoderDecoderConfig.from_encoder_decoder_configs(*halves))
    with pytest.raises(
        PolicyMismatchError, match=r"has width 32 and .* 16. Use `PolicyPruner\(\)`"
    ):
        PolicyPruner.prunenet().fit(model)


def test_the_published_attention_variant_warns_and_works(tiny_llama, logits, caplog):
    pruner = PolicyPruner.prunenet(episodes=1, attention=True)
    assert "harms a model far more than it saves" in caplog.text
    model = pruner.fit(tiny_llama()).prune(tiny_llama())
    assert torch.isfinite(logits(model)).all()


def test_every_call_that_fails_leaves_the_model_as_it_was(tiny_llama, tmp_path):
    model = tiny_llama()
    pruner = PolicyPruner(evidence=TOKENS).fit(model)
    before = state(model)
    for error, arguments in (
        (InvalidArgumentError, {"ratio": 1.0}),
        (InvalidArgumentError, {"ratio": float("nan")}),
        (InvalidArgumentError, {"ratio": True}),
        (InvalidArgumentError, {"ratio": "0.3"}),
        (InvalidArgumentError, {"ratio": 0.999}),
        (InvalidArgumentError, {"ratio": 0.3, "layers": [7]}),
        (InvalidArgumentError, {"ratio": 0.3, "layers": "nothing.*"}),
    ):
        for call in (pruner.plan, pruner.prune):
            with pytest.raises(error):
                call(model, **arguments)
            assert unchanged(model, before)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    before = state(model)
    for call in (pruner.plan, pruner.prune, pruner.fit):
        with pytest.raises(UnsupportedModelError, match=r"has weights that are NaN or infinite"):
            call(model)
        assert unchanged(model, before)


def test_a_model_that_writes_nan_leaves_with_advice(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"`evidence='weights'`"):
        PolicyPruner().fit(model).prune(model)
    assert unchanged(model, before)


def test_a_ratio_that_keeps_nothing_is_told_when_fitting(tiny_llama):
    with pytest.raises(InvalidArgumentError) as caught:
        spectral(ratio=0.99, multiple_of=1).fit(tiny_llama(intermediate_size=64))
    assert str(caught.value) == "`ratio=0.99` keeps 0 of 64 rows; use at most 0.98."


def test_the_ratio_of_training_is_the_default(tiny_llama):
    pruner = spectral(ratio=0.45).fit(tiny_llama())
    assert pruner.plan(tiny_llama()) == pruner.plan(tiny_llama(), 0.45)
    assert pruner.plan(tiny_llama()).ratio == 0.45


def test_widths_are_multiples_of_what_was_asked(tiny_llama):
    pruner = spectral(multiple_of=32).fit(tiny_llama(intermediate_size=160))
    model = pruner.prune(tiny_llama(intermediate_size=160), 0.3)
    assert model.config.intermediate_size == 128
    with pytest.raises(InvalidArgumentError, match=r"at most the width 24, got 32"):
        pruner.plan(tiny_llama(intermediate_size=24))


def test_only_the_layers_that_are_asked_for_are_cut(tiny_llama, logits, tmp_path):
    pruner = spectral().fit(tiny_llama(num_hidden_layers=3))
    model = tiny_llama(num_hidden_layers=3)
    plan = pruner.plan(model, 0.3, layers=[1])
    assert list(plan.widths.values()) == [80, 56, 80]
    whole = pruner.plan(model, 0.3)
    assert torch.equal(plan.kept["model.layers.1.mlp"], whole.kept["model.layers.1.mlp"])
    pruner.prune(model, 0.3, layers="model.layers.1.*")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [80, 56, 80]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(yopo.load(tmp_path)), logits(model))


def test_restoring_brings_the_output_nearer_to_that_of_the_dense_model(tiny_llama):
    dense = with_trained_rows(tiny_llama())
    errors = []
    for restore in (True, False):
        model = copy.deepcopy(dense)
        PolicyPruner(evidence=TOKENS, restore=restore).fit(model).prune(model, 0.4)
        with torch.no_grad():
            change = model(TOKENS).logits - dense(TOKENS).logits
        errors.append(float(change.square().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_by_default_the_model_writes_its_own_evidence(tiny_llama, logits, monkeypatch):
    defaults = yopo.writing.write_tokens.__kwdefaults__
    monkeypatch.setitem(defaults, "sequences", 8)
    monkeypatch.setitem(defaults, "length", 16)
    model = tiny_llama().train()
    model.generation_config.max_new_tokens = 3
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    one = PolicyPruner().fit(model).prune(model, 0.3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert model.training
    assert model.generation_config.max_new_tokens == 3
    same = PolicyPruner().fit(tiny_llama()).prune(tiny_llama(), 0.3)
    assert torch.equal(logits(one.eval()), logits(same))


def test_evidence_of_a_model_whose_weights_have_changed_is_gathered_anew(tiny_llama):
    model = tiny_llama()
    pruner = PolicyPruner(evidence=TOKENS).fit(model)
    first = pruner.plan(model)
    for parameter, new in zip(model.parameters(), tiny_llama(seed=5).parameters(), strict=True):
        parameter.data.copy_(new.data)
    assert first != pruner.plan(model) == PolicyPruner(evidence=TOKENS).fit(model).plan(model)


def test_progress_is_shown_where_the_switch_of_transformers_is_on_and_nothing_is_printed(
    tiny_llama, capfd
):
    switch = transformers.utils.logging
    was_on = switch.is_progress_bar_enabled()
    try:
        switch.enable_progress_bar()
        spectral().fit(tiny_llama())
        out, err = capfd.readouterr()
        assert out == ""
        assert "fit" in err
        switch.disable_progress_bar()
        spectral().fit(tiny_llama())
        assert capfd.readouterr() == ("", "")
    finally:
        (switch.enable_progress_bar if was_on else switch.disable_progress_bar)()


def test_a_policy_that_cannot_be_written_or_read_says_where(tiny_llama, tmp_path):
    pruner = spectral().fit(tiny_llama())
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyFileError, match=r"cannot write the policy to `.*file/policy`"):
        pruner.save_policy(tmp_path / "file" / "policy")
    with pytest.raises(PolicyFileError, match=r"holds no policy: `policy_config\.json` is missing"):
        PolicyPruner.from_policy(tmp_path / "nowhere")


def adaptive(**changes):
    return PolicyPruner(**{"allocation": "adaptive", "evidence": TOKENS} | changes)


def with_layers_of_unlike_importance(model):
    """Let the last FFN add next to nothing, and the first most."""
    with torch.no_grad():
        ffns = yopo.find_ffns(model)
        for depth, ffn in enumerate(ffns):
            ffn.contract.parameter.mul_(0.2**depth)
    return model


KINDS = pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "qwen2_moe", "gpt_oss", "t5"])


@KINDS
@pytest.mark.parametrize("evidence", ["auto", "weights"])
def test_an_adaptive_cut_is_saved_and_loaded_as_it_is_in_memory(
    tiny_model, logits, tmp_path, kind, evidence, monkeypatch
):
    monkeypatch.setitem(yopo.writing.write_tokens.__kwdefaults__, "sequences", 8)
    monkeypatch.setitem(yopo.writing.write_tokens.__kwdefaults__, "length", 16)
    model = tiny_model(kind, **({"decoder_start_token_id": 0} if kind == "t5" else {}))
    with_layers_of_unlike_importance(model)
    pruner = adaptive(evidence=evidence).fit(model)
    plan = pruner.plan(model, 0.4)
    assert abs(plan.ratio_reached - 0.4) < 0.05
    assert len({plan.widths[name] / plan.rows[name] for name in plan.rows}) > 1
    pruner.prune(model, 0.4)
    assert {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)} == plan.widths
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(yopo.load(tmp_path)), logits(model))


def test_an_adaptive_cut_loses_less_than_a_uniform_one(tiny_llama):
    dense = with_layers_of_unlike_importance(with_trained_rows(tiny_llama(num_hidden_layers=3)))
    errors = []
    for allocation in ("adaptive", "uniform"):
        model = copy.deepcopy(dense)
        pruner = PolicyPruner(evidence=TOKENS, allocation=allocation, multiple_of=1).fit(model)
        assert pruner.plan(model, 0.4).ratio_reached == pytest.approx(0.4, abs=0.01)
        pruner.prune(model, 0.4)
        with torch.no_grad():
            errors.append(float((model(TOKENS).logits - dense(TOKENS).logits).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_an_adaptive_cut_can_be_cut_again(tiny_llama, logits, tmp_path):
    model = with_layers_of_unlike_importance(tiny_llama())
    pruner = adaptive().fit(model)
    pruner.prune(pruner.prune(model, 0.3), 0.3)
    model.save_pretrained(tmp_path / "adaptive")
    assert torch.equal(logits(yopo.load(tmp_path / "adaptive")), logits(model))
    PolicyPruner(evidence=TOKENS).fit(model).prune(model, 0.3)
    model.save_pretrained(tmp_path / "uniform")
    assert torch.equal(logits(yopo.load(tmp_path / "uniform")), logits(model))


def test_adaptive_widths_that_come_out_equal_need_no_yopo(tiny_llama, logits, tmp_path, caplog):
    model = tiny_llama(num_hidden_layers=1)
    adaptive().fit(model).prune(model, 0.3)
    model.save_pretrained(tmp_path)
    assert caplog.records == []
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_layers_can_be_cut_one_after_another(tiny_llama, logits, tmp_path):
    model = tiny_llama()
    pruner = PolicyPruner(evidence=TOKENS).fit(model)
    for layer in (0, 1):
        pruner.prune(model, 0.3, layers=[layer])
    assert [ffn.rows for ffn in yopo.find_ffns(model)] == [56, 56]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(yopo.load(tmp_path)), logits(model))


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_a_size_is_met_whatever_the_allocation(tiny_llama, tmp_path, allocation):
    pruner = adaptive(allocation=allocation, multiple_of=1).fit(tiny_llama())
    total = sum(parameter.numel() for parameter in tiny_llama().parameters())
    per_row = 3 * 32
    for arguments, limit in (
        ({"parameters": 0.8 * total}, 0.8 * total),
        ({"bytes": 3.2 * total}, 0.8 * total),
        ({"ratio": 0.2, "ratio_of": "model"}, 0.8 * total),
    ):
        plan = pruner.plan(tiny_llama(), **arguments)
        model = pruner.prune(tiny_llama(), **arguments)
        left = sum(parameter.numel() for parameter in model.parameters())
        assert limit - 2 * per_row < left <= limit
        removed = total - left
        assert plan.ratio_reached == pytest.approx(removed / per_row / 160)
        assert plan.ratio == pytest.approx(plan.ratio_reached, abs=0.02)


def test_with_layers_only_those_shrink_to_meet_a_size(tiny_llama):
    for allocation in ("uniform", "adaptive"):
        pruner = adaptive(allocation=allocation, multiple_of=1).fit(tiny_llama())
        total = sum(parameter.numel() for parameter in tiny_llama().parameters())
        plan = pruner.plan(tiny_llama(), parameters=total - 30 * 96, layers=[1])
        assert list(plan.widths.values()) == [80, 50]
        with pytest.raises(InvalidArgumentError, match=r"at least .* stay"):
            pruner.plan(tiny_llama(), parameters=total - 90 * 96, layers=[1])


def test_a_size_and_a_ratio_at_once_are_refused(tiny_llama):
    model = tiny_llama()
    pruner = spectral().fit(model)
    before = state(model)
    for call in (pruner.plan, pruner.prune):
        with pytest.raises(InvalidArgumentError, match=r"got `ratio` and `bytes`"):
            call(model, 0.3, bytes=1000)
    assert unchanged(model, before)


def test_adaptive_allocation_goes_with_any_reward_but_the_spectral():
    PolicyPruner(reward="divergence", allocation="adaptive")
    for make in (
        lambda: PolicyPruner(reward="spectral", allocation="adaptive"),
        lambda: PolicyPruner(reward="spectral", restore=False, allocation="adaptive"),
    ):
        with pytest.raises(InvalidArgumentError, match=r"spectral reward knows nothing"):
            make()
    with pytest.raises(InvalidArgumentError, match=r"`allocation` must be .* got 'even'"):
        PolicyPruner(allocation="even")


def test_the_allocation_is_saved_with_the_policy_and_can_be_changed(tiny_llama, tmp_path):
    model = with_layers_of_unlike_importance(tiny_llama())
    pruner = adaptive(evidence="weights").fit(model)
    pruner.save_policy(tmp_path / "policy")
    assert PolicyPruner.from_policy(tmp_path / "policy").plan(model) == pruner.plan(model)
    uniform = PolicyPruner.from_policy(tmp_path / "policy", allocation="uniform")
    assert len(set(uniform.plan(model).widths.values())) == 1
    PolicyPruner.prunenet(episodes=1).fit(model).save_policy(tmp_path / "published")
    with pytest.raises(InvalidArgumentError, match=r"`allocation=\"adaptive\"` weighs"):
        PolicyPruner.from_policy(tmp_path / "published", allocation="adaptive")


def test_only_the_layers_to_be_cut_are_asked_for_moments(tiny_llama, monkeypatch):
    asked = []
    real = yopo.evidence.Evidence.moments

    def moments(self, model, ffns):
        asked.append([ffn.name for ffn in ffns])
        return real(self, model, ffns)

    monkeypatch.setattr(yopo.evidence.Evidence, "moments", moments)
    model = tiny_llama(num_hidden_layers=3)
    for allocation, times in (("uniform", 1), ("adaptive", 2)):
        pruner = adaptive(allocation=allocation).fit(model)
        pruner.plan(model, 0.3, layers=[1])
        pruner.prune(copy.deepcopy(model), 0.3, layers=[2])
        assert asked[0] == ["model.layers.1.mlp"]
        assert asked[-times:] == [["model.layers.2.mlp"]] * times
        asked.clear()
        assert pruner.plan(model, 0.0).ratio_reached == 0.0
        asked.clear()


@pytest.mark.parametrize("ratio", [np.float32(0.3), np.float64(0.3), torch.tensor(0.3).item()])
def test_any_kind_of_number_is_a_ratio(tiny_llama, tmp_path, ratio):
    pruner = spectral(ratio=ratio).fit(tiny_llama())
    pruner.save_policy(tmp_path / "policy")
    pruner.plan(tiny_llama(), ratio).save(tmp_path / "plan")
    assert set(pruner.plan(tiny_llama()).widths.values()) == {56}


def test_a_reward_of_ones_own_gets_the_model_and_the_draws(tiny_llama, tmp_path):
    model = tiny_llama()
    seen = []

    def reward(given, kept):
        seen.append((given is model, {name: rows.shape for name, rows in kept.items()}))
        return sum(rows.double().mean(dim=1) for rows in kept.values())

    pruner = PolicyPruner(reward=reward, episodes=2, samples=3, multiple_of=1).fit(model)
    shapes = {f"model.layers.{layer}.mlp": (4, 56) for layer in range(2)}
    assert seen[0] == (True, shapes)
    assert [len(episode.reward) for episode in pruner.history] == [2, 2]
    pruner.save_policy(tmp_path / "policy")
    again = PolicyPruner.from_policy(tmp_path / "policy")
    assert torch.equal(
        again.plan(model).kept["model.layers.0.mlp"], pruner.plan(model).kept["model.layers.0.mlp"]
    )
    with pytest.raises(InvalidArgumentError, match="which its files do not hold"):
        again.fit(model)


@pytest.mark.parametrize("reward", ["custom", "nonsense", None, 3])
def test_what_is_no_reward_is_refused_by_name(reward):
    with pytest.raises(InvalidArgumentError, match="`reward`"):
        PolicyPruner(reward=reward)


def experts_in_one_matrix():
    """Build a DBRX, whose experts lie one after another."""
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    return DbrxForCausalLM(config)


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen2_moe", "gpt_oss", "dbrx"])
def test_what_is_restored_lands_where_it_belongs(tiny_model, kind):
    model = experts_in_one_matrix() if kind == "dbrx" else tiny_model(kind)
    evidence = Evidence(TOKENS, seed=0)
    pruner = PolicyPruner(evidence=TOKENS, multiple_of=8).fit(model)
    plan = pruner.plan(model, 0.5)
    expected = {
        ffn.name: restore_contract(
            moments, ffn.contract_weight(), ffn.contract_bias(), plan.kept[ffn.name],
            dtype=torch.float32,
        )
        for ffn, moments in evidence.moments(model, yopo.find_ffns(model))
    }  # fmt: skip
    pruner.prune(model, 0.5)
    for ffn in yopo.find_ffns(model):
        torch.testing.assert_close(ffn.contract_weight(), expected[ffn.name].contract_KD)


def test_the_lean_recipe_learns_nothing_and_keeps_nothing(tiny_llama, logits, tmp_path):
    pruner = PolicyPruner.lean(seed=3).fit(tiny_llama())
    assert pruner.history == []
    pruner.save_policy(tmp_path)
    loaded = PolicyPruner.from_policy(tmp_path, evidence="weights")
    other = PolicyPruner.lean(seed=4).fit(tiny_llama())
    one, same, unlike = (each.prune(tiny_llama()) for each in (pruner, loaded, other))
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(unlike))
    assert loaded.plan(tiny_llama()) == pruner.plan(tiny_llama())


@pytest.mark.parametrize("kind", ["llama", "opt", "phi3", "gpt2", "qwen2_moe", "gpt_oss", "t5"])
def test_the_lean_recipe_cuts_and_restores_every_layout(tiny_model, logits, tmp_path, kind):
    model = tiny_model(kind)
    plan = PolicyPruner.lean().fit(model).plan(model, 0.4)
    PolicyPruner.lean().fit(model).prune(model, 0.4)
    assert {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)} == plan.widths
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_the_lean_recipe_restores_unless_told_otherwise(tiny_llama):
    pruned = {}
    for restore in (True, False):
        model = tiny_llama()
        pruner = PolicyPruner.lean(restore=restore).fit(model)
        kept = pruner.plan(model).kept["model.layers.1.mlp"]
        columns = model.model.layers[1].mlp.down_proj.weight.detach()[:, kept]
        mlp = pruner.prune(model).model.layers[1].mlp
        pruned[restore] = mlp.up_proj.weight
        assert torch.equal(mlp.down_proj.weight, columns) != restore
    assert torch.equal(pruned[True], pruned[False])


@pytest.mark.parametrize(
    ("name", "value"),
    [("ratio", 1.0), ("ratio", "0.3"), ("multiple_of", 0), ("seed", -1), ("restore", 1)],
)
def test_a_bad_argument_of_the_lean_recipe_is_refused_at_once_and_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=f"^`{name}` must .*got {value!r}"):
        PolicyPruner.lean(**{name: value})


def test_the_lean_recipe_has_no_policy_to_draw_from(tiny_llama, monkeypatch):
    model = tiny_llama()
    pruner = PolicyPruner.lean().fit(model)
    assert pruner.plan(model, sample=False) == pruner.plan(model)
    before = state(model)
    monkeypatch.setattr("yopo.pruner.find_ffns", None)  # nothing is looked at
    for call in (pruner.plan, pruner.prune):
        with pytest.raises(InvalidArgumentError, match=r"^`sample=True` draws rows from a policy"):
            call(model, sample=True)
    assert unchanged(model, before)


def test_the_lean_recipe_goes_with_no_other_evidence_and_no_adaptive_widths(tiny_llama, tmp_path):
    PolicyPruner.lean().fit(tiny_llama()).save_policy(tmp_path)
    for evidence, told in (("self", "'self'"), (TOKENS, "'tokens'")):
        with pytest.raises(InvalidArgumentError, match=f"^`evidence` must be .*got {told}"):
            PolicyPruner.from_policy(tmp_path, evidence=evidence)
    with pytest.raises(InvalidArgumentError, match=r'^`allocation="adaptive"` compares'):
        PolicyPruner.from_policy(tmp_path, allocation="adaptive")


def test_the_lean_recipe_decides_on_a_layer_alone_as_among_the_others(tiny_llama):
    model = tiny_llama(num_hidden_layers=3)
    pruner = PolicyPruner.lean().fit(model)
    whole, alone = pruner.plan(model), pruner.plan(model, layers=[1])
    assert torch.equal(whole.kept["model.layers.1.mlp"], alone.kept["model.layers.1.mlp"])
    assert list(alone.widths.values()) == [80, 56, 80]


def test_an_activation_that_the_lean_recipe_does_not_find_is_named(tiny_llama):
    model = tiny_llama()
    del model.model.layers[1].mlp.act_fn
    pruner = PolicyPruner.lean().fit(model)
    with pytest.raises(UnsupportedModelError, match=r"activation of `model.layers.1.mlp`"):
        pruner.prune(model)
    assert model.model.layers[0].mlp.up_proj.out_features == 80
