"""Entry point of the `executorch-webgpu` command."""

from __future__ import annotations

import sys

_NEEDED = ("click", "rich")


def main() -> None:
    """Run the command line and exit: 0 when it worked, 1 for an error, 2 for a wrong use."""
    try:
        from .commands import cli
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        hint = "the executorch-webgpu command needs click and rich: pip install 'executorch-webgpu[cli]'"
        print(f"Error: {hint}", file=sys.stderr)
        sys.exit(1)
    cli(prog_name="executorch-webgpu")


if __name__ == "__main__":
    main()
