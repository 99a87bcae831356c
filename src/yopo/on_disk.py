"""Prune checkpoints on disk, larger than memory or not."""

import errno
import shutil
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from yopo.budget import RatioOf
from yopo.calls import Verbatim, lasting, written_call
from yopo.card import set_aside
from yopo.checkpoint import Checkpoint, open_checkpoint
from yopo.errors import InvalidArgumentError, YopoError
from yopo.parallel import map_on_threads
from yopo.plan import PruningPlan
from yopo.pruner import PolicyPruner
from yopo.pruning_report import REPORT_FILE, PruningReport, report_of
from yopo.ranks import check_agreement, gather, own, rank_and_count
from yopo.report import Sizes, sizes_of
from yopo.restore import Restored
from yopo.rewriting import Rewriting, write_other_files
from yopo.shards import read_header, write_shard
from yopo.staging import check_target, staged, staging_folder
from yopo.surgery import apply_plan, check_plan

_SPARE = 2**20
"""Bytes that must stay free on the disk."""

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
    time. The result equals, tensor by tensor, the same model loaded, pruned by the same pruner and
    saved; names and shards are those of the source, and every other file of the folder comes along,
    but for weights in other formats. Beside them lie a model card, `README.md`, and a report,
    `pruning_report.json`; the card of the source becomes `README.dense.md`.

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
            or damaged, another process writes the same target, `plan` comes with a pruner or a
            size, or as `PolicyPruner.plan`.
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
    source, target = Path(source), Path(target)
    asked = (ratio, pruner, parameters, bytes, layers)
    if plan is not None and (ratio_of != "ffn" or any(value is not None for value in asked)):
        raise InvalidArgumentError(
            "`plan` says already which rows stay: give it alone, or say how much goes."
        )
    check_target(target, source)
    checkpoint = open_checkpoint(source)
    is_first = rank_and_count()[0] == 0
    check_agreement("prune_checkpoint", source.absolute(), target.absolute())
    with staged(target) if is_first else nullcontext(staging_folder(target)) as folder:
        gather([None])  # all wait until the folder is there
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
        if is_first:
            shutil.rmtree(folder / _RESTORED, ignore_errors=True)
            _write_card(folder, report)
    gather([None])  # and until it has its name
    return plan


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
    (folder / _RESTORED).mkdir(exist_ok=True)
    decision = pruner.decide(
        checkpoint.model,
        pruner.budget(ratio, ratio_of=ratio_of, parameters=parameters, bytes=size),
        layers=layers,
        put_away=partial(_put_away, folder / _RESTORED),
    )
    return decision.plan


def _put_away(folder: Path, name: str, restored: Restored) -> None:
    tensors = {"contract": restored.contract_KD.contiguous()}
    if restored.bias_D is not None:
        tensors["bias"] = restored.bias_D.contiguous()
    file = folder / f"{name}.safetensors"
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # which says in words alone that the disk is full
        raise OSError(f"cannot write `{file}`: {error}") from error


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

    Raises:
        YopoError: If another rank could not.
        OSError: If the disk is full.
    """
    check_plan(checkpoint.ffns, plan)
    rewriting = Rewriting(checkpoint, plan, partial(_taken_out, folder / _RESTORED))
    old_config = checkpoint.model.config.to_dict()
    before, after = (
        sizes_of(checkpoint.model, checkpoint.ffns, widths) for widths in (None, plan.widths)
    )
    apply_plan(checkpoint.model, plan, ffns=checkpoint.ffns)  # changes the config
    problem: Exception | None = None
    try:
        if rank_and_count()[0] == 0:
            _check_space(checkpoint, folder, rewriting)
        map_on_threads(
            partial(_write_shard, checkpoint, folder, rewriting), own(list(checkpoint.shards))
        )
    except (OSError, YopoError) as error:
        problem = error
    problems = [text for text in gather([problem and str(problem)]) if text]
    if problem is not None:
        raise problem
    if problems:
        raise YopoError(f"another rank of this run failed: {problems[0]}")
    if rank_and_count()[0] == 0:
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


def _check_space(checkpoint: Checkpoint, folder: Path, rewriting: Rewriting) -> None:
    """Check that the disk holds what will be written.

    Raises:
        OSError: If it does not.
    """
    tensors = [tensor for found, _ in checkpoint.shards.values() for tensor in found]
    needed = sum(rewriting.piece(tensor).bytes for tensor in tensors) + _SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the pruned checkpoint takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            str(folder.parent),
        )
