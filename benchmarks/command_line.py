"""The page of all commands and options: `python benchmarks/command_line.py`.

Writes docs/reference/command-line.md. A test keeps it so.
"""

import argparse
from pathlib import Path

from yopo.cli.arguments import parser_of_commands

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
HEAD = """# Command line

`yopo` is thin: each command calls the function of the same name in Python, and takes models as
folders or names on the hub. It ends with status 0, with 2 and a line on stderr after an error, and
with 130 after Ctrl-C; after either nothing is left half-written. `yopo COMMAND --help` tells what
this page does.

```bash
yopo info MODEL
yopo prune MODEL --output FOLDER --ratio 0.3
yopo report FOLDER
```
"""


def page() -> str:
    """Return the page, made of what the command line is told."""
    commands = next(
        action
        for action in parser_of_commands()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    helps = {action.dest: action.help for action in commands._choices_actions}
    parts = [HEAD]
    for name, parser in commands.choices.items():
        rows = [f"| {_name(action)} | {_meaning(action)} |" for action in _arguments(parser)]
        table = "\n".join(["| argument | meaning |", "|---|---|", *rows])
        parts.append(f"## yopo {name}\n\n{helps[name][0].upper()}{helps[name][1:]}.\n\n{table}\n")
    return "\n".join(parts)


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what has to be there first, and no `--help`."""
    found = [action for action in parser._actions if action.dest != "help"]
    return sorted(found, key=lambda action: (bool(action.option_strings), not action.required))


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{(action.metavar or action.dest).upper()}`"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    several = " …" if action.nargs == "+" else ""
    needed = ", required" if action.required else ""
    return f"`{action.option_strings[0]}{value}{several}`{needed}"


def _meaning(action: argparse.Action) -> str:
    choices = [] if action.choices is None else [" or ".join(f"`{c}`" for c in action.choices)]
    default = action.default
    told = "default" in (action.help or "")
    shown = [] if told or default in (None, False, []) else [f"default `{_written(default)}`"]
    return "; ".join([*([action.help] if action.help else []), *choices, *shown]).replace(
        "|", "\\|"
    )


def _written(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
