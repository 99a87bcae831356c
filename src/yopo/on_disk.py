"""Prune checkpoints on disk, larger than memory or not."""

import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from yopo.budget import RatioOf
from yopo.calls import Verbatim, lasting, written_call
from yopo.card import set_aside
from yopo.checkpoint import Checkpoint, open_checkpoint
from yopo.errors import InvalidArgumentError
from yopo.parallel import map_on_threads
from yopo.plan import PruningPlan
from yopo.pruner import PolicyPruner
from yopo.pruning_report import REPORT_FILE, PruningReport, report_of
from yopo.ranks import check_agreement, failing_together, own, rank_and_count
from yopo.report import Sizes, sizes_of
from yopo.restore import Restored
from yopo.rewriting import Rewriting, write_other_files
from yopo.shards import read_header, write_shard
from yopo.staging import check_space, check_target, staged, staging_folder
from yopo.surgery import apply_plan, check_plan

_RESTORED = ".restored"
"""Folder below the staged one that holds re-solved matrices until they are written."""


def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    ratio: float | None = None,
    *,
    pruner: PolicyPruner | None = None,
    plan: PruningPlan | None = None,
    ratio_of: RatioOf = "ffn",
    parameters: float | None = None,
    bytes: float | None = None,
    layers: Iterable[int | str] | None = None,
    command: str | None = None,
) -> PruningPlan:
    """Write a pruned copy of a checkpoint, without ever building the model.

    Of the weights, one FFN at a time is mapped into memory and decided on. Then each file is
    written anew: what stays as it is goes from disk to disk, matrices of FFNs are cut a part at a
    time. The result equals, tensor by tensor, the same model loaded, pruned by the same pruner,
    whose evidence is weights, and saved; names and shards are those of the source, and every other
    file of the folder comes along, but for weights in other formats. Beside them lie a model card,
    `README.md`, and a report, `pruning_report.json`; the card of the source becomes
    `README.dense.md`.

    `target` is there whole or not at all: it is written under another name, and a run that was
    killed is started over by the next. Where `torchrun` has started several processes, each calls
    this, and they share the layers and the shards; source and target must be on a disk that all
    see.

    Args:
        source: A folder of safetensors files, or the name of a model on the hub.
        target: The folder to write; it must not be there, or be empty.
        ratio: Share to remove, in [0, 1); by default the ratio of the pruner.
        pruner: Decides on rows; one that has no policy yet is fitted on the source. By default
            `PolicyPruner.lean()`, which needs no more memory than a few matrices of one FFN.
        plan: Which rows stay, if that is decided already; nothing is restored then.
        ratio_of: As for `PolicyPruner.plan`.
        parameters: As for `PolicyPruner.plan`.
        bytes: As for `PolicyPruner.plan`.
        layers: As for `PolicyPruner.plan`.
        command: What made the checkpoint, for card and report; by default this call.

    Returns:
        The plan that was applied. What was removed is told by `PruningReport.load(target)`.

    Raises:
        InvalidArgumentError: If `target` is not empty or lies inside the source, files are missing
            or damaged, another process writes the same target, `pruner` is none, `plan` comes with
            a pruner or a size, or as `PolicyPruner.plan`.
        UnsupportedModelError: If the weights are pickles, quantised or an adapter, or as
            `PolicyPruner.plan`.
        PolicyMismatchError: If the policy scores rows of another width.
        YopoError: If another rank of the run failed.
        OSError: If there is no such model, or the disk is full.

    Example:
        >>> plan = yopo.prune_checkpoint("llama", "llama-smaller", 0.3)
    """
    layers = lasting(layers)
    call = written_call(
        "yopo.prune_checkpoint",
        str(source),
        Verbatim("target"),
        ratio,
        pruner=None if pruner is None else Verbatim(pruner),
        plan=None if plan is None else Verbatim("plan"),
        ratio_of=None if ratio_of == "ffn" else ratio_of,
        parameters=parameters,
        bytes=bytes,
        layers=layers,
    )
    target = Path(target)
    _check_asked(plan, ratio_of, ratio, pruner, parameters, bytes, layers)
    is_first = rank_and_count()[0] == 0
    check_agreement("prune_checkpoint", Path(source).absolute(), target.absolute())
    with ExitStack() as stack:
        with failing_together():  # all wait until the folder is there
            check_target(target, Path(source))
            checkpoint = open_checkpoint(source)
            folder = stack.enter_context(staged(target)) if is_first else staging_folder(target)
        started = time.perf_counter()
        if plan is None:
            pruner = PolicyPruner.lean() if pruner is None else pruner
            plan = _decide(checkpoint, folder, pruner, ratio, ratio_of, parameters, bytes, layers)
        decided = time.perf_counter()
        sizes = _write(checkpoint, folder, plan)
        report = (report_of if pruner is None else pruner.note)(
            checkpoint.model,
            plan,
            sizes=sizes,
            call=command or call,
            source=source,
            seconds={"decide": decided - started, "cut": time.perf_counter() - decided},
        )
        with failing_together():  # and until it has its name
            if is_first:
                shutil.rmtree(folder / _RESTORED, ignore_errors=True)
                _write_card(folder, report)
            stack.close()
    return plan


def _check_asked(plan: object, ratio_of: str, ratio: object, pruner: object, *more: object) -> None:
    """Check that a pruner is one, and that nothing says how much goes where there is a plan."""
    asked = (ratio, pruner, *more)
    if plan is not None and (ratio_of != "ffn" or any(value is not None for value in asked)):
        raise InvalidArgumentError(
            "`plan` says already which rows stay: give it alone, or say how much goes."
        )
    if not isinstance(pruner, PolicyPruner | None):
        raise InvalidArgumentError(
            f"`pruner` must be a PolicyPruner, such as `PolicyPruner.lean()`, got {pruner!r}."
        )


def _decide(
    checkpoint: Checkpoint,
    folder: Path,
    pruner: PolicyPruner,
    ratio: float | None,
    ratio_of: RatioOf,
    parameters: float | None,
    size: float | None,
    layers: Iterable[int | str] | None,
) -> PruningPlan:
    """Return the plan, having put re-solved matrices on the disk."""
    if not pruner.is_fitted:
        pruner.fit(checkpoint.model)
    failures: list[Exception] = []
    decision = pruner.decide(
        checkpoint.model,
        pruner.budget(ratio, ratio_of=ratio_of, parameters=parameters, bytes=size),
        layers=layers,
        put_away=partial(_put_away, folder / _RESTORED, failures),
    )
    with failing_together():
        if failures:
            raise failures[0]
    return decision.plan


def _put_away(folder: Path, failures: list[Exception], name: str, restored: Restored) -> None:
    """Write what was re-solved to the disk; if that fails, note it for other ranks to hear of.

    Raises:
        OSError: At once, where there are no other ranks.
    """
    tensors = {"contract": restored.contract_KD.contiguous()}
    if restored.bias_D is not None:
        tensors["bias"] = restored.bias_D.contiguous()
    file = folder / f"{name}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        save_file(tensors, file)
    except (SafetensorError, OSError) as error:  # the first says in words that the disk is full
        failed = OSError(f"cannot write `{file}`: {error}")
        if rank_and_count()[1] == 1:
            raise failed from error
        failures.append(failed)


def _taken_out(folder: Path, name: str) -> tuple[Tensor, Tensor | None] | None:
    """Return what was put away for an FFN, mapped."""
    file = folder / f"{name}.safetensors"
    if not file.exists():
        return None
    found = {stored.name: stored.map() for stored in read_header(file)[0]}
    return found["contract"], found.get("bias")


def _write(checkpoint: Checkpoint, folder: Path, plan: PruningPlan) -> tuple[Sizes, Sizes]:
    """Write the files of the model, and return its sizes before and after.

    Of the shards each rank writes its own, and all see whether all could.
    """
    check_plan(checkpoint.ffns, plan)
    rewriting = Rewriting(checkpoint, plan, partial(_taken_out, folder / _RESTORED))
    old_config = checkpoint.model.config.to_dict()
    before, after = (
        sizes_of(checkpoint.model, checkpoint.ffns, widths) for widths in (None, plan.widths)
    )
    apply_plan(checkpoint.model, plan, ffns=checkpoint.ffns)  # changes the config
    is_first = rank_and_count()[0] == 0
    with failing_together():
        if is_first:
            tensors = [tensor for found, _ in checkpoint.shards.values() for tensor in found]
            check_space(folder, sum(rewriting.piece(tensor).bytes for tensor in tensors))
        map_on_threads(
            partial(_write_shard, checkpoint, folder, rewriting), own(list(checkpoint.shards))
        )
    with failing_together():
        if is_first:
            write_other_files(checkpoint, folder, old_config)
    return before, after


def _write_card(folder: Path, report: PruningReport) -> None:
    """Write card and report; those of the source, which have come along, make room."""
    own = [folder / "README.md", folder / REPORT_FILE]
    own += [folder / "report"] if (folder / "report" / "report.json").is_file() else []
    for path in own:
        set_aside(path)
    report.write_card(folder)


def _write_shard(checkpoint: Checkpoint, folder: Path, rewriting: Rewriting, file: Path) -> None:
    tensors, metadata = checkpoint.shards[file]
    write_shard(folder / file.name, [rewriting.piece(tensor) for tensor in tensors], metadata)
