import copy
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pytest
import torch
from peft.tuners.lora.layer import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import recovery
import yopo
from conftest import assert_same, build
from yopo import (
    InvalidArgumentError,
    PolicyFileError,
    RecoverySettings,
    UnsupportedModelError,
    YopoError,
)
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text
from yopo.recovery.adapter import Trained
from yopo.recovery.folder import BEST, RecoveryFolder, seal
from yopo.recovery.losses import distillation_loss, next_token_loss
from yopo.recovery.portions import portions_of
from yopo.recovery.schedule import Schedule
from yopo.recovery.targets import find_places
from yopo.recovery.texts import read_windows
from yopo.recovery.trainer import Best, RecoveryTrainer

SMALL = RecoverySettings(window=32, batch=4, epochs=1, written=36, learning_rate=5e-3)
TOKENS = torch.arange(640).view(20, 32) * 7 % 60 + 3


@pytest.fixture(scope="module")
def dense():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def story():
    return write_text(1, 20_000)


@pytest.fixture(scope="module")
def held_out(tokenizer):
    text = write_text(HELD_OUT_SEED, 10_000)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@pytest.fixture(scope="module")
def windows(tokenizer, story):
    ids = tokenizer(story, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[: 36 * 32]).view(36, 32)


@pytest.fixture
def pruned(dense):
    """Return the embedded model without 0.3 of its rows, drawn at random: much to win back."""
    return cut(copy.deepcopy(dense))


def cut(model, ratio=0.3):
    plan = yopo.plan_by_criterion(model, ratio, criterion=yopo.criteria.random_rows(0))
    yopo.apply_plan(model, plan)
    return model


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def loss_of(model, tokens):
    return math.log(yopo.perplexity(model, tokens, window=32))


# Losses


def test_the_distillation_loss_is_the_divergence_of_the_students_predictions_from_the_teachers():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator)
    expected = 0.0
    for b in range(3):
        for w in range(4):
            p, q = ([math.exp(x) for x in logits[b, w]] for logits in (teacher, student))
            p, q = ([x / sum(chances) for x in chances] for chances in (p, q))
            expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 12
    assert float(distillation_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_the_next_token_loss_is_the_logarithm_of_perplexity(dense, held_out):
    windows = held_out[:128].view(4, 32)
    with torch.no_grad():
        loss = next_token_loss(dense(input_ids=windows).logits, windows)
    assert float(loss) == pytest.approx(loss_of(dense, held_out[:128]), rel=1e-5)


# Settings and schedule


def test_the_papers_settings_are_the_default_and_the_published_ones_have_a_name():
    paper, published = RecoverySettings(), RecoverySettings.published()
    assert (paper.rank, paper.samples) == (8, 8000)
    assert (published.rank, published.alpha, published.window) == (32, 10, 1024)
    assert (published.batch, published.epochs, published.samples) == (3, 1, 8000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("samples", 1.5),
        ("window", 1),
        ("batch", True),
        ("epochs", 0),
        ("patience", 0),
        ("micro_batch", 0),
        ("learning_rate", 0.0),
        ("alpha", math.nan),
        ("dropout", 1.0),
        ("warmup", -1),
    ],
)
def test_settings_outside_their_range_are_refused(name, value):
    with pytest.raises(InvalidArgumentError, match=f"`{name}` must be"):
        RecoverySettings(**{name: value})


def test_a_batch_is_split_so_that_no_forward_pass_has_more_logits_than_a_gigabyte():
    settings = RecoverySettings(batch=12, epochs=2, warmup=0.1)
    schedule = Schedule.of(settings, windows=30, length=1024, vocabulary=60_000)
    assert schedule.micro * 1024 * 60_000 <= 2**28 < 6 * 1024 * 60_000
    assert (schedule.windows, schedule.micro, schedule.passes) == (24, 4, 3)
    assert (schedule.steps, schedule.every, schedule.warmup) == (4, 1, 1)


def test_the_benchmark_tells_how_many_windows_are_seen(tiny_llama):
    seen = []
    for written in (recovery.WINDOWS, 4 * recovery.WINDOWS):
        settings, tokens = RecoverySettings(window=2), torch.zeros(written, 2, dtype=torch.int64)
        texts, _ = portions_of(tiny_llama(), tokens, None, None, settings, None, None, {"seed": 0})
        length = len(texts["text"])
        seen.append(Schedule.of(settings, windows=length, length=2, vocabulary=64).windows)
    assert f"{seen[0]} windows of 256 tokens, each seen twice" in recovery._page([])
    assert f'times as much" is {seen[1]} of them' in recovery._page([])


# Targets


@pytest.mark.parametrize(
    ("kind", "attention", "ffn", "parameters"),
    [
        ("llama", 8, 6, 0),
        ("opt", 8, 4, 0),
        ("phi", 8, 4, 0),
        ("phi3", 4, 4, 0),
        ("gpt2", 4, 4, 0),
        ("qwen2_moe", 8, 6, 4),
        ("gpt_oss", 8, 0, 4),
    ],
)
def test_adapters_go_on_the_projections_of_attention_and_ffns_and_on_nothing_else(
    kind, attention, ffn, parameters
):
    model = build(kind)
    ffns = yopo.find_ffns(model)
    found = {name: find_places(model, ffns, name) for name in ("attention", "ffn", "both")}
    assert len(found["attention"].modules) == attention
    assert found["attention"].parameters == ()
    assert (len(found["ffn"].modules), len(found["ffn"].parameters)) == (ffn, parameters)
    assert len(found["both"].modules) == attention + ffn
    assert not any("gate." in f"{n}." and "proj" not in n for n in found["both"].modules)


# Text


def test_strings_files_data_sets_and_tokens_give_the_same_windows(
    dense, tokenizer, story, tmp_path
):
    from datasets import Dataset

    halves = [story[:10_000], "  ", story[10_000:]]
    joined = f"{halves[0]}\n\n{halves[2]}"
    (tmp_path / "story.txt").write_text(joined, encoding="utf-8")
    rows = Dataset.from_dict({"text": halves})
    ids = [tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in halves[::2]]
    between = tokenizer("\n\n", add_special_tokens=False).input_ids
    expected = torch.tensor(ids[0] + between + ids[1])[: 50 * 32].view(50, 32)
    for data in (halves, rows, rows.to_iterable_dataset(), expected, expected.flatten()):
        found = read_windows(data, "data", tokenizer=tokenizer, model=dense, most=50, length=32)
        assert torch.equal(found, expected)
    found = read_windows(
        tmp_path / "story.txt", "data", tokenizer=tokenizer, model=dense, most=50, length=32
    )
    assert torch.equal(found[:40], expected[:40])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "`data` holds no text"),
        (["", " \n"], "`data` holds no text"),
        (["Once."], "fewer than one window of 32"),
        ("no-such-file.txt", "is no file"),
        ("Tom had a red ball. " * 300, r"is no file. For a text in memory pass `\[text\]`"),
        (3, "must be a file, strings, a data set"),
        ([3], "must hold strings"),
        ([{"story": "a"}], r"got the columns \['story'\]"),
        (SimpleNamespace(column_names={"train": ["text"]}), r"pass one of them, as `data\['train'"),
        (torch.zeros(2, 3), "must be int64 ids"),
        (torch.full((4, 32), 5000), "the tokenizer is not the model's own"),
        (torch.arange(40), "holds one window of 32 tokens, and needs two"),
    ],
)
def test_text_that_cannot_be_learned_from_is_refused_and_nothing_changes(pruned, data, told):
    before = weights_of(pruned)
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.recover(pruned, data, settings=SMALL)
    assert_same(weights_of(pruned), before)


@pytest.mark.parametrize("samples", [1, 8, 9, 28, 89, 700])
def test_no_more_windows_are_learned_from_than_samples_allows(tiny_llama, samples):
    settings, tokens = replace(SMALL, window=4, samples=samples), torch.arange(4000) % 60
    given = {"teacher": None, "tokenizer": None, "output": None, "job": {"seed": 0}}
    texts, _ = portions_of(tiny_llama(), tokens, settings=settings, validation=None, **given)
    assert len(texts["text"]) == samples
    assert len(texts["validation"]) == max(1, min(64, samples // 9))
    validation = tokens[:400]
    texts, _ = portions_of(tiny_llama(), tokens, settings=settings, validation=validation, **given)
    assert (len(texts["text"]), len(texts["validation"])) == (samples, 64)


def test_a_file_without_text_is_refused(pruned, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="holds no text"):
        yopo.recover(pruned, tmp_path / "empty.txt", settings=SMALL)


class Shuffled:
    """A tokenizer with as many tokens as the model's own, each meaning another."""

    def __init__(self, own):
        self._own, self._order = own, torch.randperm(len(own)).tolist()

    def __len__(self):
        return len(self._own)

    def __call__(self, text, **options):
        ids = self._own(text, **options)["input_ids"]
        return {"input_ids": [self._order[i] for i in ids]}


def test_a_tokenizer_of_another_model_is_refused_or_warned_of(
    pruned, dense, tokenizer, story, caplog
):
    shuffled = Shuffled(tokenizer)
    with pytest.raises(InvalidArgumentError, match="worse than chance"):
        yopo.recover(pruned, [story], teacher=dense, tokenizer=shuffled, settings=SMALL)
    yopo.recover(pruned, [story[:3000]], tokenizer=shuffled, settings=SMALL)
    assert "Is `tokenizer` the model's own?" in caplog.text


def test_a_tokenizer_that_is_nowhere_to_be_found_is_asked_for(story):
    with pytest.raises(InvalidArgumentError, match="`tokenizer` is needed for the text of `data`"):
        yopo.recover(build("llama"), [story], settings=SMALL)


# The call


def test_the_dense_model_teaches_the_pruned_one_with_no_data_at_all(pruned, dense, held_out):
    lost = loss_of(pruned, held_out)
    before = weights_of(dense)
    found = yopo.recover(pruned, teacher=dense, settings=SMALL)
    assert found is pruned
    assert loss_of(pruned, held_out) < lost - 0.05
    assert_same(weights_of(dense), before)


@pytest.mark.parametrize("taught", [False, True])
def test_a_text_wins_back_what_was_lost_with_a_teacher_and_without(
    pruned, dense, story, held_out, taught
):
    lost = loss_of(pruned, held_out)
    teacher = dense if taught else None
    yopo.recover(pruned, [story], teacher=teacher, settings=replace(SMALL, samples=40))
    assert loss_of(pruned, held_out) < lost - 0.05


def test_what_is_merged_is_an_ordinary_checkpoint(pruned, story, tmp_path, logits):
    yopo.recover(pruned, [story[:5000]], settings=SMALL)
    pruned.save_pretrained(tmp_path)
    for loaded in (yopo.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded.eval()), logits(pruned.eval()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe", "gpt_oss"])
def test_an_adapter_left_on_the_model_predicts_what_a_merged_one_does(kind, logits):
    merged, base = build(kind), build(kind)
    settings = replace(SMALL, epochs=3)
    assert yopo.recover(merged, TOKENS, settings=settings) is merged
    adapted = yopo.recover(base, TOKENS, settings=settings, merge=False)
    assert type(adapted).__name__ == "PeftModelForCausalLM"
    assert not torch.equal(logits(merged), logits(build(kind)))
    assert torch.allclose(logits(adapted), logits(merged), atol=2e-4)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("targets", ["attention", "ffn"])
def test_only_the_matrices_asked_for_change(targets):
    model = build("llama")
    before = weights_of(model)
    yopo.recover(model, TOKENS, targets=targets, settings=SMALL)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = "self_attn" if targets == "attention" else "mlp"
    assert changed == {name for name in before if inside in name and "proj" in name}


def test_a_model_of_unequal_widths_is_recovered_too(dense, windows, held_out, tmp_path, logits):
    model = copy.deepcopy(dense)
    pruner = yopo.PolicyPruner(reward="spectral", episodes=1, samples=2, restore=False)
    yopo.apply_plan(model, pruner.fit(model).plan(model, 0.5, layers=[1, 2]))
    lost = loss_of(model, held_out)
    yopo.recover(model, windows, teacher=dense, settings=SMALL)
    assert loss_of(model, held_out) < lost
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(yopo.load(tmp_path).eval()), logits(model.eval()))


def test_a_model_that_a_device_map_has_dispatched_is_recovered_as_any_other():
    from accelerate import dispatch_model

    places = {"model": "cpu", "lm_head": "cpu"}
    model = dispatch_model(build("llama"), places, main_device="cpu", force_hooks=True)
    yopo.recover(model, TOKENS, settings=SMALL)
    assert model.hf_device_map == places
    expected = yopo.recover(build("llama"), TOKENS, settings=SMALL)
    assert_same(model.state_dict(), expected.state_dict())


def test_small_forward_passes_add_up_to_the_same_step():
    models = [build("llama"), build("llama")]
    for model, micro in zip(models, (None, 1), strict=True):
        yopo.recover(model, TOKENS, settings=replace(SMALL, micro_batch=micro))
    pairs = [m.state_dict()["model.layers.0.mlp.down_proj.weight"] for m in models]
    assert torch.allclose(*pairs, atol=1e-5)
    assert not torch.allclose(pairs[0], build("llama").model.layers[0].mlp.down_proj.weight)


def test_recomputing_activations_changes_no_figure_and_bfloat16_few():
    plain = yopo.recover(build("llama"), TOKENS, settings=SMALL).state_dict()
    twice = build("llama")
    yopo.recover(twice, TOKENS, settings=replace(SMALL, gradient_checkpointing=True))
    assert not twice.is_activation_checkpointing
    coarse = yopo.recover(build("llama"), TOKENS, settings=replace(SMALL, bf16=True)).state_dict()
    for name, tensor in twice.state_dict().items():
        assert torch.allclose(tensor, plain[name], atol=1e-6)
        assert coarse[name].dtype == torch.float32
        assert torch.allclose(coarse[name], plain[name], atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_stay_so_and_win_back_as_much(dense, windows, held_out, dtype):
    wide = cut(copy.deepcopy(dense))
    half = copy.deepcopy(wide).to(dtype)
    teacher = copy.deepcopy(dense).to(dtype)
    yopo.recover(wide, windows, teacher=dense, settings=SMALL)
    yopo.recover(half, windows, teacher=teacher, settings=SMALL)
    assert {p.dtype for p in half.parameters()} == {dtype}
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    assert loss_of(half.float(), held_out) == pytest.approx(loss_of(wide, held_out), abs=0.03)


def test_the_same_seed_gives_the_same_model_and_the_global_generators_are_left_alone():
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    first = yopo.recover(build("llama"), TOKENS, settings=SMALL, seed=3).state_dict()
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.random()
    torch.rand(3)
    assert_same(yopo.recover(build("llama"), TOKENS, settings=SMALL, seed=3).state_dict(), first)
    other = yopo.recover(build("llama"), TOKENS, settings=SMALL, seed=4).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(other[name], first[name])


def test_modes_gradients_cache_and_attributes_are_put_back():
    model = build("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.config.use_cache = True
    state = [(n, m.training, sorted(vars(m))) for n, m in model.named_modules()]
    flags = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    yopo.recover(model, TOKENS, settings=SMALL)
    assert [(n, m.training, sorted(vars(m))) for n, m in model.named_modules()] == state
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == flags
    assert model.config.use_cache


def test_training_that_does_not_help_leaves_the_model_as_it_was(monkeypatch, caplog):
    original = Best.on_evaluate

    def look(self, args, state, control, **given):
        given["metrics"]["eval_loss"] = float(state.global_step)
        original(self, args, state, control, **given)

    monkeypatch.setattr(Best, "on_evaluate", look)
    model = build("llama")
    before = weights_of(model)
    yopo.recover(model, TOKENS, settings=SMALL)
    assert "Recovery did not help: no adapter has a lower validation loss than none" in caplog.text
    assert_same(weights_of(model), before)


def test_training_ends_when_validation_gets_no_better(monkeypatch):
    looks = []
    original = Best.on_evaluate

    def look(self, args, state, control, **given):
        given["metrics"]["eval_loss"] = float(len(looks) > 2)  # best at the first three looks
        looks.append(state.global_step)
        original(self, args, state, control, **given)

    monkeypatch.setattr(Best, "on_evaluate", look)
    settings = replace(SMALL, epochs=10, evaluate_every=2, patience=3)
    yopo.recover(build("llama"), TOKENS, settings=settings)
    assert looks == [0, 2, 4, 6]


def test_no_files_are_left_where_no_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yopo.recover(build("llama"), TOKENS, settings=SMALL)
    assert list(tmp_path.iterdir()) == []


# What goes wrong


def explode_at(step, monkeypatch):
    """Let the loss be NaN at a step of the optimiser."""
    original = RecoveryTrainer.compute_loss

    def compute(self, *given, **named):
        loss = original(self, *given, **named)
        return (
            loss * math.nan if self.state.global_step == step - 1 and self.model.training else loss
        )

    monkeypatch.setattr(RecoveryTrainer, "compute_loss", compute)


def test_a_loss_of_nan_ends_training_and_the_last_good_adapter_is_kept(
    pruned, dense, windows, held_out, caplog, monkeypatch
):
    lost = loss_of(pruned, held_out)
    explode_at(7, monkeypatch)
    yopo.recover(pruned, windows, teacher=dense, settings=replace(SMALL, evaluate_every=3))
    assert "NaN or infinite at step 7: the best adapter, of step 6, is kept" in caplog.text
    assert loss_of(pruned, held_out) < lost


def test_a_loss_of_nan_before_anything_is_won_is_an_error_that_changes_nothing(monkeypatch):
    model = build("llama")
    before = weights_of(model)
    explode_at(1, monkeypatch)
    with pytest.raises(YopoError, match="at step 1, before anything was won; the model is as it"):
        yopo.recover(model, TOKENS, settings=SMALL)
    assert_same(weights_of(model), before)
    assert not hasattr(model, "peft_config")


def test_an_error_in_the_middle_of_merging_changes_nothing_and_the_same_call_goes_on(
    tmp_path, monkeypatch
):
    model = build("llama")
    before, merged = weights_of(model), []
    original = Linear.get_delta_weight

    def full(self, adapter):
        merged.append(self)
        if len(merged) == 4:
            raise RuntimeError("out of memory")
        return original(self, adapter)

    monkeypatch.setattr(Linear, "get_delta_weight", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        yopo.recover(model, TOKENS, settings=SMALL, output=tmp_path)
    assert_same(weights_of(model), before)
    monkeypatch.undo()
    yopo.recover(model, TOKENS, settings=SMALL, output=tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


def interrupt_at(step, monkeypatch, error=KeyboardInterrupt):
    def end(self, args, state, control, **_):
        if state.global_step == step:
            raise error

    monkeypatch.setattr(Best, "on_step_begin", end, raising=False)


def test_ctrl_c_keeps_the_best_adapter_so_far(
    pruned, dense, windows, held_out, caplog, monkeypatch
):
    lost = loss_of(pruned, held_out)
    interrupt_at(5, monkeypatch)
    yopo.recover(pruned, windows, teacher=dense, settings=replace(SMALL, evaluate_every=2))
    assert "Interrupted at step 5 of 8: the best adapter, of step 4, is kept" in caplog.text
    assert loss_of(pruned, held_out) < lost


def test_ctrl_c_before_anything_is_won_goes_through(monkeypatch):
    model = build("llama").half()
    before = weights_of(model)
    interrupt_at(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        yopo.recover(model, TOKENS, settings=SMALL)
    assert_same(weights_of(model), before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_interrupted_recovery_goes_on_to_what_an_uninterrupted_one_gives(
    tmp_path, monkeypatch, dropout
):
    settings = replace(SMALL, epochs=3, evaluate_every=2, dropout=dropout)
    expected = yopo.recover(build("llama"), TOKENS, settings=settings).state_dict()
    model = build("llama")
    before = weights_of(model)
    interrupt_at(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        yopo.recover(model, TOKENS, settings=settings, output=tmp_path / "run")
    assert_same(weights_of(model), before)
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoint-6" / "best.safetensors").rename(tmp_path / "moved")
    (tmp_path / "run" / "checkpoint-9").mkdir()  # neither is whole
    yopo.recover(model, TOKENS, settings=settings, output=tmp_path / "run")
    assert_same(model.state_dict(), expected)
    again = yopo.recover(build("llama"), TOKENS, settings=settings, output=tmp_path / "run")
    assert_same(again.state_dict(), expected)


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "checksums.json"])
def test_a_damaged_checkpoint_makes_way_for_the_one_before(tmp_path, caplog, name):
    folder = RecoveryFolder(tmp_path / "run", {})
    for number in (4, 8, 12, 16):
        checkpoint = tmp_path / "run" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        for file in ("optimizer.pt", "trainer_state.json"):
            (checkpoint / file).write_text(f"{number} and more")
        if number < 16:  # which was interrupted
            seal(checkpoint)
    assert folder.last_checkpoint().name == "checkpoint-12"
    assert caplog.records == []
    cut_short(tmp_path / "run" / "checkpoint-12" / name)
    assert folder.last_checkpoint().name == "checkpoint-8"
    assert f"checkpoint-12/{name}` is damaged: going on from the checkpoint before" in caplog.text
    for number in (4, 8):
        cut_short(tmp_path / "run" / f"checkpoint-{number}" / name)
    with pytest.raises(
        PolicyFileError, match=f"checkpoint-8/{name}` is damaged, and no checkpoint"
    ):
        folder.last_checkpoint()
    assert len(list((tmp_path / "run").iterdir())) == 2


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-10])


def test_a_damaged_adapter_is_told(tmp_path):
    yopo.recover(build("llama"), TOKENS[:6], settings=SMALL, output=tmp_path)
    cut_short(tmp_path / "adapter" / BEST)
    with pytest.raises(
        PolicyFileError, match=r"best\.safetensors` is damaged: .* Delete `.*adapter`"
    ):
        yopo.recover(build("llama"), TOKENS[:6], settings=SMALL, output=tmp_path)


def test_training_that_had_ended_early_is_not_taken_up_again(tmp_path, monkeypatch):
    looks = []
    original = Best.on_evaluate

    def look(self, args, state, control, **given):
        given["metrics"]["eval_loss"] = float(len(looks) > 1)
        looks.append(state.global_step)
        original(self, args, state, control, **given)

    monkeypatch.setattr(Best, "on_evaluate", look)
    monkeypatch.setattr(RecoveryFolder, "finish", lambda *_: 1 / 0)
    settings = replace(SMALL, epochs=10, evaluate_every=2, patience=2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            yopo.recover(build("llama"), TOKENS, settings=settings, output=tmp_path)
    assert looks == [0, 2, 4]


def test_the_text_that_the_teacher_wrote_is_written_once(pruned, dense, tmp_path, monkeypatch):
    twin = copy.deepcopy(pruned)
    yopo.recover(pruned, teacher=dense, settings=SMALL, output=tmp_path)
    monkeypatch.setattr("yopo.recovery.portions.write_windows", None)
    yopo.recover(twin, teacher=dense, settings=SMALL, output=tmp_path)
    assert_same(twin.state_dict(), pruned.state_dict())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_folder_holds_an_adapter_that_peft_loads(tmp_path, logits):
    from peft import PeftModel

    model = yopo.recover(build("llama"), TOKENS, settings=SMALL, output=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter",
        "recovery.safetensors",
        "recovery_config.json",
    ]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


def test_nothing_is_asked_of_the_hub(tokenizer, tmp_path, monkeypatch):
    model = build("llama")
    model.name_or_path = model.config._name_or_path = "some/model"
    asked = []
    monkeypatch.setattr("peft.utils.other.file_exists", lambda *given, **_: asked.append(given))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yopo.recover(model, TOKENS, tokenizer=tokenizer, settings=SMALL, output=tmp_path)
    assert asked == []


def test_a_folder_of_another_recovery_is_refused(tmp_path):
    yopo.recover(build("llama"), TOKENS, settings=SMALL, output=tmp_path / "run")
    (tmp_path / "file").touch()
    for changed, told in (
        ({"settings": replace(SMALL, rank=4)}, "another `settings`: `rank` 8 instead of 4"),
        ({"seed": 1}, "another `seed`: 0 instead of 1"),
        ({"data": TOKENS + 1}, "another `text`"),
        ({"model": build("llama", seed=1)}, "another `model`"),
        ({"output": tmp_path}, "exists and holds no recovery"),
        ({"output": tmp_path / "file"}, "exists and holds no recovery"),
    ):
        call = {"model": build("llama"), "data": TOKENS, "settings": SMALL}
        call |= {"output": tmp_path / "run"} | changed
        with pytest.raises(InvalidArgumentError, match=told):
            yopo.recover(call.pop("model"), call.pop("data"), **call)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    settings = replace(SMALL, epochs=3, evaluate_every=2)
    expected = yopo.recover(build("llama"), TOKENS, settings=settings).state_dict()
    model = build("llama")
    before = weights_of(model)
    original = Trained.save

    def full(self, file):
        if "checkpoint-6" in str(file):
            raise OSError(28, "No space left on device")
        original(self, file)

    monkeypatch.setattr(Trained, "save", full)
    with pytest.raises(YopoError, match=r"checkpoint-6`: .*No space left.*The model is as it was"):
        yopo.recover(model, TOKENS, settings=settings, output=tmp_path)
    assert_same(weights_of(model), before)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    monkeypatch.undo()
    yopo.recover(model, TOKENS, settings=settings, output=tmp_path)
    assert_same(model.state_dict(), expected)


def test_an_adapter_that_cannot_be_written_at_the_end_is_an_error_that_changes_nothing(
    tmp_path, monkeypatch
):
    from peft import PeftModel

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = build("llama")
    before = weights_of(model)
    names = [name for name, _ in model.named_modules()]
    original = PeftModel.save_pretrained
    monkeypatch.setattr(
        PeftModel,
        "save_pretrained",
        lambda self, path, **named: (full if "adapter" in path.name else original)(
            self, path, **named
        ),
    )
    told = f"cannot write the adapter into `{tmp_path}`: .*No space left.*call `recover` again with"
    with pytest.raises(YopoError, match=told):
        yopo.recover(model, TOKENS, settings=SMALL, output=tmp_path)
    assert_same(weights_of(model), before)
    assert [name for name, _ in model.named_modules()] == names
    monkeypatch.undo()
    yopo.recover(model, TOKENS, settings=SMALL, output=tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_calls_that_make_no_sense_are_refused(dense, pruned):
    for model, named, error, told in (
        (pruned, {}, InvalidArgumentError, "`teacher` is needed"),
        (pruned, {"teacher": pruned}, InvalidArgumentError, "is the model itself"),
        (pruned, {"teacher": build("llama")}, InvalidArgumentError, "knows 64 tokens and the"),
        (pruned, {"data": TOKENS, "targets": "all"}, InvalidArgumentError, "`targets` must be"),
        (pruned, {"data": TOKENS, "settings": "best"}, InvalidArgumentError, "`settings` must be"),
        (pruned, {"data": TOKENS, "seed": -1}, InvalidArgumentError, "`seed` must be"),
        (pruned, {"teacher": "dense"}, InvalidArgumentError, "`teacher` must be a model in memory"),
        ("a-model", {"data": TOKENS}, InvalidArgumentError, "Load it with `yopo.load`"),
        (build("t5"), {"data": TOKENS}, UnsupportedModelError, "causal language models, got T5"),
        (build("llama").model, {"data": TOKENS}, UnsupportedModelError, "causal language models"),
        (
            build("gpt_oss"),
            {"data": TOKENS, "settings": replace(SMALL, dropout=0.1)},
            InvalidArgumentError,
            "`dropout` must be 0 for experts",
        ),
    ):
        with pytest.raises(error, match=told):
            yopo.recover(model, **named)
    broken = build("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UnsupportedModelError, match="NaN or infinite"):
        yopo.recover(broken, TOKENS, settings=SMALL)


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_a_model_that_gives_nan_from_the_start_is_told_by_its_name(which):
    models = {"model": build("llama"), "teacher": build("llama", seed=1)}
    models[which].model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UnsupportedModelError, match=f"`{which}` gives logits that are NaN"):
        yopo.recover(models["model"], teacher=models["teacher"], settings=SMALL)


def test_a_loss_that_is_nan_from_the_start_is_not_laid_to_training():
    model = build("llama", vocab_size=128)
    model.model.embed_tokens.weight.data[100] = math.nan
    with pytest.raises(YopoError, match="before training: the model, or the teacher, gives such"):
        yopo.recover(model, TOKENS + 60, settings=SMALL)


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(YopoError, match=r"yopo-prune\[recover\]"):
        yopo.recover(build("llama"), TOKENS)
