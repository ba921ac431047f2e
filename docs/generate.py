"""Write the generated parts of the documentation anew, between their marks.

python docs/generate.py            # docs/flags.md and docs/compatibility.md
python docs/generate.py --check    # only compare; exit 1 if a page is not current
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx_optiq_compat as compat
from mlx_optiq_hooks.commands.table import COMMANDS
from mlx_optiq_hooks.engine.command import grouped

PAGES = Path(__file__).parent


def flags() -> str:
    """The options of all commands as tables; commands with the same options share one."""
    commands: dict[str, list[str]] = {}
    for name, command in COMMANDS.items():
        group = argparse.ArgumentParser().add_argument_group()
        command.add_arguments(group)
        tables = "\n\n".join(
            f"**{title[0].upper()}{title[1:]}**\n\n| flag | meaning |\n|---|---|\n"
            + "\n".join(map(_row, actions))
            for title, actions in grouped(group._group_actions, command.groups).items()
        )
        if tables:
            commands.setdefault(tables, []).append(f"mlx_lm.{name}")
    return "\n\n".join(f"## {', '.join(names)}\n\n{tables}" for tables, names in commands.items())


def _row(action: argparse.Action) -> str:
    name, value = action.option_strings[0], action.metavar
    if value is None and action.choices:
        value = "\\|".join(map(str, action.choices))
    if value and action.nargs != 0:
        name += f" [{value}]" if action.nargs == "?" else f" {value}"
    meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
    meaning = re.sub(r"(?<!\S)--[a-z][a-z-]*", lambda found: f"`{found[0]}`", meaning)
    return f"| `{name}` | {meaning} |"


#: Name of a page -> what stands between its marks.
GENERATED: Mapping[str, Callable[[], str]] = {
    "flags.md": flags,
    "compatibility.md": compat.markdown_table,
}


def main() -> int:
    """Write or compare the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated pages.")
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    stale = []
    for name, generated in GENERATED.items():
        page = PAGES / name
        text = page.read_text(encoding="utf-8")
        fresh = re.sub(
            r"(?s)(?<=<!-- generated -->\n).*?(?=<!-- end -->)",
            lambda _, generated=generated: f"\n{generated()}\n\n",
            text,
        )
        if fresh != text:
            stale.append(name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    for name in stale:
        print(f"docs/{name}: {'not current; run python docs/generate.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
