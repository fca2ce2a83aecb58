"""The documentation's table of configurations, from results that `tests.models.verify --results FILE` wrote.

python -m tests.models.table FILE [FILE ...] > docs/CONFIGURATIONS.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.models.catalogue import CONFIGS
from tests.models.hf import UNEXPORTABLE
from tests.models.ties import NEAR
from tests.models.verify import TOLERANCES

HEAD = """# Export configurations

Made by `python -m tests.models.verify all --results FILE` and `python -m tests.models.table FILE`. Every configuration
of `tests/models/catalogue.py` is exported with tiny random weights through the exporter that its name begins with,
lowered, and run: a prefill, 64 decode steps and a last chunk where the shape is dynamic, single steps where it is not.

**Error** is the largest |result - reference| in units of the tolerance (1.00 is the limit): {tolerances}.
The reference is the same eager module with its weights in the configuration's dtype, computed in float32 with float64
attention; float16 caches are rounded to float16 as the program says. Route B is `to_edge_transform_and_lower`, route A
`to_edge(...).to_backend(...)`. In models that round activations to 8 bits (`8da*`) a value within {near} of a step of
a tie may be rounded to either side, in the reference as well (`tests/models/ties.py`); the tolerance is that of others.

`bare_*_user_caches` hands its caches in and out: ExecuTorch itself puts `aten::copy_` outside the delegate then.
Caches that are also outputs (`*_cache_returned`): ExecuTorch refuses a delegate whose mutated buffer is an output too.
On route B the partitioner gives such outputs a clone; on route A, where it may not change the graph, the caller does
(`executorch_webgpu.partitioner.separate_outputs`, without effect on every other configuration).
"""


def rows(files: list[Path]) -> dict[tuple[str, str, str], dict[str, object]]:
    """(name, route, device limits) -> the last report."""
    found: dict[tuple[str, str, str], dict[str, object]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["name"], row["route"], row["limits"]] = row
    return found


def result(row: dict[str, object]) -> str:
    """pass, refused (the partitioner named operators that it cannot take), or FAIL."""
    return "pass" if row["passed"] else "refused" if row["refused"] else "FAIL"


def main() -> int:
    found = rows([Path(name) for name in sys.argv[1:]])
    limits = ", ".join(f"{dtype} {a:g} + {r:g} |ref|" for dtype, (a, r) in TOLERANCES.items())
    print(HEAD.format(tolerances=limits, near=NEAR))
    devices = sorted({str(row["device"]) for row in found.values() if row["device"]})
    passed = sum(bool(row["passed"]) for row in found.values())
    refused = sum(not row["passed"] and bool(row["refused"]) for row in found.values())
    print(f"Devices: {', '.join(devices)}. Of {len(found)} runs {passed} pass, {refused} are refused.\n")
    titles = ("configuration", "route", "limits", "delegates", "outside", "records", "dispatches", "error", "result")
    print("| " + " | ".join(titles) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    order = {config.name: number for number, config in enumerate(CONFIGS)}
    for key in sorted(found, key=lambda k: (order.get(k[0], 1 << 30), k[1:])):
        row = found[key]
        outside = ", ".join(sorted(set(row["outside"]))) or "-"  # type: ignore[call-overload]
        print(
            f"| {key[0]} | {key[1]} | {key[2]} | {row['delegates']} | {outside} | {row['nodes']} | {row['dispatches']} "
            f"| {float(str(row['worst'])):.3f} | {result(row)} |"
        )
    missing = [config.name for config in CONFIGS if not any(key[0] == config.name for key in found)]
    if missing:
        print(f"\nNot run yet: {', '.join(missing)}.")
    print("\n## Cannot be exported upstream\n")
    for name, reason in UNEXPORTABLE.items():
        print(f"- `{name}`: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
