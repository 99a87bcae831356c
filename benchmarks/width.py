"""What a round width buys: speed at the dense width, the published odd one, and yopo's.

    python benchmarks/width.py                   small layers, in float32 and bfloat16, on the CPU
    python benchmarks/width.py --device cuda     layers of LLaMA-2-7B's shape, in bfloat16

A ratio of 0.3 leaves int(0.7 F) of F rows by the published rule; yopo rounds to a multiple of 128
nearby. Models of a few layers with random weights at the three widths run in turn, and
results/width.json and .md keep what they reached beside what operations and bytes allow. Each
machine and number of threads keeps its own rows.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common import RESULTS, keep_result, kept_rows, machine, quiet
from yopo.plan import kept_width
from yopo.report import format_table
from yopo.speed import Speed, time_in_turn
from yopo.speed.result import PHASES, paired_ratio, speed_cells

RATIO = 0.3
KEY = ("machine", "dtype")


@dataclass(frozen=True)
class Setting:
    """Say what runs: layers of D columns and F rows, and the lengths."""

    columns: int
    rows: int
    layers: int
    prompt: int
    new_tokens: int
    dtypes: tuple[str, ...]


ON_CPU = Setting(1280, 3456, 2, 64, 16, ("float32", "bfloat16"))
"""LLaMA's proportions, and like 11008 a number of rows of which the published rule leaves an odd
one with a multiple of 128 nearby: 2419 and 2432."""

ON_GPU = Setting(4096, 11008, 4, 2048, 64, ("bfloat16",))


def main() -> None:
    """Measure on one device, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as torch has it")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was measured.")
        return
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    quiet()
    device = torch.device(arguments.device)
    setting = ON_CPU if arguments.device == "cpu" else ON_GPU
    found = [_measure(setting, dtype, device, arguments.repeats) for dtype in setting.dtypes]
    new = {tuple(row[key] for key in KEY) for row in found}
    rows = [row for row in kept_rows("width") if tuple(row[key] for key in KEY) not in new]
    keep_result("width", rows + found)
    page = _page(rows + found)
    (RESULTS / "width.md").write_text(page, encoding="utf-8")
    print(page)


def _measure(setting: Setting, dtype: str, device: torch.device, repeats: int) -> dict[str, Any]:
    widths = {
        "dense": setting.rows,
        "published": kept_width(setting.rows, RATIO, multiple_of=1),
        "yopo": kept_width(setting.rows, RATIO, multiple_of="auto"),
    }
    models = [_model(setting, width, dtype, device) for width in widths.values()]
    speeds = time_in_turn(
        models,
        batch=1,
        prompt=setting.prompt,
        new_tokens=setting.new_tokens,
        repeats=repeats,
    )
    return {
        "machine": machine(device, shared=True),
        "dtype": dtype,
        **asdict(setting),
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "widths": widths,
        "speeds": {name: asdict(speed) for name, speed in zip(widths, speeds, strict=True)},
    }


def _model(setting: Setting, width: int, dtype: str, device: torch.device) -> Any:
    """Return a model that is hardly more than its layers: the vocabulary is small."""
    config = LlamaConfig(
        hidden_size=setting.columns,
        intermediate_size=width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.columns // 128,
        vocab_size=1024,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def _page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What a round width buys",
        "",
        f"Models with random weights at a ratio of {RATIO}: the dense width, the published "
        f"int({1 - RATIO:.1f} F), and yopo's, which is a multiple of 128. All three run in turn, "
        "one sequence at a time. Tokens a second are medians, with the least and the most; "
        '"times" are medians of the ratios in each turn, and in brackets what the bounds allow. '
        "The bounds are those of matrix products and of reading weights at the best rate that the "
        "machine reached in the same run. `python benchmarks/width.py` measures it.",
        "",
    ]
    for row in rows:
        speeds = {name: Speed(**speed) for name, speed in row["speeds"].items()}
        dense = speeds["dense"]
        lines += [
            f"## {row['machine']}, {row['dtype']}",
            "",
            f"{row['layers']} layers of {row['columns']} columns, prompts of {row['prompt']} "
            f"tokens, {row['new_tokens']} written, {row['repeats']} turns. The machine did "
            f"{dense.operations_per_second / 1e9:,.0f} · 10⁹ operations and read "
            f"{dense.bytes_per_second / 1e9:,.1f} GB a second at best; {row['load']:.1f} processes "
            "were running on average in the minute before the end.",
            "",
        ]
        for phase in PHASES:
            table = [["rows", phase, "bound", "share reached", "times dense", "times published"]]
            for name, speed in speeds.items():
                ratios = [_ratio(speed, speeds[other], phase) for other in ("dense", "published")]
                cells = [*speed_cells(speed, phase), *ratios]
                table.append([f"{name}: {row['widths'][name]}", *cells])
            lines += [format_table(table), ""]
    return "\n".join(lines)


def _ratio(ours: Speed, theirs: Speed, phase: str) -> str:
    measured = paired_ratio(getattr(ours, phase), getattr(theirs, phase))
    allowed = getattr(ours, f"{phase}_bound") / getattr(theirs, f"{phase}_bound")
    return f"{measured:.2f} ({allowed:.2f})"


if __name__ == "__main__":
    main()
