"""Train adapters on windows of text, and return the best, with the model left as it was.

Shapes: N windows, W tokens a window, V vocabulary.
"""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, YopoError
from yopo.ranks import rank_and_count
from yopo.recovery.adapter import Trained, put_on
from yopo.recovery.folder import BEST, RecoveryFolder
from yopo.recovery.keeping import activations_checkpointed, put_back, remember_modules
from yopo.recovery.masks import keep_zeros
from yopo.recovery.schedule import Schedule
from yopo.recovery.settings import RecoverySettings, rate_for
from yopo.recovery.targets import Places

logger = logging.getLogger(__name__)


def train_adapters(
    model: Any,
    places: Places,
    settings: RecoverySettings,
    *,
    text_NW: Tensor,
    validation_NW: Tensor,
    teacher: nn.Module | None,
    folder: RecoveryFolder | None,
    to_merge: bool,
    seed: int,
) -> Trained:
    """Train adapters on `model`, which is as it was afterwards, and return the best.

    Those that are to be merged learn what they will be once merged: changes of no weight of a
    sparse matrix that is zero.

    Ctrl-C ends training early: without a folder the best adapter so far is returned, and a warning
    says so. So does a loss that becomes NaN.

    Raises:
        YopoError: If the loss becomes NaN before anything is won, or a checkpoint cannot be
            written.
        InvalidArgumentError: If the ranks cannot share a batch evenly.
    """
    from yopo.recovery.trainer import Best

    words = len(model.get_input_embeddings().weight)
    schedule = Schedule.of(
        settings, windows=len(text_NW), length=text_NW.shape[1], vocabulary=words
    )
    checkpoint = None if folder is None else folder.last_checkpoint()
    so_far = None if checkpoint is None else Trained.load(checkpoint / BEST)
    if so_far is not None and so_far.waited >= settings.patience:
        return so_far  # training had ended, and was interrupted before that was written down
    best = Best(settings.patience, so_far)
    with ExitStack() as stack:
        stack.enter_context(put_back(remember_modules(model)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = put_on(model, places, settings)
        if to_merge:
            keep_zeros(adapted)
        stack.enter_context(activations_checkpointed(model, settings.gradient_checkpointing))
        if folder is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yopo-recover-")))
        else:
            path = folder.path
        arguments = _arguments(
            model,
            settings,
            schedule,
            path,
            saves=folder is not None,
            looks_first=checkpoint is None,
            may_idle=places.may_idle,
            seed=seed,
        )
        trainer = _trainer(
            adapted,
            arguments,
            best,
            teacher,
            text=text_NW[: schedule.windows],
            validation=validation_NW,
        )
        may_end_early = folder is None and rank_and_count()[1] == 1
        _run(trainer, best, checkpoint, may_end_early=may_end_early)
    return best.trained


def _run(trainer: Any, best: Any, checkpoint: Path | None, *, may_end_early: bool) -> None:
    """Train, and see to it that what has been won is not lost.

    Raises:
        YopoError: If the loss becomes NaN before anything is won.
    """
    from yopo.recovery.trainer import DivergedError

    if checkpoint is not None:
        logger.info("Going on from `%s`.", checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        if best.trained.step == 0:
            raise YopoError(
                f"{error}, before anything was won; the model is as it was. Use a smaller "
                "`learning_rate` in the `settings`, or load the model in a wider `dtype`."
            ) from error
        logger.warning("%s: the best adapter, of step %d, is kept.", error, best.trained.step)
    except KeyboardInterrupt:
        if best.trained.step == 0 or not may_end_early:
            raise
        logger.warning(
            "Interrupted at step %d of %d: the best adapter, of step %d, is kept.",
            trainer.state.global_step,
            trainer.state.max_steps,
            best.trained.step,
        )
    finally:
        trainer.accelerator.free_memory()


def _trainer(
    adapted: Any,
    arguments: Any,
    best: Any,
    teacher: nn.Module | None,
    *,
    text: Tensor,
    validation: Tensor,
) -> Any:
    from transformers import PrinterCallback

    from yopo.recovery.trainer import Progress, RecoveryTrainer

    trainer = RecoveryTrainer(
        teacher=teacher,
        best=best,
        model=adapted,
        args=arguments,
        train_dataset=_rows(text),
        eval_dataset=_rows(validation),
        data_collator=_stack,
        callbacks=[best],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(Progress())
    return trainer


def _arguments(
    model: Any,
    settings: RecoverySettings,
    schedule: Schedule,
    path: Path,
    *,
    saves: bool,
    looks_first: bool,
    may_idle: bool,
    seed: int,
) -> Any:
    """Return the arguments of the Trainer.

    Raises:
        InvalidArgumentError: If the Trainer does not see the ranks that are there.
    """
    from transformers import TrainingArguments

    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    dtypes = set() if on_cpu else {parameter.dtype for parameter in model.parameters()}
    arguments = TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=schedule.micro,
        per_device_eval_batch_size=schedule.micro,
        gradient_accumulation_steps=schedule.passes,
        num_train_epochs=settings.epochs,
        learning_rate=rate_for(settings, model.get_input_embeddings().weight.shape[1]),
        warmup_steps=schedule.warmup,
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=schedule.every,
        eval_on_start=looks_first,
        save_strategy="steps" if saves else "no",
        save_steps=schedule.every,
        save_total_limit=2,
        logging_steps=schedule.every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=may_idle,
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpu,
        bf16=settings.bf16 or torch.bfloat16 in dtypes,
        fp16=torch.float16 in dtypes and not settings.bf16,
    )
    _, ranks = rank_and_count()
    if arguments.world_size != ranks:
        raise InvalidArgumentError(
            f"a process group of {ranks} ranks is running, of which accelerate sees "
            f"{arguments.world_size}: start them with `torchrun` or `accelerate launch`."
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a second one would get a copy of the model
    return arguments


def _rows(windows: Tensor) -> Sequence[dict[str, Tensor]]:
    return [{"input_ids": row} for row in windows]


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}
