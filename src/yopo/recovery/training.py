"""Train adapters on windows of text, and return the best, with the model left as it was.

Shapes: N windows, W tokens a window, V vocabulary.
"""

import logging
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yopo.errors import InvalidArgumentError, YopoError
from yopo.ranks import rank_and_count
from yopo.recovery.adapter import Trained, put_on
from yopo.recovery.folder import BEST, RecoveryFolder
from yopo.recovery.keeping import activations_checkpointed, put_back, remember_modules
from yopo.recovery.settings import RecoverySettings, rate_for
from yopo.recovery.targets import Places

logger = logging.getLogger(__name__)

_NUMBERS = 2**28
"""Logits of a forward pass: a gigabyte in float32."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Say how many windows are seen at a time, and for how many steps.

    Attributes:
        windows: Windows that are learned from, a multiple of a batch.
        micro: Windows a forward pass of a rank.
        passes: Forward passes of a rank a step.
        steps: Steps of the optimiser.
        every: Steps between two looks at the validation windows.
        warmup: Steps until the rate is at its height.
    """

    windows: int
    micro: int
    passes: int
    steps: int
    every: int
    warmup: int

    @classmethod
    def of(
        cls, settings: RecoverySettings, *, windows: int, length: int, vocabulary: int
    ) -> "Schedule":
        """Return the schedule that `settings` give for so many windows.

        Raises:
            InvalidArgumentError: If the ranks cannot share a batch evenly.
        """
        _, ranks = rank_and_count()
        batch = min(settings.batch, windows // ranks * ranks)
        if batch == 0 or batch % ranks:
            raise InvalidArgumentError(
                f"`batch={settings.batch}` cannot be shared evenly by {ranks} ranks with {windows} "
                "windows: use a multiple of their number, and more text than that."
            )
        share = batch // ranks
        most = settings.micro_batch or max(1, _NUMBERS // (length * vocabulary))
        micro = max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
        steps = windows // batch * settings.epochs
        warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
        return cls(
            windows=windows // batch * batch,
            micro=micro,
            passes=share // micro,
            steps=steps,
            every=settings.evaluate_every or math.ceil(steps / 10),
            warmup=math.ceil(warmup),
        )


def train_adapters(
    model: Any,
    places: Places,
    settings: RecoverySettings,
    *,
    text_NW: Tensor,
    validation_NW: Tensor,
    teacher: nn.Module | None,
    folder: RecoveryFolder | None,
    seed: int,
) -> Trained:
    """Train adapters on `model`, which is as it was afterwards, and return the best.

    Ctrl-C ends training early: without a folder the best adapter so far is returned, and a warning
    says so. So does a loss that becomes NaN.

    Raises:
        YopoError: If the loss becomes NaN before anything is won, or a checkpoint cannot be
            written.
        InvalidArgumentError: If the ranks cannot share a batch evenly.
    """
    from yopo.recovery.trainer import Best, DivergedError

    words = len(model.get_input_embeddings().weight)
    schedule = Schedule.of(
        settings, windows=len(text_NW), length=text_NW.shape[1], vocabulary=words
    )
    checkpoint = None if folder is None else folder.last_checkpoint()
    best = Best(settings.patience, None if checkpoint is None else Trained.load(checkpoint / BEST))
    with ExitStack() as stack:
        stack.enter_context(put_back(remember_modules(model)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = put_on(model, places, settings)
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
            if best.trained.step == 0 or folder is not None or rank_and_count()[1] > 1:
                raise
            logger.warning(
                "Interrupted at step %d of %d: the best adapter, of step %d, is kept.",
                trainer.state.global_step,
                schedule.steps,
                best.trained.step,
            )
        finally:
            trainer.accelerator.free_memory()
    return best.trained


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
