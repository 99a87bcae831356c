"""What the benchmarks share that evolve symbolic metrics."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from yopo.symbolic import Candidate, Expression


def search_parser(told: str) -> argparse.ArgumentParser:
    """Return a parser of what both searches are told.

    Args:
        told: What the benchmark is; its first line is shown as help.
    """
    parser = argparse.ArgumentParser(description=told.split("\n", 1)[0])
    parser.add_argument("--on", default="llama-s", help="the model to evolve on")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where searches are kept")
    parser.add_argument("--models", nargs="+", help="those to measure on; by default all")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def command_of(name: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Return the command that makes all figures at once.

    Args:
        name: Of the benchmark.
        parser: What knows the defaults.
        arguments: What it was told this time, of which some say how the work goes on, and no more.
    """
    told = ["python", f"benchmarks/{name}.py"]
    for key, value in vars(arguments).items():
        if key not in ("workers", "folder", "models") and value != parser.get_default(key):
            told += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(told)


def described(candidate: Candidate) -> dict[str, Any]:
    """Return an expression and its fitness, as results hold them."""
    return {"expression": str(candidate.expression), "fitness": candidate.fitness}


def measured_by(row: dict[str, Any]) -> str:
    """Return where and by which command the figures beside a search were measured."""
    return f"Measured with {row['machine']}, by `{row['command']}`."


def told_of(row: dict[str, Any], decimals: int) -> str:
    """Return in words what a search found, by evolution and at random."""
    evolved, drawn = (
        f"`{Expression.parse(row[key]['expression']).formula()}`, "
        f"{row[key]['fitness']:.{decimals}f}"
        for key in ("evolved", "random")
    )
    return f"evolved {evolved}; at random {drawn}"
