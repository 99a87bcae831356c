"""`yopo demo`: the whole job on one model, with the baselines beside it."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo import criteria
from yopo.adapters import find_ffns
from yopo.criteria import plan_by_criterion
from yopo.errors import InvalidArgumentError, UnsupportedModelError, YopoError
from yopo.evaluation import perplexity
from yopo.plots import plot_perplexities
from yopo.pruner import PolicyPruner
from yopo.report import format_table, sizes_of
from yopo.surgery import apply_plan

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHOWN = 0.3
"""The ratio at which the demo writes a text, saves and reloads."""

_SEEDS = (0, 1, 2)
_TOKENS = 8192
_WINDOW = 256


def run_demo(model_id: str | None, *, text: Path | None, output: Path) -> None:
    """Fit, prune at several ratios, compare, write, save, reload; print as it goes.

    Args:
        model_id: A model on the hub or on disk; None for the one that travels with yopo.
        text: Text to measure perplexity on; None for stories that no embedded model has seen.
        output: Folder for the table, the plot and the pruned model.

    Raises:
        InvalidArgumentError: If the text is too short or cannot be read.
        UnsupportedModelError: If the model is no causal language model, or has no tokenizer.
        YopoError: Whatever pruning raises.
    """
    started = time.perf_counter()
    model, tokenizer = _load(model_id)
    tokens_T = _tokens(tokenizer, text)
    output.mkdir(parents=True, exist_ok=True)
    dense = perplexity(model, tokens_T, window=_WINDOW)
    sizes = sizes_of(model, find_ffns(model))
    print(
        f"{model_id or 'the embedded LLaMA'}: {sizes.parameters:,} parameters, "
        f"{sizes.ffn_parameters / sizes.parameters:.0%} of them in {sizes.ffn_rows:,} FFN rows. "
        f"Perplexity on {len(tokens_T):,} held-out tokens: {dense:.3f}\n"
    )
    ours = PolicyPruner(ratio=SHOWN).fit(model)
    methods = _methods(model, ours)
    measured = {name: [method(ratio, tokens_T) for ratio in RATIOS] for name, method in methods}
    table = _table(model, measured)
    print(f"{table}\n")
    print(
        "Perplexity, lower is better. No method has seen a data set. Random rows and PruneNet are "
        f"means of {len(_SEEDS)} seeds.\nPruneNet keeps int((1 - ratio) * n) rows as published, "
        "the others the rounded width.\n"
    )
    (output / "table.md").write_text(f"dense: {dense:.3f}\n\n{table}\n", encoding="utf-8")
    try:
        plot_perplexities(
            output / "perplexity.png",
            RATIOS,
            measured,
            dense=dense,
            title=f"{Path(model_id).name if model_id else 'embedded LLaMA'}, pruned without data",
        )
    except YopoError as error:
        print(f"No plot: {error}")
    pruned = ours.prune(copy.deepcopy(model))
    _show_texts(model, pruned, tokenizer, tokens_T)
    _prove_reload(pruned, tokenizer, tokens_T, output / "pruned")
    print(f"\nTable, plot and model are in {output}. {time.perf_counter() - started:.0f} s.")


def _load(model_id: str | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from yopo.embedded import model_path

    source = model_id or str(model_path())
    dtype = "auto" if model_id else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(source)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the demo needs a causal language model with a tokenizer: {error}"
        ) from error


def _tokens(tokenizer: Any, text: Path | None) -> Tensor:
    """Return the tokens to measure on."""
    if text is None:
        from yopo.embedded.stories import HELD_OUT_SEED, write_text

        content = write_text(HELD_OUT_SEED, 8 * _TOKENS)
    else:
        try:
            content = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"`text` cannot be read: {error}.") from error
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[:_TOKENS], dtype=torch.int64)


def _methods(
    model: nn.Module, ours: PolicyPruner
) -> list[tuple[str, Callable[[float, Tensor], float]]]:
    """Return the methods by name: from a ratio and tokens to the perplexity that is left."""
    published = [PolicyPruner.prunenet(seed=seed).fit(model) for seed in _SEEDS]

    def by_criterion(criterion: criteria.Criterion, ratio: float) -> nn.Module:
        pruned = copy.deepcopy(model)
        apply_plan(pruned, plan_by_criterion(pruned, ratio, criterion=criterion))
        return pruned

    def mean(models: list[nn.Module], tokens_T: Tensor) -> float:
        return sum(perplexity(pruned, tokens_T, window=_WINDOW) for pruned in models) / len(models)

    def random_rows(ratio: float, tokens_T: Tensor) -> float:
        drawn = [by_criterion(criteria.random_rows(seed), ratio) for seed in _SEEDS]
        return mean(drawn, tokens_T)

    def row_norm(ratio: float, tokens_T: Tensor) -> float:
        return mean([by_criterion(criteria.row_norm, ratio)], tokens_T)

    def prunenet(ratio: float, tokens_T: Tensor) -> float:
        return mean([p.prune(copy.deepcopy(model), ratio) for p in published], tokens_T)

    def default(ratio: float, tokens_T: Tensor) -> float:
        return mean([ours.prune(copy.deepcopy(model), ratio)], tokens_T)

    return [
        ("random rows", random_rows),
        ("row norm", row_norm),
        ("PruneNet as published", prunenet),
        ("yopo", default),
    ]


def _table(model: nn.Module, measured: dict[str, list[float]]) -> str:
    ffns = find_ffns(model)
    dense = sizes_of(model, ffns)
    rows = [["ratio", "rows removed", "of all parameters", "MB", *measured]]
    for index, ratio in enumerate(RATIOS):
        plan = plan_by_criterion(model, ratio, criterion=criteria.row_norm)
        left = sizes_of(model, ffns, plan.widths)
        rows.append(
            [
                f"{ratio:.1f}",
                f"{plan.ratio_reached:.1%}",
                f"{1 - left.parameters / dense.parameters:.1%}",
                f"{left.bytes / 1e6:.2f}",
                *(f"{values[index]:.3f}" for values in measured.values()),
            ]
        )
    return format_table(rows)


def _show_texts(model: Any, pruned: Any, tokenizer: Any, tokens_T: Tensor) -> None:
    """Print what the model writes before and after, from the same beginning."""
    start_1T = tokens_T[None, :12].to(next(model.parameters()).device)
    for name, writer in (("before", model), (f"after, ratio {SHOWN}", pruned)):
        with torch.no_grad():
            ids = writer.generate(
                start_1T,
                attention_mask=torch.ones_like(start_1T),
                max_new_tokens=60,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )[0]
        written = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        print(f"{name}: {written}\n")


def _prove_reload(pruned: Any, tokenizer: Any, tokens_T: Tensor, path: Path) -> None:
    """Save, load with transformers alone, and compare every logit."""
    from transformers import AutoModelForCausalLM

    pruned.save_pretrained(path)
    tokenizer.save_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=pruned.dtype).eval()
    ids_1T = tokens_T[None, :64]
    with torch.no_grad():
        ours = pruned(ids_1T.to(pruned.device)).logits.cpu()
        theirs = loaded(ids_1T.to(loaded.device)).logits.cpu()
    verdict = "equal" if torch.equal(ours, theirs) else "DIFFERENT"
    print(f"Reloaded by AutoModelForCausalLM: all {ours.numel():,} logits are {verdict}.")
