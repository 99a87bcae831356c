"""Singular values in several ways: seconds, and how far off they are.

    python benchmarks/fit.py --spectra

For each way and shape, of a matrix and of its kept rows at a ratio of 0.3: seconds on one and on
two threads, the best of several; the largest error of a singular value, as a share of itself and of
the largest one, against `torch.linalg.svdvals` in float64; and how far the Kolmogorov-Smirnov
distance between the two is from that of the float64 values. The matrices are Gaussian, and one that
is harder: rows of log-normal norms, and singular values that fall to about a thousandth.

Writes docs/results/spectra.json and .md.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import ks_2samp
from torch import Tensor

import common
import fit_child
import yopo
from yopo.report import format_table
from yopo.reward import spectral_rewards

SHAPES = ((3072, 768), (8192, 2048))
RATIO = 0.3
THREADS = (1, 2)
REPEATS = 3


def gram_eigenvalues(weight_FD: Tensor) -> Tensor:
    """Return singular values from the eigenvalues of the smaller Gram matrix."""
    tall = weight_FD.shape[0] > weight_FD.shape[1]
    gram = weight_FD.T @ weight_FD if tall else weight_FD @ weight_FD.T
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.svd": lambda weight_FD: torch.svd(weight_FD)[1].flip(0),
    "svdvals": lambda weight_FD: torch.linalg.svdvals(weight_FD).flip(0),
    "Gram, eigvalsh, float32": gram_eigenvalues,
    "Gram, eigvalsh, float64": lambda weight_FD: gram_eigenvalues(weight_FD.double()),
}
"""From a float32 matrix to its singular values, ascending."""


def matrices(rows: int, columns: int) -> dict[str, Tensor]:
    """Return the matrices that are measured, in float32."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    norms_F1 = gaussian(rows, 1).mul(0.5).exp()
    falling_D = torch.logspace(0, -3, columns)
    turned_DD = torch.linalg.qr(gaussian(columns, columns)).Q
    hard_FD = norms_F1 * gaussian(rows, columns) * falling_D @ turned_DD
    return {"Gaussian": gaussian(rows, columns), "harder": hard_FD}


def compare(kind: str, weight_FD: Tensor) -> list[dict[str, Any]]:
    """Return a row for each way of the values of one matrix and of its kept rows, then ours."""
    rows, columns = weight_FD.shape
    generator = torch.Generator().manual_seed(1)
    order_F = torch.randperm(rows, generator=generator)
    kept_K = order_F[: int((1 - RATIO) * rows)].sort().values
    parts = {"dense": weight_FD, "kept": weight_FD[kept_K]}
    exact = {name: WAYS["svdvals"](part.double()) for name, part in parts.items()}
    exact_ks = _ks(exact["dense"], exact["kept"])
    common_part = {"kind": kind, "rows": rows, "columns": columns, "kept": len(kept_K)}
    found = []
    for way, values_of in WAYS.items():
        values = {name: values_of(part).double() for name, part in parts.items()}
        row = common_part | {
            "way": way,
            "of itself": max(_error(values[name], exact[name], exact[name]) for name in parts),
            "of largest": max(
                _error(values[name], exact[name], exact[name][-1:]) for name in parts
            ),
            "ks": abs(_ks(values["dense"], values["kept"]) - exact_ks),
        }
        for threads in THREADS:
            torch.set_num_threads(threads)
            for name, part in parts.items():
                row[f"{name} {threads}"] = _seconds(lambda: values_of(part))  # noqa: B023
        found.append(row)
        print(row, flush=True)
    found.append(common_part | _ours(weight_FD, kept_K, exact_ks))
    print(found[-1], flush=True)
    return found


def page(rows: list[dict[str, Any]], machine: str) -> str:
    """Return the page: a line for each matrix and way."""
    times = [f"{name} s, threads: {count}" for name in ("dense", "kept") for count in THREADS]
    table = [
        [
            "matrix",
            "shape, kept rows",
            "way",
            *times,
            "error of a value",
            "of the largest",
            "error of the distance",
        ]
    ]
    for row in rows:
        timed = [f"{row[f'{name} {count}']:.3f}" for name in ("dense", "kept") for count in THREADS]
        errors = [
            f"{row[name]:.1e}" if name in row else "" for name in ("of itself", "of largest", "ks")
        ]
        shape = f"{row['rows']} × {row['columns']}, {row['kept']}"
        table.append([row["kind"], shape, row["way"], *timed, *errors])
    intro = " ".join(__doc__.split("\n\n")[2].split())
    return (
        f"# Singular values in several ways\n\n{intro}\n\nyopo gives distances, not values; "
        "its second time is what a draw of rows takes once the whole matrix has been measured. "
        f"Measured on {machine}, with torch {torch.__version__}.\n\n{format_table(table)}\n"
    )


def main() -> None:
    """Measure all matrices, and write the results."""
    common.quiet()
    rows = [
        row
        for shape in SHAPES
        for kind, weight_FD in matrices(*shape).items()
        for row in compare(kind, weight_FD)
    ]
    told = common.machine(torch.device("cpu"))
    common.keep_result("spectra", [row | {"machine": told} for row in rows])
    (common.RESULTS / "spectra.md").write_text(page(rows, told), encoding="utf-8")
    print(page(rows, told))


def _ours(weight_FD: Tensor, kept_K: Tensor, exact_ks: float) -> dict[str, Any]:
    """Return yopo's row: the matrix is measured once, then the kept rows."""
    rows, columns = weight_FD.shape
    shape = {"family": "opt", "layers": 1, "rows": rows, "width": columns, "vocabulary": 64}
    model = fit_child.build(shape)
    ffns = yopo.find_ffns(model)
    with torch.no_grad():
        ffns[0].expand_weights()[0].copy_(weight_FD)
    reward = spectral_rewards(ffns)
    kept = {ffns[0].name: kept_K[None]}
    row: dict[str, Any] = {"way": "yopo", "ks": abs(1 / float(reward(kept)) - exact_ks)}
    for threads in THREADS:
        torch.set_num_threads(threads)
        row[f"dense {threads}"] = _seconds(lambda: spectral_rewards(ffns))
        row[f"kept {threads}"] = _seconds(lambda: reward(kept))
    return row


def _ks(first_S: Tensor, second_S: Tensor) -> float:
    return float(ks_2samp(first_S.numpy(), second_S.numpy()).statistic)


def _error(found_S: Tensor, exact_S: Tensor, unit_S: Tensor) -> float:
    return float(((found_S - exact_S).abs() / unit_S).max())


def _seconds(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best
