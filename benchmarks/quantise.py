"""What quantising costs after pruning and recovering: the steps of examples/quantise.py as a table.

    python benchmarks/quantise.py           the model that travels with yopo
    python benchmarks/quantise.py MODEL     another one

Writes docs/results/quantise.json and .md.
"""

import re
import subprocess
import sys
from pathlib import Path

from common import RESULTS, keep_result
from yopo.report import format_table

EXAMPLE = Path(__file__).parents[1] / "examples" / "quantise.py"
STEP = re.compile(r"^ *([^:]+): perplexity ([\d.]+), +([\d,]+) bytes", re.MULTILINE)


def main() -> None:
    """Run the example, and write what it says."""
    command = [sys.executable, str(EXAMPLE), *sys.argv[1:]]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    steps = STEP.findall(told)
    keep_result(
        "quantise",
        [
            {"step": step, "perplexity": float(value), "bytes": int(size.replace(",", ""))}
            for step, value, size in steps
        ],
    )
    table = format_table([["", "perplexity", "bytes of weights"], *map(list, steps)])
    page = (
        "# Quantising a pruned model\n\nThe embedded model, pruned at 0.3 with "
        "`PolicyPruner.lean()`, recovered on 128 short windows that the dense model wrote, then "
        "quantised; perplexity on 2048 tokens of held-out stories. One run of each step "
        f"(`python benchmarks/quantise.py`).\n\n{table}\n"
    )
    (RESULTS / "quantise.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
