"""Prune by a criterion, a formula and a reward of your own, and judge them on held-out text."""

import copy
import math

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

import yopo
from yopo.embedded import model_path
from yopo.embedded.stories import HELD_OUT_SEED, write_text

tokenizer = AutoTokenizer.from_pretrained(model_path())
dense = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def read(seed, tokens):
    """Return so many tokens `(T,)` of stories that the model was not trained on."""
    return tokenizer(write_text(seed, 6 * tokens), return_tensors="pt").input_ids[0, :tokens]


seen, held_out = read(HELD_OUT_SEED + 1, 512), read(HELD_OUT_SEED, 1024)


def unlike_others(ffn):
    """Score rows `(F,)` by the norm of their column, and by how unlike any other row they are."""
    gate_FD = normalize(ffn.expand_weights()[0].float())
    likeness_FF = (gate_FD @ gate_FD.T).abs().fill_diagonal_(0)
    return ffn.contract_weight().float().norm(dim=1) * (1 - likeness_FF.amax(dim=1))


def silence(ffn, kept_K):
    """Let an FFN run on its kept rows alone, until the hook that is returned is removed."""
    mask_F = torch.zeros(ffn.rows)
    mask_F[kept_K] = 1
    return ffn.contract.module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask_F,))


def log_likelihood(model, kept):
    """Earn the log-likelihood of a token of `seen`, `(M,)`: one for each draw of rows `(M, K)`."""
    ffns = yopo.find_ffns(model)
    earned = []
    for draw in range(len(kept[ffns[0].name])):
        hooks = [silence(ffn, kept[ffn.name][draw]) for ffn in ffns]
        try:
            earned.append(-math.log(yopo.perplexity(model, seen)))
        finally:
            for hook in hooks:
                hook.remove()
    return torch.tensor(earned)


def by_criterion(criterion):
    """Return the dense model without the rows that a criterion scores lowest."""
    model = copy.deepcopy(dense)
    yopo.apply_plan(model, yopo.plan_by_criterion(model, 0.3, criterion=criterion))
    return model


def by_pruner(**settings):
    """Return the dense model pruned by yopo's recipe for weights alone, which is quick."""
    model = copy.deepcopy(dense)
    return yopo.PolicyPruner(evidence="weights", **settings).fit(model).prune(model, 0.3)


formula = yopo.symbolic.Expression.parse("mul(mul(gate_norm, up_norm), sqrt(down_norm))")
models = {"dense": dense}
for seed in range(3):
    models[f"random rows, seed {seed}"] = by_criterion(yopo.criteria.random_rows(seed))
models |= {
    "own criterion": by_criterion(unlike_others),
    "own formula": by_criterion(yopo.symbolic.row_criterion(formula)),
    "closed form": by_pruner(),
    "own reward": by_pruner(reward=log_likelihood, episodes=2, samples=4),
}
for name, model in models.items():
    print(f"{name:>19}: perplexity {yopo.perplexity(model, held_out):.3f}")
