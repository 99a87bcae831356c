"""Processes of their own, without the seconds that imports take in each.

One Python imports what tests need and forks whenever it is asked to; what it has imported is there
at once. All children begin with one hash seed, so where several have to agree, they are to be tried
as processes that are started one by one as well.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from functools import partial
from pathlib import Path

_SECONDS = 300
"""How long a piece of work may take."""

_LATE = 2.0
"""By how many seconds a rank that fails ends later, for the first end is told: that of a rank which
was killed, and not of those which failed for want of it."""


class Forking:
    """A Python that forks, as long as it is open."""

    def __init__(self, environment):
        """Start it with an environment, which all children have."""
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._process:
            self._process.stdin.close()

    def run(self, *arguments, ranks=0, cwd=None, **environment):
        """Do what `python *arguments` does, or `torchrun` in several ranks.

        Args:
            arguments: A file, `-m` and a module or `-c` and code, and what `sys.argv` holds behind.
            ranks: How many processes there are; 0 for one that torchrun has not started.
            cwd: Where it runs; None for here.
            environment: Variables on top of those that all children have.
        """
        command = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as folder:
            printed = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            job = [command, ranks, str(cwd or Path.cwd()), environment, printed]
            print(json.dumps(job), file=self._process.stdin, flush=True)
            code = int(self._process.stdout.readline())
            texts = [Path(file).read_text(encoding="utf-8") for file in printed]
        return subprocess.CompletedProcess(command, code, *texts)


def _serve():
    """Fork for every line that is read, and tell how the child ended."""
    import torch.distributed.launcher.api  # noqa: F401

    from conftest import build, save

    with tempfile.TemporaryDirectory() as folder:
        save(build("llama"), Path(folder))  # imports what it needs, for all children
    gc.collect()
    gc.freeze()
    told = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(_status(partial(_work, *json.loads(line))))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, file=told, flush=True)


def _work(arguments, ranks, folder, environment, printed):
    signal.alarm(_SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(printed, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.update(environment)
    if ranks:
        _launch(arguments, ranks)
    else:
        _run(arguments)


def _launch(arguments, ranks):
    """Do what `torchrun --standalone` does, but for forking."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments)


def _rank(arguments):
    if status := _status(partial(_run, arguments)):
        time.sleep(_LATE)
        os._exit(status)


def _run(arguments):
    """Do what `python *arguments` does."""
    first, *rest = arguments
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _status(work):
    """Return the status with which Python would end that does this work."""
    status = 0
    try:
        work()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)  # noqa: T201
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


if __name__ == "__main__":
    _serve()
