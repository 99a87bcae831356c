"""`recover`: from a pruned model to one that has won back some of what it lost."""

import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from yopo.evidence import checksum_of
from yopo.generators import generators_put_back
from yopo.precision import in_float32
from yopo.ranks import check_agreement
from yopo.recovery.adapter import Trained, put_on, write_weights
from yopo.recovery.checks import check_call, check_installed, check_logits
from yopo.recovery.folder import RecoveryFolder, checksum
from yopo.recovery.keeping import (
    put_back,
    put_back_on_error,
    remember_modules,
    remember_state,
    remember_values,
    verbosity_put_back,
)
from yopo.recovery.masks import is_sparse, keep_zeros
from yopo.recovery.portions import portions_of
from yopo.recovery.settings import RecoverySettings, Targets, settings_by_name
from yopo.recovery.targets import Places
from yopo.recovery.texts import Data
from yopo.recovery.training import train_adapters
from yopo.surgery import interrupts_held

logger = logging.getLogger(__name__)


def recover(
    model: Any,
    data: Data = "self",
    *,
    teacher: nn.Module | None = None,
    tokenizer: Any = None,
    settings: RecoverySettings | str = "paper",
    targets: Targets = "both",
    validation: Data | None = None,
    merge: bool = True,
    output: str | Path | None = None,
    seed: int = 0,
) -> Any:
    """Train LoRA adapters on a pruned model, in place, and merge them into its weights.

    With a teacher, the dense model, the pruned one learns to predict what the teacher predicts,
    on text that the teacher writes or on any other. Without one it learns the next token of a
    text. The adapter kept is the one with the lowest loss on windows held out; where none is
    better than no adapter, the model stays as it is, and a warning says so.

    An error leaves the model as it was. So does Ctrl-C with `output`; without it, and where the
    loss becomes NaN, the best adapter so far is kept, and a warning says so. Under `torchrun` or
    `accelerate launch` each process calls this, the windows of a batch are shared out, and all end
    with the same weights.

    Args:
        model: A causal language model with FFNs.
        data: "self" for text that the teacher writes; or a text file, or JSON; strings; a data set
            with a column `text`; or token ids `(N, W)` or `(T,)`. Texts are joined by blank lines
            and cut into windows, the first of which are used.
        teacher: The dense model; needed for "self".
        tokenizer: Turns text into tokens; by default that of the folder or hub page that the model
            came from.
        settings: "paper", "published" for PruneNet's script, or a `RecoverySettings`.
        targets: Which matrices get an adapter: those of the "attention", of the "ffn", or "both".
        validation: Text to choose the best adapter by, as `data`; by default the last windows of
            `data`, a tenth of them and at most 64, which are not learned from.
        merge: Whether to merge the adapters into the weights, where every zero stays zero, or to
            return a `PeftModel`.
        output: Folder for checkpoints and at last the adapter. The same call goes on from there
            after an interruption. None writes no files.
        seed: Seed of all randomness, at least 0. The global generators are left as they were.

    Returns:
        The model; or, with `merge=False`, the `PeftModel` around it.

    Raises:
        InvalidArgumentError: If an argument is outside its range, there is too little text, the
            tokenizer or the teacher is not that of the model, or `output` holds something else.
        UnsupportedModelError: If the model is no causal language model, cannot be pruned, has
            weights or logits that are NaN or infinite, or has no such targets; or the teacher
            cannot write, or gives NaN.
        PolicyFileError: If files in `output` are damaged.
        YopoError: If peft or accelerate is missing, the loss becomes NaN before anything is won,
            or a file cannot be written.

    Example:
        >>> model = yopo.recover(model, teacher=dense)
    """
    check_installed()
    chosen = settings_by_name(settings)
    places = check_call(model, data, teacher, chosen, targets, seed)
    job = {
        "model": checksum_of(model).hex(),
        "teacher": None if teacher is None else checksum_of(teacher).hex(),
        "settings": asdict(chosen),
        "targets": targets,
        "seed": seed,
    }
    if is_sparse(model, places):
        job["merge"] = merge  # an adapter that keeps zeros is another than one that need not
        if not merge:
            logger.warning(
                "The model is sparse, and adapters that are not merged know of no zeros: merging "
                "them later fills those. `merge=True` keeps them."
            )
    with ExitStack() as stack:
        stack.enter_context(generators_put_back())
        stack.enter_context(verbosity_put_back())
        for name, each in (("model", model), ("teacher", teacher)):
            if each is not None:
                stack.enter_context(put_back(remember_state(each)))
                stack.enter_context(in_float32(each))
                check_logits(each.eval(), name)
        texts, folder = portions_of(
            model, data, teacher, tokenizer, chosen, validation, output, job
        )
        check_agreement("recover", job, {name: checksum(text) for name, text in texts.items()})
        if folder is not None:
            folder.begin(texts)
        trained = None if folder is None else folder.trained
        is_new = trained is None
        if trained is None:
            trained = train_adapters(
                model,
                places,
                chosen,
                text_NW=texts["text"],
                validation_NW=texts["validation"],
                teacher=teacher,
                folder=folder,
                to_merge=merge,
                seed=seed,
            )
    return _finished(model, places, chosen, trained, folder if is_new else None, merge)


def _finished(
    model: Any,
    places: Places,
    settings: RecoverySettings,
    trained: Trained,
    folder: RecoveryFolder | None,
    merge: bool,
) -> Any:
    """Put the adapter on the model, write it down, and merge it or leave it."""
    if trained.step == 0:
        logger.warning(
            "Recovery did not help: no adapter has a lower validation loss than none, %.4f nats. "
            "The model is as it was.",
            trained.first,
        )
    else:
        logger.info(
            "Validation loss %.4f nats before, %.4f after %d steps.",
            trained.first,
            trained.loss,
            trained.step,
        )
    matrices = [model.get_parameter(name) for name in places.names]
    undo = remember_modules(model), remember_state(model)
    with generators_put_back(), put_back_on_error(*undo):
        adapted = put_on(model, places, settings)
        write_weights(adapted, trained.weights)
        if folder is not None:
            folder.finish(adapted, trained)
        if not merge:
            return adapted.train(model.training)
        with put_back(*undo), interrupts_held():
            if trained.step > 0:
                keep_zeros(adapted, least=0.0)
                with put_back_on_error(remember_values(matrices)):
                    adapted.merge_and_unload()
    return model
