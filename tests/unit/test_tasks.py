"""Tasks on local files, beside lm-eval's own definitions and beside sums by hand."""

import csv
import json
import logging
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.evaluation import Score, TaskReport, TaskScore
from yopo.evaluation.definitions import PRESETS, load_tasks

InvalidArgumentError = yopo.InvalidArgumentError

WORDS = "Tom Anna ball dog red big ran gave found the a and park home happy sad".split()


def sentence(generator, words):
    return " ".join(generator.choice(WORDS) for _ in range(words))


def questions(generator, choices):
    """Return questions, their answers of many lengths, and which is right."""
    return [
        {
            "question": sentence(generator, 6),
            "answers": [sentence(generator, generator.randint(1, 5)) for _ in range(choices)],
            "label": generator.randrange(choices),
        }
        for _ in range(12)
    ]


@pytest.fixture(scope="module")
def asked():
    generator = random.Random(0)
    names = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")
    found = {name: questions(generator, 2 if name == "piqa" else 4) for name in names}
    found["arc_easy"][0]["answers"].pop()  # some questions have three choices
    found["arc_easy"][0]["label"] = 1
    return found | {"winogrande": questions(generator, 2), "anatomy": questions(generator, 4)}


@pytest.fixture(scope="module")
def data_dir(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for name, found in asked.items():
        if name in ("winogrande", "anatomy"):
            continue
        lines = [
            {
                "context": q["question"]
                if name in ("hellaswag", "openbookqa")
                else f"Question: {q['question']}\nAnswer:",
                "choices": [f" {answer}" for answer in q["answers"]],
                "label": q["label"],
            }
            for q in found
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [
        {
            "contexts": [f"{q['question']} {option}" for option in ("Tom", "Anna")],
            "continuation": f"{' ' * (1 + n % 2)}{q['answers'][0]}.",  # some begin with two spaces
            "label": q["label"],
        }
        for n, q in enumerate(asked["winogrande"])
    ]
    (folder / "winogrande.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for split in ("dev", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        with (folder / "mmlu" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", *(f"choice{n}" for n in range(4)), "answer"])
            for q in asked["anatomy"]:
                writer.writerow([q["question"], *q["answers"], q["label"]])
    return folder


@pytest.fixture(scope="module")
def model():
    return yopo.load(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def manager_of_lm_eval():
    """Return what finds lm-eval's own definitions of these tasks, and none of all the others."""
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    folders = ("piqa", "hellaswag", "arc", "openbookqa", "winogrande", "mmlu/default")
    paths = [str(home / folder) for folder in folders]
    return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)


TASKS = "piqa hellaswag arc_easy arc_challenge openbookqa winogrande mmlu_anatomy".split()


@pytest.fixture(scope="module")
def report(model, tokenizer, data_dir):
    return yopo.evaluate(model, tokenizer, tasks=TASKS, data_dir=data_dir)


def log_likelihood(model, tokenizer, context, continuation):
    """Return the log-probability of a continuation, by hand."""
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[i - 1, whole[i]]) for i in range(start, len(whole)))


def test_accuracy_normalised_by_length_is_what_sums_by_hand_give(model, tokenizer, asked, report):
    right = []
    for q in asked["arc_challenge"]:
        context = f"Question: {q['question']}\nAnswer:"
        scores = [
            log_likelihood(model, tokenizer, context, f" {answer}") / len(answer)
            for answer in q["answers"]
        ]
        right.append(int(np.argmax(scores) == q["label"]))
    score = next(score for score in report.scores if score.task == "arc_challenge")
    assert (score.metric, score.questions, score.chance) == ("acc_norm", 12, 0.25)
    assert score.model.value == pytest.approx(np.mean(right))
    assert score.model.error == pytest.approx(np.std(right, ddof=1) / 12**0.5)


def test_winogrande_compares_contexts_by_what_follows(model, tokenizer, asked, report):
    right = [
        int(
            np.argmax(
                [
                    log_likelihood(
                        model, tokenizer, f"{q['question']} {option}", f" {q['answers'][0]}."
                    )
                    for option in ("Tom", "Anna")
                ]
            )
            == q["label"]
        )
        for q in asked["winogrande"]
    ]
    score = next(score for score in report.scores if score.task == "winogrande")
    assert (score.metric, score.chance) == ("acc", 0.5)
    assert score.model.value == pytest.approx(np.mean(right))


def originals(asked):
    """Return the same questions with the fields of the original data sets."""
    letters = "ABCD"

    def arc(q):
        labels = list(letters[: len(q["answers"])])
        choices = {"text": q["answers"], "label": labels}
        return {"choices": choices, "answerKey": letters[q["label"]]}

    return {
        "piqa": [
            {"goal": q["question"], "sol1": q["answers"][0], "sol2": q["answers"][1]}
            | {"label": q["label"]}
            for q in asked["piqa"]
        ],
        "hellaswag": [
            {
                # lm-eval joins these three, and makes the first letter of the last a capital.
                "activity_label": q["question"].partition(" ")[0],
                "ctx_a": q["question"].partition(" ")[2],
                "ctx_b": "",
                "endings": q["answers"],
                "label": str(q["label"]),
            }
            for q in asked["hellaswag"]
        ],
        "arc_easy": [{"question": q["question"]} | arc(q) for q in asked["arc_easy"]],
        "arc_challenge": [{"question": q["question"]} | arc(q) for q in asked["arc_challenge"]],
        "openbookqa": [{"question_stem": q["question"]} | arc(q) for q in asked["openbookqa"]],
        "winogrande": [
            {
                "sentence": f"{q['question']} _{' ' * (1 + n % 2)}{q['answers'][0]}.",
                "option1": "Tom",
                "option2": "Anna",
                "answer": str(q["label"] + 1),
            }
            for n, q in enumerate(asked["winogrande"])
        ],
        "mmlu_anatomy": [
            {"question": q["question"], "choices": q["answers"], "answer": q["label"]}
            for q in asked["anatomy"]
        ],
    }


@pytest.mark.parametrize("few_shot", [None, 2])
def test_requests_and_answers_equal_those_of_lm_evals_own_definitions(
    model, tokenizer, asked, data_dir, few_shot, manager_of_lm_eval
):
    from datasets import Dataset
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    documents = originals(asked)
    names = ["mmlu_anatomy"] if few_shot else TASKS
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = manager_of_lm_eval.load(
        {
            "group": "theirs",
            "task": [
                {
                    "task": name,
                    "custom_dataset": lambda name=name, **_: dict.fromkeys(
                        ("train", "validation", "test", "dev"), Dataset.from_list(documents[name])
                    ),
                    # HellaSwag's is joined with a colon, which the local form has no need of.
                    **(
                        {"doc_to_text": "{{query.replace(':', '').strip()}}"}
                        if name == "hellaswag"
                        else {}
                    ),
                }
                for name in names
            ],
        }
    )
    ours, _ = load_tasks(names, data_dir, few_shot=few_shot, seed=0)
    for task in theirs["tasks"].values():
        task.set_config(key="num_fewshot", value=few_shot or 0)
        task.set_fewshot_seed(seed=0)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = [evaluate(lm, {"tasks": side["tasks"]}) for side in (theirs, ours)]
    for name in names:
        requests = [[sample["arguments"] for sample in side["samples"][name]] for side in found]
        assert requests[0] == requests[1], name
        their_result, our_result = (
            {key: value for key, value in side["results"][name].items() if "," in key}
            for side in found
        )
        assert their_result == our_result, name


def test_scores_stand_beside_those_of_another_model(model, tokenizer, data_dir, report):
    pruned = yopo.PolicyPruner(evidence="weights").fit(model)
    smaller = pruned.prune(yopo.load(model_path(), dtype=torch.float32), 0.5)
    both = yopo.evaluate(smaller, tokenizer, tasks=TASKS, against=model, data_dir=f"{data_dir}/")
    again = yopo.evaluate(smaller, tokenizer, tasks=TASKS, against=report, data_dir=data_dir)
    assert both.to_dict() == again.to_dict()
    assert [s.against for s in both.scores] == [s.model for s in report.scores]
    assert " kept above chance |" in str(both)
    for score in both.scores:
        assert score.retention == pytest.approx(score.model.value / score.against.value)
    mean = np.mean([score.model.value for score in both.scores])
    assert both.average.model.value == pytest.approx(mean)
    assert TaskReport.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_what_moves_the_numbers_is_pinned(report, data_dir):
    assert report.pinned["questions from"] == str(data_dir)
    assert report.pinned["dtype"] == "float32"
    assert report.pinned["few-shot"] == 0
    assert report.pinned["task versions"]["piqa"] == 1.0
    for name in ("lm-eval", "window", "batch", "seed", "limit", "torch", "transformers"):
        assert name in report.pinned
        assert name in str(report)


def test_a_report_that_was_made_in_another_way_is_refused(model, tokenizer, data_dir, report):
    with pytest.raises(InvalidArgumentError, match="another way: limit None, not 3"):
        yopo.evaluate(model, tokenizer, tasks=TASKS, data_dir=data_dir, limit=3, against=report)


def test_a_group_shows_its_mean_and_keeps_its_members(model, tokenizer, data_dir, tmp_path):
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        content = (data_dir / "mmlu" / split / f"anatomy_{split}.csv").read_text()
        for subject in ("anatomy", "virology"):
            (tmp_path / "mmlu" / split / f"{subject}_{split}.csv").write_text(content)
    (tmp_path / "two.yaml").write_text(
        "group: two\ntask: [mmlu_anatomy, mmlu_virology]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    report = yopo.evaluate(model, tokenizer, tasks="two", data_dir=tmp_path)
    (score,) = report.scores
    assert (score.task, score.metric, score.questions, score.chance) == ("two", "acc", 24, 0.25)
    values = [member.model.value for member in report.members]
    assert len(values) == 2
    assert score.model.value == pytest.approx(np.mean(values))
    assert report.average is None


DEFINITION = """
task: {name}
tag: pair
custom_dataset: !function yopo.evaluation.local_files.read_choices
dataset_kwargs: {{file: {name}.jsonl}}
output_type: {kind}
validation_split: validation
doc_to_text: context
"""
CHOICES = "doc_to_choice: choices\ndoc_to_target: label\n"
FILTERS = """
doc_to_target: "[invalid]"
generation_kwargs: {until: ["."], max_gen_toks: 2}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "(zzz)"}, {function: take_first}]}
  - {name: loose, filter: [{function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_of_several_filters_the_first_counts_with_its_own_error_and_questions(
    model, tokenizer, data_dir, tmp_path
):
    (tmp_path / "sums.jsonl").write_text((data_dir / "piqa.jsonl").read_text())
    definition = DEFINITION.format(name="sums", kind="generate_until") + FILTERS
    (tmp_path / "sums.yaml").write_text(definition)
    (score,) = yopo.evaluate(model, tokenizer, tasks="sums", data_dir=tmp_path, limit=3).scores
    assert (score.metric, score.questions, score.chance) == ("exact_match, strict", 3, None)
    assert score.model == Score(1.0, 0.0)  # no answer holds "zzz", of which the filter tells so


def test_a_tag_stands_for_its_tasks_and_a_preset_in_a_list_for_its_own(
    model, tokenizer, data_dir, tmp_path
):
    for name in (*PRESETS["paper"], "first", "second"):
        source = data_dir / f"{name if name in TASKS else 'piqa'}.jsonl"
        (tmp_path / f"{name}.jsonl").write_text(source.read_text())
        if name not in TASKS:
            definition = DEFINITION.format(name=name, kind="multiple_choice") + CHOICES
            (tmp_path / f"{name}.yaml").write_text(definition)
    given = {"tasks": ["pair", "paper", "piqa"], "data_dir": tmp_path, "limit": 2}
    report = yopo.evaluate(model, tokenizer, **given)
    assert [score.task for score in report.scores] == ["first", "second", *PRESETS["paper"]]
    assert report.average.questions == 14


def test_a_group_without_a_mean_stands_for_its_tasks(model, tokenizer, data_dir, tmp_path):
    (tmp_path / "loose.yaml").write_text("group: loose\ntask: [piqa, arc_easy]\n")
    for name in ("piqa", "arc_easy"):
        (tmp_path / f"{name}.jsonl").write_text((data_dir / f"{name}.jsonl").read_text())
    report = yopo.evaluate(model, tokenizer, tasks="loose", data_dir=tmp_path, limit=2)
    assert [score.task for score in report.scores] == ["piqa", "arc_easy"]


def test_logits_that_are_not_finite_are_an_error_and_no_accuracy(tiny_model, tokenizer, data_dir):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InvalidArgumentError, match="not finite"):
        yopo.evaluate(model, tokenizer, tasks="piqa", data_dir=data_dir, limit=2)


def test_an_answer_that_is_longer_than_a_window_is_an_error(model, tokenizer, data_dir):
    given = {"tasks": "piqa", "data_dir": data_dir, "window": 2}
    with pytest.raises(InvalidArgumentError, match=r"`window=2` .* an answer of \d+ tokens"):
        yopo.evaluate(model, tokenizer, **given)


def test_a_folder_is_loaded_with_its_tokenizer(report, data_dir, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "some-model")
    tokenizer.save_pretrained(tmp_path / "some-model")
    found = yopo.evaluate(str(tmp_path / "some-model"), tasks=TASKS, data_dir=data_dir)
    assert found == replace(report, names=("some-model", "against"))


def test_the_callers_randomness_mode_and_log_level_stay_as_they_were(model, tokenizer, data_dir):
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model.train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    yopo.evaluate(model, tokenizer, tasks="piqa", data_dir=data_dir, limit=2)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert model.training
    assert logging.getLogger("lm_eval").level == logging.WARNING
    model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "piqua"}, "'piqua'.*piqa"),
        ({"tasks": []}, "names none"),
        ({"limit": 0}, "`limit`"),
        ({"few_shot": -1}, "`few_shot`"),
        ({"data_dir": "nowhere"}, "no folder"),
        ({"tokenizer": None}, "`tokenizer` is needed"),
        ({"tasks": "mmlu_virology"}, "virology_dev.csv` is missing"),
        ({"tasks": "xyz"}, "no task 'xyz' among those for local files; there are arc_challenge,"),
        ({"window": 1}, "`window` must be at least 2"),
        ({"window": 10_000}, "`window` must be at least 2, and at most 256"),
        ({"few_shot": 1}, "`few_shot` must be 0 for 'piqa': its file holds the questions alone"),
    ],
)
def test_bad_arguments_are_refused(model, tokenizer, data_dir, arguments, message):
    given = {"model": model, "tokenizer": tokenizer, "tasks": "piqa", "data_dir": data_dir}
    given |= arguments
    with pytest.raises(InvalidArgumentError, match=message):
        yopo.evaluate(given.pop("model"), given.pop("tokenizer"), **given)


def test_a_folder_without_a_tokenizer_is_refused(model, data_dir, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no tokenizer"):
        yopo.evaluate(tmp_path, tasks="piqa", data_dir=data_dir)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "damaged: its entry 0"),
        ('{"context": "a", "choices": [" b", " c"]}', "label"),
        ('{"context": "a", "choices": [" b", " c"], "label": 2}', "the label 2 of 2 choices"),
        ("", "no questions"),
    ],
)
def test_damaged_questions_are_refused(model, tokenizer, tmp_path, line, message):
    (tmp_path / "piqa.jsonl").write_text(line)
    with pytest.raises(InvalidArgumentError, match=message):
        yopo.evaluate(model, tokenizer, tasks="piqa", data_dir=tmp_path)


def test_without_a_network_the_error_names_the_local_way(
    model, tokenizer, monkeypatch, manager_of_lm_eval
):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("yopo.evaluation.definitions._manager", lambda _: manager_of_lm_eval)
    with pytest.raises(OSError, match="`data_dir`"):
        yopo.evaluate(model, tokenizer, tasks="piqa")


def test_retention_above_chance_is_told_only_where_the_other_is_above_chance():
    score = TaskScore("a", "acc", 100, 0.25, Score(0.4, 0.05), Score(0.55, 0.05))
    assert score.retention_above_chance == pytest.approx(0.5)
    near = TaskScore("a", "acc", 100, 0.25, Score(0.4, 0.05), Score(0.34, 0.05))
    assert near.retention_above_chance is None
    assert near.retention == pytest.approx(0.4 / 0.34)


def test_without_lm_eval_the_error_names_the_extra(model, tokenizer, data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(yopo.YopoError, match=r"yopo-prune\[eval\]"):
        yopo.evaluate(model, tokenizer, tasks="piqa", data_dir=f"{data_dir}/")


def test_a_perplexity_is_told_as_it_is_and_has_no_place_among_accuracies():
    words = TaskScore("words", "word_perplexity", 9, None, Score(12.5), Score(11.0))
    report = TaskReport(("a", "b"), (words, words), (), {"seed": 0})
    assert report.rows()[1] == ["words", "word_perplexity", "9", "", "11.00", "12.50", "", ""]
    assert report.average is None
