"""The main job on the trained model that travels with yopo."""

import copy
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import yopo
from yopo import criteria
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text
from yopo.evaluation import perplexity
from yopo.moments import read_moments
from yopo.reward import output_reward
from yopo.spectrum import spectra_of, spectral_distances

RATIO = 0.3


@pytest.fixture(scope="module")
def dense():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pruner(dense):
    """The default pruner, which remembers what the model wrote."""
    return yopo.PolicyPruner(ratio=RATIO).fit(dense)


@pytest.fixture(scope="module")
def tokens():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    return torch.tensor(tokenizer(write_text(HELD_OUT_SEED, 40_000)).input_ids)[: 16 * 256]


def left_by(dense, tokens, plan):
    pruned = copy.deepcopy(dense)
    yopo.apply_plan(pruned, plan)
    return perplexity(pruned, tokens, window=256)


def mean_ks(model, plan):
    ffns = yopo.find_ffns(model)
    spectra = spectra_of([ffn.gate for ffn in ffns])
    return float(spectral_distances(spectra, [plan.kept[ffn.name][None] for ffn in ffns]).mean())


def test_fit_prune_save_reload_and_generate(dense, pruner, tokens, tmp_path):
    pruned = pruner.prune(copy.deepcopy(dense), RATIO)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.intermediate_size == 272
    with torch.no_grad():
        assert torch.equal(loaded(tokens[None, :64]).logits, pruned(tokens[None, :64]).logits)
    written = loaded.generate(tokens[None, :10], max_new_tokens=5, do_sample=False)
    assert written.shape == (1, 15)


def test_the_default_loses_a_fraction_of_what_every_baseline_loses(dense, pruner, tokens):
    ours = pruner.prune(copy.deepcopy(dense))
    published = yopo.PolicyPruner.prunenet(ratio=RATIO).fit(dense).prune(copy.deepcopy(dense))
    baselines = {
        "random": statistics.fmean(
            left_by(
                dense,
                tokens,
                yopo.plan_by_criterion(dense, RATIO, criterion=criteria.random_rows(seed)),
            )
            for seed in range(3)
        ),
        "norm": left_by(
            dense, tokens, yopo.plan_by_criterion(dense, RATIO, criterion=criteria.row_norm)
        ),
        "prunenet": perplexity(published, tokens, window=256),
    }
    start = perplexity(dense, tokens, window=256)
    for name, value in baselines.items():
        assert perplexity(ours, tokens, window=256) - start < 0.1 * (value - start), name


def test_the_lean_recipe_loses_a_fraction_of_what_random_rows_lose(dense, tokens, tmp_path):
    pruner = yopo.PolicyPruner.lean(ratio=RATIO).fit(dense)
    pruner.save_policy(tmp_path)
    ours = pruner.prune(copy.deepcopy(dense))
    again = yopo.PolicyPruner.from_policy(tmp_path).prune(copy.deepcopy(dense))
    for one, same in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
    plain = yopo.PolicyPruner.lean(ratio=RATIO, restore=False).fit(dense)
    start = perplexity(dense, tokens, window=256)
    lost, unrestored = (
        perplexity(model, tokens, window=256) - start
        for model in (ours, plain.prune(copy.deepcopy(dense)))
    )
    random = [
        left_by(
            dense, tokens, yopo.plan_by_criterion(dense, RATIO, criterion=criteria.random_rows(s))
        )
        for s in range(3)
    ]
    assert lost < 0.3 * (min(random) - start)
    assert lost < unrestored


def test_the_policy_learns_the_published_reward(dense):
    pruner = yopo.PolicyPruner(ratio=RATIO, reward="spectral", multiple_of=1).fit(dense)
    learned = mean_ks(dense, pruner.plan(dense))

    def by(criterion):
        plan = yopo.plan_by_criterion(dense, RATIO, criterion=criterion, multiple_of=1)
        return mean_ks(dense, plan)

    randoms = [by(criteria.random_rows(seed)) for seed in range(10)]
    assert learned < statistics.fmean(pruner.history[0].best_ks)
    assert learned < statistics.fmean(randoms) - 5 * statistics.stdev(randoms)
    assert learned <= min(by(criteria.row_norm), by(criteria.norm_product))


def test_learning_on_the_output_records_every_layer_and_never_ends_below_the_closed_form(dense):
    ids = torch.randint(3, 1280, (8, 64), generator=torch.Generator().manual_seed(0))
    closed = yopo.PolicyPruner(ratio=RATIO, evidence=ids).fit(dense)
    learned = yopo.PolicyPruner(ratio=RATIO, evidence=ids, episodes=3, samples=2).fit(dense)
    assert closed.history == []
    assert len(learned.history) == 3
    for episode in learned.history:
        for values in (episode.loss, episode.reward, episode.gradient_norm):
            assert len(values) == 4
    ffns = yopo.find_ffns(dense)
    found = dict(zip(ffns, read_moments(dense, ffns, {"input_ids": ids}).values(), strict=True))

    def earned(plan):
        return sum(
            float(output_reward(m.second_FF, f.contract_weight(), plan.kept[f.name][None]))
            for f, m in found.items()
        )

    assert earned(learned.plan(dense)) >= earned(closed.plan(dense)) - 1e-9


def test_one_policy_serves_other_ratios_and_another_architecture(dense, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "ffn_dim": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = OPTForCausalLM(OPTConfig(vocab_size=96, word_embed_proj_dim=48, **sizes))
    pruner = yopo.PolicyPruner(ratio=RATIO, reward="spectral", episodes=3).fit(dense)
    pruner.save_policy(tmp_path)
    loaded = yopo.PolicyPruner.from_policy(tmp_path)
    for ratio in (0.1, 0.5):
        assert loaded.plan(other, ratio) == pruner.plan(other, ratio)
        assert loaded.plan(dense, ratio) == pruner.plan(dense, ratio)
    loaded.prune(other, 0.5)
    assert other.config.ffn_dim == 80


def test_a_policy_on_the_callers_tokens_asks_for_them_again(dense, tokens, tmp_path):
    text = tokens[:2048].view(-1, 128)
    pruner = yopo.PolicyPruner(evidence=text).fit(dense)
    pruner.save_policy(tmp_path)
    with pytest.raises(yopo.InvalidArgumentError, match="evidence"):
        yopo.PolicyPruner.from_policy(tmp_path)
    again = yopo.PolicyPruner.from_policy(tmp_path, evidence=text)
    assert again.plan(dense) == pruner.plan(dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_it_went_in(dense, tokens, dtype):
    half = copy.deepcopy(dense).to(dtype)
    yopo.PolicyPruner(evidence=tokens[:4096].view(-1, 256)).fit(half).prune(half, 0.2)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert perplexity(half, tokens, window=256) < 1.1 * perplexity(dense, tokens, window=256)


def test_one_token_for_ever_is_poor_evidence_but_does_no_harm(dense, tokens):
    silent = torch.full((4, 32), 7)
    pruned = yopo.PolicyPruner(evidence=silent).fit(dense).prune(copy.deepcopy(dense), 0.1)
    assert perplexity(pruned, tokens, window=256) < 10 * perplexity(dense, tokens, window=256)
