"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PIPE_WIDTH = 160
"""Columns where the output is no terminal: nothing is cut off or wrapped that another program may want."""


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_PIPE_WIDTH)


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; columns named in `right` are aligned so."""
    made = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def size(count: int | None) -> str:
    """Bytes in words; a question mark for None."""
    if count is None:
        return "?"
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def device_table(adapters: Sequence[Any], default: str | None) -> Table:
    """Adapters with what matters for kernels; the one whose summary is `default` is marked."""
    made = table(
        "Adapters",
        *("", "name", "type", "backend", "driver", "f16", "subgroups", "timestamps"),
        *("buffer", "binding", "invocations", "workgroup memory"),
        right=("buffer", "binding", "invocations", "workgroup memory"),
    )
    marked = False
    for adapter in adapters:
        info, limits = adapter.info, adapter.limits
        mark = adapter.summary == default and not marked  # two cards of one kind have the same summary
        marked |= mark
        made.add_row(
            "*" if mark else "",
            *(escape(str(info[key])) for key in ("device", "adapter_type", "backend_type", "description")),
            *("yes" if name in adapter.features else "no" for name in ("shader-f16", "subgroup", "timestamp-query")),
            size(int(limits["max-buffer-size"])),
            size(int(limits["max-storage-buffer-binding-size"])),
            str(limits["max-compute-invocations-per-workgroup"]),
            size(int(limits["max-compute-workgroup-storage-size"])),
        )
    made.caption = "* is used by default. Choose another by a part of its name: --adapter, EXECUTORCH_WEBGPU_ADAPTER."
    return made


def show_contents(out: Console, found: dict[str, Any]) -> None:
    """Print what `contents.describe_program` found."""
    named = found["named_data"]
    stored = f"{named['count']} named data of {size(named['data_bytes'])}"
    out.print(f"[bold]{escape(found['file'])}[/]: {size(found['bytes'])}, {stored}", soft_wrap=True)
    for file in found["data_files"]:
        text = f"{escape(file['file'])}: {size(file['bytes'])}, {file['count']} named data"
        out.print(text, soft_wrap=True)
    if "verified_data" in found:
        out.print(f"{found['verified_data']} weights are as they were exported.")
    if found["constant_methods"]:
        made = table("Constant methods", "name", "value")
        for name, value in found["constant_methods"].items():
            made.add_row(escape(name), escape(str(value)))
        out.print(made)
    for method in found["methods"]:
        _show_method(out, method)


def _show_method(out: Console, method: dict[str, Any]) -> None:
    out.print()
    made = table(f"Method {method['name']}", "", "name", "type")
    for entry in method["inputs"]:
        made.add_row("input", escape(entry["name"]), escape(_type(entry)))
    for number, entry in enumerate(method["outputs"]):
        made.add_row("output", str(number), escape(_type(entry)))
    out.print(made)
    for number, delegate in enumerate(method["delegates"]):
        _show_delegate(out, number, delegate)
    if method["outside"]:
        made = table("Outside the delegates (needs torch)", "operator", "calls", right=("calls",))
        for name, count in method["outside"].items():
            made.add_row(escape(name), str(count))
        out.print(made)
    else:
        out.print("Nothing is outside the delegates.")


def _type(entry: dict[str, Any]) -> str:
    if entry["sizes"] is None:
        return str(entry["dtype"])
    sizes = [f"<={n}" if entry["dynamic"] and n != 1 else str(n) for n in entry["sizes"]]
    return f"{entry['dtype']}[{', '.join(sizes)}]"


def _show_delegate(out: Console, number: int, delegate: dict[str, Any]) -> None:
    title = f"Delegate {number}: {delegate['backend']}, blob of {size(delegate['blob_bytes'])}"
    if "nodes" not in delegate:
        out.print(f"{escape(title)}; another backend's, its content is not known", soft_wrap=True)
        return
    highs = {s["symbol"]: "inf" if s["high"] is None else s["high"] for s in delegate["symbols"]}
    ranges = [f"{s['symbol']} in [{s['low']}, {highs[s['symbol']]}]" for s in delegate["symbols"]]
    made = table(title, "values", "count", "views", "bytes, at most", right=("count", "views", "bytes, at most"))
    for kind, entry in delegate["values"].items():
        made.add_row(kind, str(entry["count"]), str(entry["views"]), size(entry["bytes"]))
    out.print(made)
    out.print(escape(f"Symbols: {', '.join(ranges) or 'none'}"), soft_wrap=True)
    if delegate["missing_data"]:
        count = len(delegate["missing_data"])
        out.print(f"{count} data keys are in none of these files: give the .ptd of the same export with --data.")
    made = table(f"{sum(delegate['nodes'].values())} nodes", "operator", "count", right=("count",))
    for name, count in delegate["nodes"].items():
        made.add_row(escape(name), str(count))
    out.print(made)
    if "graph" in delegate:
        out.print(delegate["graph"], markup=False, soft_wrap=True)
