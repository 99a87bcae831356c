"""What a method costs: seconds, and peak memory above the loaded model.

Each method runs once in a child that the benchmark forks with the model loaded, so that nothing is
warm and nothing that another method left behind is counted. The memory is the peak of the child's
anonymous pages (`RssAnon` of Linux, looked at every millisecond) above what they are at its start:
numbers that it holds, but no code that it pages in. Everything runs on one thread, so the seconds
are those that the thread was on a processor: what an idle machine takes, on a busy one too.
"""

import ctypes
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yopo

MEBIBYTE = 2**20


def cost_of(run: Callable[[], None]) -> dict[str, float]:
    """Return the seconds that `run` takes in a child, and its peak in MiB above the start.

    Nothing comes back where `run` says that the model is not for it.

    Call it before anything in this process has run on several threads or back through autograd:
    neither survives a fork.

    Raises:
        RuntimeError: If the child fails.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(run, there))
    child.start()
    there.close()
    try:
        found: dict[str, float] = here.recv()
    except EOFError:
        raise RuntimeError("the child failed; its error is above") from None
    finally:
        child.join()
    return found


def _measure(run: Callable[[], None], there: Any) -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    start = _anonymous()
    peak, done = [start], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.thread_time()
    try:
        run()
    except yopo.UnsupportedModelError:
        there.send({})
    else:
        seconds = time.thread_time() - started
        there.send({"seconds": seconds, "mebibytes": (peak[0] - start) / MEBIBYTE})
    finally:
        done.set()
        watcher.join()


def _anonymous() -> int:
    """Return the bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
