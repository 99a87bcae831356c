"""The command line: thin, over the same functions that Python users call."""

import shlex
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from yopo.cli.arguments import parser_of_commands
from yopo.errors import YopoError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `yopo` with `arguments`, by default those of the process; return its exit status."""
    options = parser_of_commands().parse_args(arguments)
    options.command = shlex.join(["yopo", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
    except (YopoError, OSError, SafetensorError) as error:
        print(f"yopo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("yopo: interrupted", file=sys.stderr)
        return 130
    return 0
