"""hgnl COMMAND: every command of the package under one name."""

import difflib
import importlib
import sys
from importlib.util import find_spec

from extract.cli import run_command
from extract.commands import COMMANDS, STAGES


def overview() -> str:
    """The commands, by stage."""
    lines = ["usage: hgnl COMMAND ...", "", "`hgnl COMMAND --help` shows the options of a command."]
    for stage, commands in STAGES.items():
        lines += ["", f"{stage}:", *(f"  {name:12} {text}" for name, (_, text) in commands.items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command named in `arguments` (default: the command line); returns its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = (
            f"did you mean `hgnl {nearest[0]}`?" if nearest else "`hgnl --help` lists the commands"
        )
        print(f"error: {name!r} is not a command; {hint}", file=sys.stderr)
        return 2
    module = COMMANDS[name]
    if (spec := find_spec(module)) and spec.submodule_search_locations is not None:
        module += ".__main__"
    command = importlib.import_module(module)
    return run_command(command.main, command.Options, prog=f"hgnl {name}", args=rest)


if __name__ == "__main__":
    sys.exit(main())
