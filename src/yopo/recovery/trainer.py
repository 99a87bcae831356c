# ruff: noqa: ARG002 -- what the Trainer calls has fixed signatures
"""The Trainer of transformers, with a teacher, an eye on the loss, and a memory for the best.

Shapes: B windows, W tokens a window, V vocabulary. Whoever imports this has transformers imported.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils.logging import tqdm

from yopo.errors import YopoError
from yopo.ranks import failing_together
from yopo.recovery.adapter import Trained, read_weights, save_adapter
from yopo.recovery.folder import BEST, GOES_ON, seal
from yopo.recovery.losses import distillation_loss, next_token_loss


class DivergedError(YopoError, RuntimeError):
    """Report a loss that is NaN or infinite."""


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """Train on the next token, or on what a teacher predicts of it."""

    def __init__(self, *, teacher: nn.Module | None, best: "Best", **given: Any) -> None:
        """Keep the teacher out of sight of the Trainer, which would move and save it."""
        super().__init__(**given)
        self._teacher, self._best = teacher, best
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return the loss of some windows, on the device where the Trainer adds losses up."""
        ids_BW = inputs["input_ids"]
        student_BWV = model(input_ids=ids_BW, use_cache=False).logits
        if self._teacher is None:
            loss = next_token_loss(student_BWV, ids_BW.to(student_BWV.device))
        else:
            with torch.no_grad():
                here_BW = ids_BW.to(next(self._teacher.parameters()).device)
                teacher_BWV = self._teacher(input_ids=here_BW, use_cache=False).logits
            loss = distillation_loss(student_BWV, teacher_BWV.to(student_BWV.device))
        return loss.to(self.args.device)

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        """Do what the Trainer does, and stop on all ranks if the loss of one is not finite.

        Raises:
            DivergedError: If it is not.
        """
        loss: Tensor = super().training_step(*given, **named)
        if not self.accelerator.gather(loss.reshape(1)).isfinite().all():
            raise DivergedError(
                f"the loss became NaN or infinite at step {self.state.global_step + 1}"
            )
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of some windows, and no logits."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapters alone, without a pickle of the arguments."""
        save_adapter(self.model, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, and what says that it is whole when all ranks have done their part.

        Raises:
            YopoError: If one of them cannot, on all.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with failing_together():
                super()._save_checkpoint(model, trial)
            with failing_together():
                if self.args.should_save:
                    self._best.trained.save(folder / BEST)
                    seal(folder)
        except (OSError, RuntimeError, SafetensorError, YopoError) as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise YopoError(
                f"cannot write the checkpoint `{folder}`: {error}. {GOES_ON}"
            ) from error


class Best(TrainerCallback):  # type: ignore[misc]
    """Look at the validation loss, remember the best adapter, and end what gets no better.

    Args:
        patience: How many looks without a new best end the training.
        so_far: What an interrupted training had found.

    Attributes:
        trained: The best adapter so far.
    """

    def __init__(self, patience: int, so_far: Trained | None) -> None:
        """Begin with what is there."""
        self._patience = patience
        self.trained = so_far or Trained({}, math.inf, math.inf)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a last look."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Remember the adapter if it is the best, or count how long there has been none.

        Raises:
            YopoError: If the loss is not finite before training.
            DivergedError: If it is not later on.
        """
        loss, step = float(given["metrics"]["eval_loss"]), state.global_step
        if not math.isfinite(loss) and step == 0:
            raise YopoError(
                "the validation loss is NaN or infinite before training: the model, or the "
                "teacher, gives such logits. Mend the checkpoint, or load it in a wider `dtype`."
            )
        if not math.isfinite(loss):
            raise DivergedError(f"the validation loss became NaN or infinite at step {step}")
        before = self.trained
        if loss < before.loss:
            first = loss if step == 0 else before.first
            self.trained = Trained(read_weights(given["model"]), first, loss, step)
        else:
            self.trained = replace(before, waited=before.waited + 1)
            control.should_training_stop |= self.trained.waited >= self._patience


class Progress(TrainerCallback):  # type: ignore[misc]
    """Show the steps and the validation loss under the progress bar of transformers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(
            desc="recover", total=state.max_steps, initial=state.global_step, unit="step"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar."""
        self._bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show the validation loss."""
        self._bar.set_postfix({"validation": f"{given['metrics']['eval_loss']:.4f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self._bar.close()
