import hashlib
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from yopo import InvalidArgumentError, PolicyFileError, PolicyMismatchError, find_ffns
from yopo.features import FEATURES, row_features
from yopo.policy import Policy, Recipe

RECIPE = {
    "method": "features",
    "ratio": 0.3,
    "episodes": 5,
    "learning_rate": 0.1,
    "discount": 0.99,
    "samples": 4,
    "seed": 7,
    "multiple_of": "auto",
}


def recipe(**changes):
    return Recipe(**RECIPE | changes)


def learned_policy():
    return Policy(recipe(), {"weights_P": torch.linspace(-1, 1, len(FEATURES))})


def published_policy(width=32):
    generator = torch.Generator().manual_seed(0)
    tensors = {"vector_D": torch.randn(width, generator=generator), "constant": torch.tensor(0.3)}
    return Policy(recipe(method="prunenet", multiple_of=1, kl=True), tensors)


LEAN = {"method": "lean", "episodes": 0, "samples": 1, "reward": "output", "evidence": "weights"}


def lean_policy():
    return Policy.at_start(recipe(**LEAN))


POLICIES = pytest.mark.parametrize("make", [learned_policy, published_policy, lean_policy])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.0}, "`ratio` must be in [0, 1), got 1.0."),
        ({"ratio": "0.3"}, "`ratio` must be in [0, 1), got '0.3'."),
        ({"episodes": 0}, "`episodes` must be an integer of at least 1, got 0."),
        ({"episodes": 2.0}, "`episodes` must be an integer of at least 1, got 2.0."),
        ({"episodes": True}, "`episodes` must be an integer of at least 1, got True."),
        ({"samples": 1}, "`samples` must be an integer of at least 2, got 1."),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1."),
        ({"seed": None}, "`seed` must be an integer of at least 0, got None."),
        ({"seed": 2**64}, f"`seed` must be below 2**63, got {2**64}."),
        ({"multiple_of": 0}, '`multiple_of` must be "auto" or a positive integer, got 0.'),
        ({"multiple_of": "8"}, "`multiple_of` must be \"auto\" or a positive integer, got '8'."),
        ({"learning_rate": 0}, "`learning_rate` must be positive and finite, got 0."),
        (
            {"learning_rate": float("nan")},
            "`learning_rate` must be positive and finite, got nan.",
        ),
        (
            {"learning_rate": float("inf")},
            "`learning_rate` must be positive and finite, got inf.",
        ),
        ({"learning_rate": "1"}, "`learning_rate` must be positive and finite, got '1'."),
        ({"discount": 0.0}, "`discount` must be in (0, 1], got 0.0."),
        ({"discount": 1.01}, "`discount` must be in (0, 1], got 1.01."),
        ({"discount": True}, "`discount` must be in (0, 1], got True."),
        ({"discount": float("nan")}, "`discount` must be in (0, 1], got nan."),
        ({"method": "magic"}, '`method` must be "features", "prunenet" or "lean", got \'magic\'.'),
        ({"kl": 1}, "`kl` must be True or False, got 1."),
        ({"attention": "no"}, "`attention` must be True or False, got 'no'."),
        (
            LEAN | {"episodes": 2},
            "`episodes` must be 0 for the lean recipe, which learns nothing, got 2.",
        ),
        (
            LEAN | {"evidence": "self"},
            '`evidence` must be "weights" for the lean recipe, which knows nothing else, got '
            "'self'.",
        ),
        (
            LEAN | {"allocation": "adaptive"},
            '`allocation="adaptive"` compares what all FFNs lose before it cuts any, which the '
            "lean recipe, one FFN at a time, cannot: use `PolicyPruner()`, or "
            '`allocation="uniform"`.',
        ),
    ],
    ids=str,
)
def test_an_argument_outside_its_range_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(InvalidArgumentError) as caught:
        recipe(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": 0.0},
        {"ratio": 0},
        {"discount": 1},
        {"samples": 1, "method": "prunenet"},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"multiple_of": 1},
    ],
    ids=str,
)
def test_the_edges_of_every_range_are_allowed(changes):
    assert asdict(recipe(**changes)).items() >= changes.items()


@POLICIES
def test_saving_and_loading_a_policy_is_the_identity(tmp_path, make):
    policy = make()
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert loaded.recipe == policy.recipe
    assert loaded.tensors.keys() == policy.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], t) for name, t in policy.tensors.items())


def test_a_policy_saved_before_there_were_allocations_is_uniform(tmp_path):
    learned_policy().save(tmp_path)
    file = tmp_path / "policy_config.json"
    config = json.loads(file.read_text())
    assert config["recipe"].pop("allocation") == "uniform"
    file.write_text(json.dumps(config))
    assert Policy.load(tmp_path).recipe == recipe()


def test_the_card_tells_how_a_policy_was_trained_and_how_to_use_it(tmp_path):
    learned_policy().save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: yopo\n")
    assert "PolicyPruner.from_policy(" in card
    for key, value in asdict(learned_policy().recipe).items():
        assert f"| {key} | {value} |" in card


def test_log_odds_are_linear_in_the_features(tiny_llama):
    ffn = find_ffns(tiny_llama())[0]
    policy = learned_policy()
    expected = (row_features(ffn) * policy.tensors["weights_P"]).sum(dim=1)
    torch.testing.assert_close(policy.log_odds(ffn), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_odds_as_published_are_linear_in_the_row_of_the_gate(tiny_llama, dtype):
    model = tiny_llama(dtype=dtype)
    policy = published_policy()
    gate = model.model.layers[0].mlp.gate_proj.weight.detach().float()
    expected = (gate * policy.tensors["vector_D"]).sum(dim=1) + 0.3
    torch.testing.assert_close(policy.log_odds(find_ffns(model)[0]), expected)


def test_a_published_policy_refuses_rows_of_another_width_by_name(tiny_opt):
    ffn = find_ffns(tiny_opt())[0]
    with pytest.raises(PolicyMismatchError) as caught:
        published_policy(width=24).log_odds(ffn)
    assert str(caught.value) == (
        "this policy scores rows of width 24, but `model.decoder.layers.0` has width 32. "
        "Fit a new policy on this model."
    )


def rewrite(folder, config=None, tensors=None):
    """Change the files of a policy, checksum included, as a careful forger would."""
    file = folder / "policy_config.json"
    document = json.loads(file.read_text())
    for key, value in (config or {}).items():
        target = document["recipe"] if key in document["recipe"] else document
        target[key] = value
        if value == "gone":
            del target[key]
    if tensors is not None:
        stored = load_file(folder / "policy.safetensors") | tensors
        save_file(
            {name: t for name, t in stored.items() if t is not None}, folder / "policy.safetensors"
        )
    data = (folder / "policy.safetensors").read_bytes()
    document["sha256"] = hashlib.sha256(data).hexdigest()
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "config",
    [
        {"recipe": "gone"},
        {"recipe": []},
        {"recipe": "features"},
        {"ratio": "gone"},
        {"ratio": 2},
        {"ratio": float("nan")},
        {"episodes": -1},
        {"method": "magic"},
        {"method": None},
        {"method": "prunenet"},
        {"multiple_of": [8]},
    ],
    ids=str,
)
def test_a_policy_file_with_a_bad_recipe_is_damaged(tmp_path, config):
    learned_policy().save(tmp_path)
    rewrite(tmp_path, config)
    with pytest.raises(PolicyFileError, match=r"holds a damaged policy") as caught:
        Policy.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weights_P": None, "other": torch.ones(len(FEATURES))},
        {"extra": torch.ones(1)},
        {"weights_P": torch.ones(len(FEATURES) - 1)},
        {"weights_P": torch.ones(len(FEATURES), 1)},
        {"weights_P": torch.tensor(1.0)},
        {"weights_P": torch.full((len(FEATURES),), torch.nan)},
        {"weights_P": torch.full((len(FEATURES),), -torch.inf)},
        {"weights_P": torch.ones(len(FEATURES), dtype=torch.int64)},
    ],
    ids=["renamed", "extra", "short", "matrix", "scalar", "nan", "inf", "integers"],
)
def test_a_learned_policy_file_with_bad_tensors_is_damaged(tmp_path, tensors):
    learned_policy().save(tmp_path)
    rewrite(tmp_path, tensors=tensors)
    with pytest.raises(PolicyFileError, match=r"holds a damaged policy"):
        Policy.load(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [{"constant": None}, {"constant": torch.ones(3)}, {"vector_D": torch.ones(32, 1)}],
    ids=["missing", "vector", "matrix"],
)
def test_a_published_policy_file_with_bad_tensors_is_damaged(tmp_path, tensors):
    published_policy().save(tmp_path)
    rewrite(tmp_path, tensors=tensors)
    with pytest.raises(PolicyFileError, match=r"holds a damaged policy"):
        Policy.load(tmp_path)


def test_a_lean_policy_file_with_tensors_is_damaged(tmp_path):
    lean_policy().save(tmp_path)
    rewrite(tmp_path, tensors={"extra": torch.ones(1)})
    with pytest.raises(PolicyFileError, match=r"holds a damaged policy: it needs no tensors\."):
        Policy.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_policy_stored_in_another_precision_scores_all_the_same(tmp_path, tiny_llama, dtype):
    policy = learned_policy()
    policy.save(tmp_path)
    rewrite(tmp_path, tensors={"weights_P": policy.tensors["weights_P"].to(dtype)})
    ffn = find_ffns(tiny_llama())[0]
    torch.testing.assert_close(
        Policy.load(tmp_path).log_odds(ffn), policy.log_odds(ffn), rtol=0.02, atol=0.02
    )


def test_a_policy_of_other_features_says_to_fit_again(tmp_path):
    learned_policy().save(tmp_path)
    rewrite(tmp_path, {"features": ["log_norm_gate"]})
    with pytest.raises(PolicyFileError, match=r"looks at other features .* Fit it again\."):
        Policy.load(tmp_path)


def test_a_plan_is_no_policy(tmp_path):
    from yopo import PruningPlan

    PruningPlan(kept={"mlp": torch.tensor([0])}, rows={"mlp": 2}, ratio=0.5).save(tmp_path)
    with pytest.raises(PolicyFileError, match=r"holds no policy"):
        Policy.load(tmp_path)
