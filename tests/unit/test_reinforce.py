import random
import statistics
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from yopo.adapters import Ffn, Slot
from yopo.errors import InvalidArgumentError
from yopo.features import FEATURES, row_features
from yopo.policy import Policy, Recipe
from yopo.published import learn_as_published
from yopo.reinforce import explore, learn, leave_one_out
from yopo.reward import spectral_rewards
from yopo.sampling import best_rows, draw_log_probability


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_ffn(rows, columns, name="mlp", seed=0):
    """Make an FFN whose rows differ in length, as those of trained models do."""
    generator = seeded(seed)
    scale = torch.randn(rows, 1, generator=generator).exp()
    slots = []
    for _ in range(3):
        linear = nn.Module()
        linear.weight = nn.Parameter(torch.randn(rows, columns, generator=generator) * scale)
        slots.append(Slot(linear, "weight", 0))
    return Ffn(name, name, rows, tuple(slots[:2]), slots[2])


def recipe(**changes):
    fields = {"method": "features", "reward": "spectral", "ratio": 0.5, "multiple_of": 1}
    training = {"episodes": 4, "samples": 4, "learning_rate": 0.3, "discount": 0.9, "seed": 0}
    return Recipe(**fields | training | changes)


def unordered(ffns):
    """An elimination that drops the rows as they come."""
    return {ffn.name: torch.arange(ffn.rows) for ffn in ffns}


def learn_spectrally(ffns, training, widths):
    return learn(ffns, training, widths, spectral_rewards(ffns))


def spectral_distance(weight, kept):
    dense, part = (torch.linalg.svdvals(w.detach().double()) for w in (weight, weight[kept]))
    return ks_2samp(dense.numpy(), part.numpy()).statistic


def every_draw(ffn, keep):
    """Return all ordered draws `(M, K)`, and what each earns."""
    orders = torch.tensor(list(permutations(range(ffn.rows), keep)))
    gate = ffn.expand_weights()[0]
    earned = {
        rows: 1 / spectral_distance(gate, list(rows))
        for rows in {tuple(sorted(order)) for order in orders.tolist()}
    }
    rewards = [earned[tuple(sorted(order))] for order in orders.tolist()]
    return orders, torch.tensor(rewards, dtype=torch.float64)


def exact_gradient(ffn, keep, weights):
    """Return the gradient of the expected reward in units of the reward's standard deviation."""
    orders, rewards = every_draw(ffn, keep)
    weights = weights.double().requires_grad_()
    log_probability = draw_log_probability(row_features(ffn).double() @ weights, orders)
    probability = log_probability.exp()
    assert float(probability.detach().sum()) == pytest.approx(1.0)
    mean = (probability * rewards).sum()
    spread = (probability.detach() * (rewards - mean.detach()).square()).sum().sqrt()
    (gradient,) = torch.autograd.grad(mean, weights)
    return gradient / spread


class Recorder:
    """Stand in for an optimiser: remember the gradients, move nothing."""

    seen: list

    def __init__(self, parameters, **settings):
        self.parameters = list(parameters)

    def step(self):
        Recorder.seen.append([parameter.grad.clone() for parameter in self.parameters])


@pytest.fixture
def recorded(monkeypatch):
    Recorder.seen = []
    monkeypatch.setattr("torch.optim.AdamW", Recorder)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, norm: None)
    return Recorder.seen


@pytest.mark.parametrize("at_start", [True, False])
def test_the_estimated_gradient_is_the_exact_one_up_to_the_noise_of_many_draws(
    recorded, monkeypatch, at_start
):
    weights = torch.zeros(len(FEATURES))
    if not at_start:
        weights = 0.4 * torch.randn(len(FEATURES), generator=seeded(5))
    start = classmethod(lambda cls, recipe: cls(recipe, {"weights_P": weights}))
    monkeypatch.setattr(Policy, "at_start", start)
    ffns = [make_ffn(6, 4, "a", seed=1), make_ffn(5, 4, "b", seed=2)]
    samples = 40_000
    training = recipe(episodes=1, samples=samples, discount=0.7)
    ((episode, _),) = learn_spectrally(ffns, training, {"a": 3, "b": 3})
    exact = [exact_gradient(ffn, 3, weights) for ffn in ffns]
    ((estimate,),) = recorded
    expected = -(exact[0] + 0.7 * exact[1]) / 2
    # A coordinate of ∇log p has the size of a feature, about 1 a drawn row.
    torch.testing.assert_close(estimate.double(), expected, rtol=0, atol=6 * 3 / samples**0.5)
    assert float(expected.norm()) > 10 * 3 / samples**0.5
    for norm, gradient, discount in zip(episode.gradient_norm, exact, (1, 0.7), strict=True):
        assert norm == pytest.approx(discount * float(gradient.norm()), abs=0.1)
    for index, ffn in enumerate(ffns):
        orders, rewards = every_draw(ffn, 3)
        logits = row_features(ffn).double() @ weights.double()
        probability = draw_log_probability(logits, orders).exp()
        assert episode.reward[index] == pytest.approx(float(probability @ rewards), rel=0.02)
        assert episode.ks[index] == pytest.approx(float(probability @ (1 / rewards)), rel=0.02)


def test_the_leave_one_out_baseline_leaves_the_gradient_unbiased():
    """Enumerate all pairs of draws: before the division by the spread nothing is lost or added."""
    ffn = make_ffn(5, 4, seed=3)
    orders, rewards = every_draw(ffn, 2)
    logits = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    log_probability = draw_log_probability(logits, orders)
    probability = log_probability.detach().exp()
    mean = (log_probability.exp() * rewards).sum()
    (exact,) = torch.autograd.grad(mean, logits, retain_graph=True)
    scores = torch.stack(
        [torch.autograd.grad(one, logits, retain_graph=True)[0] for one in log_probability]
    )
    estimate = torch.zeros(5, dtype=torch.float64)
    for i in range(len(orders)):
        for j in range(len(orders)):
            pair = rewards[[i, j]]
            advantage = leave_one_out(pair) * pair.std().clamp_min(1e-12)
            chance = probability[i] * probability[j]
            estimate += chance * (advantage[0] * scores[i] + advantage[1] * scores[j]) / 2
    torch.testing.assert_close(estimate, exact, rtol=1e-9, atol=1e-9)


def test_advantages_compare_each_reward_with_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    expected = torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5], dtype=torch.float64) / np.std(
        [1, 2, 6], ddof=1
    )
    torch.testing.assert_close(leave_one_out(rewards), expected)
    torch.testing.assert_close(leave_one_out(rewards * 1e6 - 3), expected)
    assert leave_one_out(torch.full((4,), 99999.0)).tolist() == [0.0] * 4


@pytest.mark.parametrize("learning", [learn_spectrally, learn_as_published])
def test_every_episode_is_recorded_for_every_layer(learning):
    ffns = [make_ffn(24, 8, f"layers.{i}", seed=i) for i in range(3)]
    trained = list(learning(ffns, recipe(episodes=4), {ffn.name: 12 for ffn in ffns}))
    assert [episode.number for episode, _ in trained] == [0, 1, 2, 3]
    for episode, _ in trained:
        for values in (episode.loss, episode.reward, episode.ks, episode.gradient_norm):
            assert len(values) == 3
            assert all(isinstance(value, float) and np.isfinite(value) for value in values)
        assert all(0 < ks <= 1 for ks in episode.ks)
        assert all(reward >= 1 for reward in episode.reward)
        if learning is learn_spectrally:
            assert len(episode.best_ks) == 3
        else:
            assert episode.best_ks == ()
    assert all(norm > 0 for norm in trained[0][0].gradient_norm)


def test_the_policy_that_is_kept_prefers_the_best_rows_of_all_episodes():
    ffns = [make_ffn(40, 8, f"layers.{i}", seed=i) for i in range(2)]
    least = float("inf")
    for episode, policy in learn_spectrally(
        ffns, recipe(episodes=8), {ffn.name: 20 for ffn in ffns}
    ):
        least = min(least, sum(episode.best_ks))
        distances = []
        for ffn in ffns:
            best = policy.log_odds(ffn).argsort(descending=True, stable=True)[:20].sort().values
            distances.append(spectral_distance(ffn.expand_weights()[0], best))
        if episode.number < 7:
            assert sum(distances) == pytest.approx(least, abs=1e-9)
    assert sum(distances) < least + 1e-9  # what the last step brought is looked at as well


def test_what_one_episode_learns_is_not_lost():
    ffns = [make_ffn(24, 8)]

    def reward(kept):
        return kept["mlp"].double().mean(dim=1)  # the higher the rows, the better

    training = recipe(episodes=1, samples=64, reward="custom")
    ((episode, policy),) = explore(ffns, training, {"mlp": 12}, reward, unordered(ffns))
    start = Policy.at_start(training)
    assert not torch.equal(policy.tensors["weights_P"], start.tensors["weights_P"])
    assert (episode.ks, episode.best_ks) == ((), ())

    def mean_row(tried):
        return best_rows(tried.log_odds(ffns[0]), keep=12).double().mean()

    assert mean_row(policy) > mean_row(start)


def test_drawn_policies_earn_more_from_episode_to_episode():
    ffns = [make_ffn(60, 8, f"layers.{i}", seed=i) for i in range(2)]
    keeps = {ffn.name: 30 for ffn in ffns}

    def reward(kept):
        """Count the rows whose gates are the longest, which the start does not look at."""
        return torch.stack(
            [
                torch.isin(kept[ffn.name], ffn.expand_weights()[0].norm(dim=1).topk(30).indices)
                .double()
                .mean(dim=1)
                for ffn in ffns
            ]
        )

    trained = list(
        explore(ffns, recipe(episodes=20, reward="custom"), keeps, reward, unordered(ffns))
    )
    first, last = (
        statistics.fmean(r for episode, _ in part for r in episode.reward)
        for part in (trained[:4], trained[-4:])
    )
    assert last > first + 0.1
    start, best = (
        policy.tensors["weights_P"][FEATURES.index("log_norm_gate")]
        for policy in (Policy.at_start(recipe(reward="custom")), trained[-1][1])
    )
    assert best > start


def test_the_discount_decides_which_ffn_counts():
    ffns = [make_ffn(24, 8, f"layers.{i}", seed=0) for i in range(2)]  # twins keep the same rows
    keeps = {ffn.name: 12 for ffn in ffns}

    def reward(kept):
        height_M = kept["layers.0"].double().mean(dim=1)
        return torch.stack([height_M, -2 * height_M])

    heights = []
    for discount in (0.1, 1.0):
        training = recipe(reward="custom", discount=discount)
        *_, (_, policy) = explore(ffns, training, keeps, reward, unordered(ffns))
        odds = policy.log_odds(ffns[0], unordered(ffns)["layers.0"])
        heights.append(best_rows(odds, keep=12).double().mean())
    assert heights[0] > heights[1]


@pytest.mark.parametrize(
    "returned", [1.0, torch.zeros(4), torch.zeros(2, 5), torch.full((5,), torch.nan), None]
)
def test_a_reward_that_is_none_is_refused(returned):
    ffns = [make_ffn(24, 8)]
    with pytest.raises(InvalidArgumentError, match=r"`reward` must return finite numbers.*\(5,\)"):
        next(
            explore(
                ffns, recipe(reward="custom"), {"mlp": 12}, lambda kept: returned, unordered(ffns)
            )
        )


def test_one_reward_for_all_ffns_is_as_good_as_the_same_for_each():
    ffns = [make_ffn(24, 8, f"layers.{i}", seed=i) for i in range(2)]
    keeps = {ffn.name: 12 for ffn in ffns}

    def one(kept):
        return sum(kept_MK.double().mean(dim=1) for kept_MK in kept.values())

    def each(kept):
        return one(kept).expand(2, -1)

    (*_, (last, policy)), (*_, (again, same)) = (
        explore(ffns, recipe(reward="custom", discount=1.0), keeps, reward, unordered(ffns))
        for reward in (one, each)
    )
    assert last == again
    assert torch.equal(policy.tensors["weights_P"], same.tensors["weights_P"])


@pytest.mark.parametrize("learning", [learn_spectrally, learn_as_published])
@pytest.mark.parametrize("ratio_kept", [1, 24])
def test_keeping_one_row_and_keeping_all_rows_are_no_special_cases(learning, ratio_kept):
    ffns = [make_ffn(24, 8)]
    for episode, policy in learning(ffns, recipe(episodes=3), {"mlp": ratio_kept}):
        assert np.isfinite([*episode.loss, *episode.gradient_norm]).all()
        assert all(torch.isfinite(tensor).all() for tensor in policy.tensors.values())
        if ratio_kept == 24:
            assert episode.ks == (0.0,)
            assert episode.reward == (99999.0,)


@pytest.mark.parametrize("learning", [learn_spectrally, learn_as_published])
@pytest.mark.parametrize("change", ["zero rows", "all zero", "equal rows"])
def test_degenerate_weights_give_no_nan(learning, change):
    ffn = make_ffn(24, 8)
    with torch.no_grad():
        for slot in (*ffn.expand, ffn.contract):
            if change == "zero rows":
                slot.parameter[::3] = 0
            elif change == "all zero":
                slot.parameter.zero_()
            else:
                slot.parameter.copy_(slot.parameter[:1].expand(24, -1))
    for episode, policy in learning([ffn], recipe(episodes=3), {"mlp": 12}):
        assert np.isfinite([*episode.loss, *episode.gradient_norm, *episode.reward]).all()
        assert all(torch.isfinite(tensor).all() for tensor in policy.tensors.values())


@pytest.mark.parametrize("learning", [learn_spectrally, learn_as_published])
def test_the_same_seed_learns_the_same_to_the_bit_and_touches_no_global_generator(learning):
    def run(seed):
        ffns = [make_ffn(24, 8, "mlp", seed=1)]
        return list(learning(ffns, recipe(seed=seed), {"mlp": 12}))

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    python_state = random.getstate()
    one, same, other = run(3), run(3), run(4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    assert [episode for episode, _ in one] == [episode for episode, _ in same]
    for name, tensor in one[-1][1].tensors.items():
        assert torch.equal(tensor, same[-1][1].tensors[name])
    assert [episode for episode, _ in one] != [episode for episode, _ in other]


@pytest.mark.parametrize("learning", [learn_spectrally, learn_as_published])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_does_not_depend_on_the_mode_dtype_or_device_of_the_caller(learning, mode):
    ffns, widths = [make_ffn(24, 8)], {"mlp": 12}
    expected = [episode for episode, _ in learning(ffns, recipe(), widths)]
    torch.set_default_dtype(torch.float64)
    try:
        with mode(), torch.device("meta"):
            assert [episode for episode, _ in learning(ffns, recipe(), widths)] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_learning_leaves_the_mode_of_the_caller_between_episodes():
    ffns = [make_ffn(24, 8)]
    for _ in learn_spectrally(ffns, recipe(), {"mlp": 12}):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        for _ in learn_spectrally(ffns, recipe(), {"mlp": 12}):
            assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("kl", [False, True])
def test_the_published_loop_is_that_of_the_reference(kl):
    """Repeat it in the reference's own terms: two linear maps, probabilities, AdamW's defaults."""
    ffns = [make_ffn(20, 8, "a", seed=1), make_ffn(20, 8, "b", seed=2)]
    training = recipe(method="prunenet", samples=1, kl=kl, seed=11, learning_rate=1e-2)
    *_, (last, policy) = learn_as_published(ffns, training, {"a": 9, "b": 9})

    generator = seeded(11)
    bound = 8**-0.5
    a = nn.Parameter((2 * torch.rand(20, 8, generator=generator) - 1) * bound)
    b = nn.Parameter((2 * torch.rand(20, generator=generator) - 1) * bound)
    s = nn.Parameter(torch.rand(20, generator=generator))
    optimizer = torch.optim.AdamW([a, b, s], lr=1e-2)
    weights = [ffn.expand_weights()[0] for ffn in ffns]

    def uniform():
        return torch.rand(20, generator=generator, dtype=torch.float64)

    def keep_probability(weight, noise):
        alpha = torch.sigmoid((weight @ a.T + b) @ s).double()
        logit = alpha.log() - (1 - alpha).log() + noise.log() - (1 - noise).log()
        return alpha, torch.sigmoid(logit)

    for _ in range(4):
        drawn, earned = [], []
        for weight in weights:
            with torch.no_grad():
                _, probability = keep_probability(weight, uniform())
            # A draw without replacement: the largest of log p plus Gumbel noise.
            gumbel = -(-uniform().log()).log()
            kept = (probability.log() + gumbel).topk(9).indices
            drawn.append(kept)
            earned.append(1 / spectral_distance(weight, kept))
        losses, norms = [], []
        for depth, (weight, kept) in enumerate(zip(weights, drawn, strict=True)):
            alpha, probability = keep_probability(weight, uniform())
            loss = -probability[kept].log().sum() * earned[depth] * 0.9**depth
            losses.append(float(loss.detach()))
            if kl:
                fair = torch.tensor(0.5, dtype=torch.float64)
                entropy = -(1 - alpha) * alpha.log() - alpha * (1 - alpha).log()
                loss = loss + (entropy + fair.log()).sum()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(sum(p.grad.square().sum() for p in (a, b, s)).sqrt()))
            optimizer.step()
    assert last.reward == pytest.approx(earned, rel=1e-6)
    assert last.loss == pytest.approx(losses, rel=1e-3)
    assert last.gradient_norm == pytest.approx(norms, rel=1e-3)
    torch.testing.assert_close(policy.tensors["vector_D"], (s @ a).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(policy.tensors["constant"], (s @ b).detach(), rtol=1e-3, atol=1e-4)
