"""What the default costs on the shape of a model: seconds of each phase, and peak memory.

    python benchmarks/quality_cost.py --shape llama-2-7b --device cuda    random, in bfloat16
    python benchmarks/quality_cost.py --shape opt-125m --device cpu       random, in float32
    python benchmarks/quality_cost.py --shape llama-s --device cpu        trained, from ../shared

Times `PolicyPruner().fit(model)` and `.prune(model, 0.3)` and writes docs/results/quality_cost.json
and .md. From what was measured on a CPU it works out what LLaMA-2-7B's shape would take on the same
machine: operations of each phase over the machine's measured rate of matrix products, at the share
of that rate that the phase reached. What it does not measure it does not name.
"""

import argparse
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

import yopo
import yopo.decision
import yopo.elimination
import yopo.evidence
import yopo.pruner
from common import RESULTS, SHARED, keep_result, kept_rows, machine, quiet
from yopo.report import format_table
from yopo.writing import LENGTH, SEQUENCES

RATIO = 0.3
TOKENS = SEQUENCES * LENGTH

PHASES = {
    "write": (yopo.evidence, "write_tokens"),
    "read": (yopo.evidence, "read_moments"),
    "eliminate": (yopo.elimination, "eliminate"),
    "restore": (yopo.decision, "restore_contract"),
    "cut": (yopo.pruner, "apply_plan"),
}
"""Each phase, and the function that does it, under the name by which it is called."""


@dataclass(frozen=True)
class Shape:
    """Say what the cost of a model depends on: L layers, F rows, D model width, V vocabulary."""

    layers: int
    rows: int
    width: int
    vocabulary: int
    matrices: int
    """How many matrices an FFN has."""

    def operations(self, dropped: float = RATIO) -> dict[str, tuple[str, float, str]]:
        """Return, for each phase, its dtype, its operations and how they are counted.

        The attention's own products, softmax and norms are left out. `dropped` is the share of
        rows after which elimination stops.
        """
        kept = int((1 - RATIO) * self.rows)
        gone = self.rows - kept
        block = 4 * self.width**2 + self.matrices * self.rows * self.width
        left = (1 - dropped) * self.rows
        eliminate = 3 * self.rows**3 - 2 * left**3 + 2 * self.rows**2 * self.width
        restore = kept**3 / 3 + 2 * self.width * (
            kept * gone + kept**2 + gone**2 + 2 * self.rows**2
        )
        return {
            "write": (
                "float32",
                2 * TOKENS * (self.layers * block + self.width * self.vocabulary),
                "2 T (L (4 D² + m F D) + D V)",
            ),
            "read": (
                "float32",
                2 * TOKENS * self.layers * (block + self.rows**2),
                "2 T L (4 D² + m F D + F²)",
            ),
            "eliminate": ("float64", self.layers * eliminate, "L (F³ + 2 (F³ - E³) + 2 F² D)"),
            "restore": (
                "float64",
                self.layers * restore,
                "L (K³/3 + 2 D (K C + K² + C² + 2 F²))",
            ),
        }


SHAPES = {
    "llama-2-7b": Shape(32, 11008, 4096, 32000, 3),
    "opt-125m": Shape(12, 3072, 768, 50272, 2),
    "llama-s": Shape(5, 512, 192, 4096, 3),
}


def main() -> None:
    """Measure one shape, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured.")
        return
    torch.set_num_threads(arguments.threads)
    quiet()
    model = _model(arguments.shape, device)
    if model is None:
        print(f"{arguments.shape} is not in {SHARED / 'models'}, so nothing was measured.")
        return
    row = {
        "shape": arguments.shape,
        "machine": machine(device, shared=True),
        "dtype": str(model.dtype).removeprefix("torch."),
        **asdict(SHAPES[arguments.shape]),
        **_measure(model, device),
        "rates": {name: _rate(name, device) for name in ("float32", "float64")},
    }
    rows = [
        other
        for other in kept_rows("quality_cost")
        if (other["shape"], other["machine"]) != (row["shape"], row["machine"])
    ]
    rows.append(row)
    keep_result("quality_cost", rows)
    (RESULTS / "quality_cost.md").write_text(_page(rows), encoding="utf-8")
    print(_page(rows))


def _model(name: str, device: torch.device) -> Any:
    """Return a model of the shape, trained where it has to be, None where it is not there."""
    shape = SHAPES[name]
    if name == "llama-s":
        path = SHARED / "models" / name
        if not path.is_dir():
            return None
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    config: PretrainedConfig
    if name == "llama-2-7b":
        config = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.rows,
            num_hidden_layers=shape.layers,
            num_attention_heads=32,
            vocab_size=shape.vocabulary,
            max_position_embeddings=4096,
        )
    else:
        config = OPTConfig(
            hidden_size=shape.width,
            ffn_dim=shape.rows,
            num_hidden_layers=shape.layers,
            num_attention_heads=12,
            vocab_size=shape.vocabulary,
            word_embed_proj_dim=shape.width,
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _measure(model: Any, device: torch.device) -> dict[str, Any]:
    """Return seconds of the whole and of each phase, and the peak memory."""
    clocks = {"seconds": time.perf_counter, "busy": time.process_time}
    spent: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(clocks, 0.0))
    shares: list[float] = []
    eliminate = yopo.elimination.eliminate

    def counting(second_FF: torch.Tensor, *given: Any, **named: Any) -> Any:
        drops = named.get("drops")
        shares.append(1.0 if drops is None else drops / len(second_FF))
        return eliminate(second_FF, *given, **named)

    yopo.elimination.eliminate = counting
    for phase, (module, name) in PHASES.items():
        setattr(module, name, _timed(getattr(module, name), spent[phase], clocks, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def work() -> None:
        yopo.PolicyPruner().fit(model).prune(model, RATIO)

    _timed(work, spent["total"], clocks, device)()
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    for kind in clocks:
        named = sum(spent[phase][kind] for phase in PHASES)
        spent["other"][kind] = spent["total"][kind] - named
    return {
        "phases": dict(spent),
        "dropped": sum(shares) / len(shares),
        "peak_gib": peak / 2**30,
    }


def _timed(
    function: Callable[..., Any],
    spent: dict[str, float],
    clocks: dict[str, Callable[[], float]],
    device: torch.device,
) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        _wait(device)
        started = {kind: clock() for kind, clock in clocks.items()}
        try:
            return function(*given, **named)
        finally:
            _wait(device)
            for kind, clock in clocks.items():
                spent[kind] += clock() - started[kind]

    return timed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rate(dtype: str, device: torch.device) -> float:
    """Return operations a second of a product of two square matrices, the best of five."""
    size = 2048 if device.type == "cpu" else 8192
    factor = torch.rand(size, size, device=device, dtype=getattr(torch, dtype))
    rates = []
    for _ in range(5):
        _wait(device)
        started = time.process_time() if device.type == "cpu" else time.perf_counter()
        factor @ factor
        _wait(device)
        ended = time.process_time() if device.type == "cpu" else time.perf_counter()
        rates.append(2 * size**3 / (ended - started))
    return max(rates)


def _page(rows: list[dict[str, Any]]) -> str:
    names = [*PHASES, "other", "total"]
    table = [["shape", "machine", "dtype", *names, "dropped", "peak GiB"]]
    for row in rows:
        kind = _clock(row)
        cells = [f"{row['phases'][name][kind]:.1f}" for name in names]
        cells += [f"{row['dropped']:.2f}", f"{row['peak_gib']:.1f}"]
        table.append([row["shape"], row["machine"], row["dtype"], *cells])
    lines = [
        "# What the default costs",
        "",
        f"Seconds of `PolicyPruner().fit(model).prune(model, {RATIO})`, which writes and reads "
        f"{TOKENS} tokens. On a CPU they are seconds of processor time, since the machine also "
        'does other work; the peak is that of the process, model included. "dropped" is the share '
        "of rows after which elimination stopped.",
        "",
        format_table(table),
        "",
    ]
    for row in rows:
        if row["shape"] == "opt-125m" and _clock(row) == "busy":
            lines += _extrapolation(row)
    return "\n".join(lines)


def _clock(row: dict[str, Any]) -> str:
    return "busy" if "cores" in row["machine"] else "seconds"


def _extrapolation(row: dict[str, Any]) -> list[str]:
    """Return what LLaMA-2-7B's shape would take where `row` was measured."""
    target = SHAPES["llama-2-7b"]
    small = SHAPES[row["shape"]].operations(row["dropped"])
    table = [
        ["phase", "operations", "measured", "of", "share of rate", "LLaMA-2-7B", "would take s"]
    ]
    total = 0.0
    for phase, (dtype, operations, formula) in target.operations().items():
        measured, rate = row["phases"][phase]["busy"], row["rates"][dtype]
        share = small[phase][1] / measured / rate
        seconds = operations / (share * rate)
        total += seconds
        table.append(
            [
                phase,
                formula,
                f"{small[phase][1]:.2e}",
                f"{measured:.1f} s",
                f"{share:.2f}",
                f"{operations:.2e}",
                f"{seconds:.0f}",
            ]
        )
    rates = ", ".join(f"{rate / 1e9:.0f} in {name}" for name, rate in row["rates"].items())
    return [
        "## LLaMA-2-7B's shape, worked out",
        "",
        f"On {row['machine']}: 10⁹ operations a second in matrix products, {rates}. Each phase of "
        "LLaMA-2-7B's shape is taken to reach the share of that rate that it reached on "
        f"{row['shape']}'s. T tokens, L layers, F rows of which K stay and C go, E rows when "
        f"elimination stops ({1 - row['dropped']:.2f} F as measured, {1 - RATIO:.2f} F for "
        "LLaMA-2-7B), D model width, V vocabulary, m matrices in an FFN. Nothing here was measured "
        "on LLaMA-2-7B.",
        "",
        format_table(table),
        "",
        f"Together {total / 3600:.1f} hours.",
        "",
    ]


if __name__ == "__main__":
    main()
