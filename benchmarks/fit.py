"""How long PruneNet's training takes: yopo, the published loop in float32, and the peer on PyPI.

    python benchmarks/fit.py                                    OPT-125m's shape on a CPU
    python benchmarks/fit.py --venv FOLDER                      keeps the peer's environment
    python benchmarks/fit.py --loop-episodes 20                 the loop's whole run, not worked out
    python benchmarks/fit.py --shape llama-2-7b --device cuda   without the peer
    python benchmarks/fit.py --spectra                          singular values in several ways

Measures `PolicyPruner.prunenet(ratio=0.3).fit(model)`, `published_loop.py`, and efficient-pruners,
installed from the package index into a throw-away environment, on one model with random weights,
one after the other, each time in a process of its own. Slow sides run fewer episodes, and the page
says so. Beside them it puts whether the numbers are the same, where yopo's time goes, and the floor
under it: the operations that the method takes over the rate at which this machine multiplies
matrices. Writes docs/results/fit.json and .md; `--spectra` writes results/spectra.json and .md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

import common
import yopo
from yopo.report import format_table

RATIO = 0.3
SHAPES: dict[str, dict[str, Any]] = {
    "opt-125m": {"family": "opt", "layers": 12, "rows": 3072, "width": 768, "vocabulary": 50272},
    "llama-2-7b": {
        "family": "llama",
        "layers": 32,
        "rows": 11008,
        "width": 4096,
        "vocabulary": 32000,
    },
    "tiny": {"family": "opt", "layers": 2, "rows": 96, "width": 32, "vocabulary": 64},
}
NAMES = {
    "yopo": "yopo",
    "loop": "published loop, float32",
    "peer": "efficient-pruners, as shipped",
}

LAZY = [
    "torch._dynamo",
    "transformers.models.opt.modeling_opt",
    "transformers.models.llama.modeling_llama",
]
"""What would else be imported by the first optimiser and the first model, and counted with them."""


class Child:
    """A process that answers jobs, each in a fork of its own; see `fit_child.py`."""

    def __init__(self, python: str | Path, modules: list[str], *, clean: bool = False) -> None:
        """Start it with what it shall import before any job, without our paths if `clean`."""
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        if clean:
            environment.pop("PYTHONPATH", None)
        script = str(Path(__file__).with_name("fit_child.py"))
        self._process = subprocess.Popen(
            [str(python), script, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> "Child":
        """Return the process."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process, once it has answered."""
        self._process.communicate()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a job.

        Raises:
            RuntimeError: If the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the measuring process has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def our_child() -> Child:
    """Return a process that measures yopo and the published loop."""
    return Child(sys.executable, ["yopo", "published_loop", *LAZY])


def main(given: list[str] | None = None) -> None:
    """Measure one shape, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--loop-episodes", type=int, default=None, help="default 3, 1 on a GPU")
    parser.add_argument("--peer-episodes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="how often yopo and the loop run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venv", type=Path, help="the peer's environment, made if not there")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--skip-loop", action="store_true")
    parser.add_argument("--spectra", action="store_true")
    arguments = parser.parse_args(given)
    if arguments.spectra:
        import spectra

        spectra.main()
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured.")
        return
    common.quiet()
    row = measure(arguments)
    key = ("shape", "machine")
    rows = [r for r in common.kept_rows("fit") if [r[k] for k in key] != [row[k] for k in key]]
    rows.append(row)
    common.keep_result("fit", rows)
    (common.RESULTS / "fit.md").write_text(page(rows), encoding="utf-8")
    print(page([row]))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on one shape: the sides, the floor, the phases, the numbers."""
    load, on_cpu = os.getloadavg()[0], arguments.device == "cpu"
    shape, episodes = SHAPES[arguments.shape], arguments.episodes
    loop_episodes = arguments.loop_episodes or min(3 if on_cpu else 1, episodes)
    job = {
        "shape": shape,
        "path": None,
        "device": arguments.device,
        "threads": arguments.threads,
        "ratio": RATIO,
    }
    with ExitStack() as stack:
        ours = stack.enter_context(our_child())
        if on_cpu:  # on a GPU it is made there; the peer tells what a model is by its path
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fit-")))
            job["path"] = str(folder / "opt")
            _asked(ours, job | {"side": "save"})
        peer = None
        if on_cpu and not arguments.skip_peer:
            peer = stack.enter_context(_peer(arguments.venv or folder / "venv"))
        job["numbers"] = shape["rows"] * shape["width"]
        rates = _asked(ours, job | {"side": "rates"})
        answers: dict[str, list[dict[str, Any]]] = {"yopo": [], "loop": [], "peer": []}
        for repeat in range(arguments.repeats):
            answers["yopo"].append(_asked(ours, job | {"side": "yopo", "episodes": episodes}))
            if not arguments.skip_loop:
                side = {"side": "loop", "episodes": loop_episodes}
                answers["loop"].append(_asked(ours, job | side))
            if peer is not None and repeat == 0:
                side = {"side": "peer", "episodes": arguments.peer_episodes}
                answers["peer"].append(_asked(peer, job | side))
        few = {"side": "yopo", "episodes": min(5, episodes), "profile": True}
        phases = _asked(ours, job | few)["phases"]
        check = _asked(ours, job | {"side": "check", "layers": shape["layers"] if on_cpu else 2})
    measured = {"yopo": episodes, "loop": loop_episodes, "peer": arguments.peer_episodes}
    sides = {
        name: _summary(found, measured=measured[name], episodes=episodes)
        for name, found in answers.items()
        if found
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "shape": arguments.shape,
        **shape,
        "machine": rates["machine"],
        "load": load,
        "device": arguments.device,
        "threads": arguments.threads,
        "ratio": RATIO,
        "episodes": episodes,
        "versions": {"yopo-prune": yopo.__version__, **versions},
        "sides": sides,
        "rates": rates,
        "floor": floor(shape, episodes=episodes, rates=rates),
        "phases": phases,
        "check": check,
    }


def floor(
    shape: dict[str, Any], *, episodes: int, rates: dict[str, float], ratio: float = RATIO
) -> list[dict[str, Any]]:
    """Return the parts of the work that no way around is known, and the seconds they must take.

    Of a Gram matrix, which is symmetric, half is counted, and the reduction to a tridiagonal matrix
    stands for the eigenvalues. What moves numbers rather than computing is counted in bytes.
    """
    layers, rows, width = shape["layers"], shape["rows"], shape["width"]
    kept = int((1 - ratio) * rows)
    size, weight_bytes = min(width, kept), 2 if shape["family"] == "llama" else 4
    summed = min(rows - kept, kept)
    draws = layers * episodes
    reduce = 4 / 3 * size**3
    parts = [
        ("dense Gram matrices", "L F D²", layers * rows * width**2, 0),
        ("dense eigenvalues", "L 4/3 D³", layers * reduce, 0),
        ("Gram matrices of the draws", "L E C D²", draws * summed * size**2, 0),
        ("eigenvalues of the draws", "L E 4/3 D³", draws * reduce, 0),
        ("scoring, drawing, its gradient", "3 L E F D", 0, 3 * draws * rows * width * weight_bytes),
        ("AdamW's three matrices", "6 · 4 L E F D", 0, 24 * draws * rows * width),
    ]
    return [
        {
            "part": part,
            "formula": formula,
            "operations": operations,
            "bytes": moved,
            "seconds": operations / rates["operations"] + moved / rates["bytes"],
        }
        for part, formula, operations, moved in parts
    ]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page: for each shape and machine the sides, the floor, the phases, the numbers."""
    lines = [
        "# What PruneNet's training costs",
        "",
        "Written by `benchmarks/fit.py`. All sides train on one model with random weights, at a "
        f"ratio of {RATIO}, one after the other, each time in a process of its own. Seconds are "
        "those of the clock, and the median where a side ran several times. Memory is the peak "
        "above the loaded model, in the episodes that ran.",
        "",
        "The singular values of random weights lie close together, and float32 decides on every "
        "draw. Where it does not, float64 has to, and a draw takes three to four times as long: "
        "[the same matrix in several ways](spectra.md).",
        "",
    ]
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lines += [
            f"## {row['shape']} on {row['machine']}",
            "",
            f"Measured with {versions}. When it began, the machine had {row['load']:.1f} processes "
            "at work on average over a minute. Other work slows what waits for all threads at "
            "every step, as a decomposition does, more than what runs by itself: where more than "
            "a few tenths were at work, or fewer cores are busy than there are threads, the "
            "ratios are not to be trusted.",
            "",
        ]
        lines += _sides_told(row) + _floor_told(row) + _phases_told(row) + _check_told(row)
    return "\n".join(lines)


def _peer(folder: Path) -> Child:
    from peers import environment

    return Child(environment(folder.absolute()), ["efficient_pruners", *LAZY], clean=True)


def _asked(child: Child, job: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a job, and show it.

    Raises:
        RuntimeError: If one of our own sides fails; that the peer fails is a result.
    """
    answer = child.ask(job)
    print(job["side"], answer, flush=True)
    if "error" in answer and job["side"] != "peer":
        raise RuntimeError(f"{job['side']}: {answer['error']}")
    return answer


def _summary(answers: list[dict[str, Any]], *, measured: int, episodes: int) -> dict[str, Any]:
    """Return a side's figures: medians as measured, and what all the episodes take.

    The dense singular values are needed once, so where fewer episodes were measured than asked for,
    all of them take the dense part, and each as long as those measured did on average.
    """
    summary: dict[str, Any] = {"runs": answers, "measured episodes": measured}
    if "error" in answers[0]:
        return summary | {"error": answers[0]["error"]}
    wholes = []
    for answer in answers:
        whole = answer["seconds"]
        if "dense" in answer:
            each = (answer["seconds"] - answer["dense"]) / measured
            whole = answer["dense"] + episodes * each
        wholes.append(whole)
    keys = ("seconds", "busy", "dense")
    summary |= {
        key: statistics.median(answer[key] for answer in answers)
        for key in keys
        if key in answers[0]
    }
    return summary | {
        "whole": statistics.median(wholes),
        "range": [min(wholes), max(wholes)],
        "mebibytes": max(answer["mebibytes"] for answer in answers),
    }


def _sides_told(row: dict[str, Any]) -> list[str]:
    episodes, ours = row["episodes"], row["sides"]["yopo"]
    header = f"side|runs × episodes|dense s|s an episode|{episodes} episodes s|of|least … most"
    table = [[*header.split("|"), "cores busy", "peak MiB", "times our time", "times our memory"]]
    for name, side in row["sides"].items():
        measured = side["measured episodes"]
        runs = f"{len(side['runs'])} × {measured}"
        if "error" in side:
            table.append([NAMES[name], runs, side["error"], *[""] * 8])
            continue
        dense = side.get("dense")
        each = (side["seconds"] - (dense or 0.0)) / measured
        table.append(
            [
                NAMES[name],
                runs,
                "in the next" if dense is None else f"{dense:.2f}",
                f"{each:.3f}",
                f"{side['whole']:.2f}",
                "measured" if measured == episodes else "worked out",
                " … ".join(f"{seconds:.2f}" for seconds in side["range"]),
                f"{side['busy'] / side['seconds']:.2f}",
                f"{side['mebibytes']:.0f}",
                f"{side['whole'] / ours['whole']:.1f}",
                f"{side['mebibytes'] / max(ours['mebibytes'], 0.1):.1f}",
            ]
        )
    lines = [format_table(table), ""]
    if any(side["measured episodes"] != episodes for side in row["sides"].values()):
        lines += [
            f'"Worked out" is the dense part plus {episodes} times what an episode took on average '
            "of those that were measured.",
            "",
        ]
    if "versions" in (told := row["sides"].get("peer", {"runs": [{}]})["runs"][0]):
        names = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        lines += [f"The peer ran with {names}.", ""]
    return lines


def _floor_told(row: dict[str, Any]) -> list[str]:
    table = [["part", "counted", "10⁹ operations", "10⁹ bytes", "s at the rate"]]
    for part in row["floor"]:
        figures = (part["operations"] / 1e9, part["bytes"] / 1e9)
        shown = [f"{figure:.1f}" if figure else "" for figure in figures]
        table.append([part["part"], part["formula"], *shown, f"{part['seconds']:.3f}"])
    least = sum(part["seconds"] for part in row["floor"])
    table.append(["together", "", "", "", f"{least:.3f}"])
    reached = least / row["sides"]["yopo"]["whole"]
    return [
        f"The floor: {row['rates']['operations'] / 1e9:.0f}·10⁹ operations a second in float32 "
        f"matrix products, {row['rates']['bytes'] / 1e9:.1f}·10⁹ bytes a second in a sum of two "
        "vectors as long as a matrix has numbers. L layers, F rows of which C go, D width, E "
        "episodes. Only half of a symmetric product is counted, and of the eigenvalues only the "
        "reduction to a tridiagonal matrix, of which half is products with vectors: no code gets "
        "them at the rate of matrix products.",
        "",
        format_table(table),
        "",
        f"yopo takes {row['sides']['yopo']['whole']:.2f} s, so it reaches {reached:.0%} of this.",
        "",
    ]


def _phases_told(row: dict[str, Any]) -> list[str]:
    total = sum(row["phases"].values())
    table = [["where yopo's time goes", "s", "share"]]
    for name, seconds in row["phases"].items():
        table.append([name, f"{seconds:.3f}", f"{seconds / total:.0%}"])
    clock = "of the GPU" if row["device"] == "cuda" else "of the calling threads, summed"
    return [
        f"Seconds {clock}, in torch's operations over {min(5, row['episodes'])} episodes, as its "
        "profiler tells. The rest is scoring, drawing, the optimiser's step, and products with "
        "vectors.",
        "",
        format_table(table),
        "",
    ]


def _check_told(row: dict[str, Any]) -> list[str]:
    check = row["check"]
    return [
        f"The same rows of {check['layers']} layers, by `torch.svd` with `scipy.stats.ks_2samp` "
        f"and by yopo: distances differ by at most {check['ks']:.1e}, rewards by at most "
        f"{check['reward']:.1e} of themselves.",
        "",
    ]


if __name__ == "__main__":
    main()
