"""Attention of many query rows with register tiles: see wgsl/attention_flash.wgsl, attention_flash_wide.wgsl (more keys
a tile) and attention_flash_merge.wgsl (split keys)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..backend.graph import Arg, Ref
from .attention_common import Problem, bindings_of, consts_of, dispatch_of, power_of_two_up_to, types_of, vec4s
from .base import Dispatch, Limits, Lowering, Param
from .packed_cache import bits_of, scales_part

HALF = 64
"""Keys whose probabilities are in workgroup memory at a time: four for each of the 16 lanes that share a row."""
WIDE_KEYS = 128
"""Keys of a tile of attention_flash_wide.wgsl: eight scores of each of eight rows a lane."""
WIDE_FROM = {16: 1024, 32: 4096}
"""vec4 columns of values in workgroup memory -> rows of the cache from which tiles of WIDE_KEYS are faster."""
COLUMNS = 32
"""vec4 value columns of one workgroup; wider heads take several, each of which computes the scores again."""
TARGET_WORKGROUPS = 128
"""Workgroups below which the keys are split among more of them: one for each multiprocessor of a large GPU."""
KEYS_OF_A_SPLIT = 128
"""Keys below which a split is not worth its partial result."""
MAX_SPLITS = 64
"""Splits at most: the merge keeps their states in workgroup memory."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial results beyond which keys are split less."""
MERGE_LANES = 128
"""Invocations of a workgroup of attention_flash_merge.wgsl."""

_SIZES = {"large": (128, 512), "medium": (64, 512), "small": (32, 256)}
"""Name -> rows of a workgroup, vec4s of values in workgroup memory."""
VARIANTS = ("auto", *_SIZES, *(f"{size}-whole" for size in _SIZES), "large-wide", "medium-wide")
"""Names that `choose_flash` knows; those that a device cannot run, or that change nothing there, give no choice."""


@dataclass(frozen=True)
class FlashChoice:
    """How the flash route divides its work.

    Attributes:
        rows: packed rows (query row, head of the group) of a workgroup, which has twice as many invocations.
        chunk: vec4 columns of queries and keys in workgroup memory at a time, 4 or 8.
        value_keys: keys whose values are in workgroup memory at a time.
        shuffle: lanes that exchange maxima by subgroup shuffles; 1: all through workgroup memory.
        splits: ranges of the keys of a tile; 1: no partial results.
        keys: keys of a tile, 64 or, where there is no mask, 128.
    """

    rows: int
    chunk: int
    value_keys: int
    shuffle: int
    splits: int
    keys: int = HALF

    @property
    def invocations(self) -> int:
        return 2 * self.rows


def value_width(dv: int) -> int:
    """vec4 columns of a row of values in workgroup memory."""
    return 16 * min(2, -(-vec4s(dv) // 16))


def flash_memory(choice: FlashChoice, dv: int) -> int:
    """Bytes of workgroup memory of attention_flash.wgsl or attention_flash_wide.wgsl at a value head size of `dv`."""
    scores = (choice.rows + choice.keys) * (choice.chunk + 1)
    probs = HALF * (choice.rows // 4 + 2)
    exchange = 16 // choice.shuffle * (choice.rows // 4)
    return 16 * max(scores, probs + max(choice.value_keys * value_width(dv), exchange))


def _tiles(problem: Problem, rows: int) -> int:
    return -(-problem.group * problem.rows // rows)


def _groups(problem: Problem, rows: int) -> int:
    """Workgroups without splits."""
    passes = -(-vec4s(problem.dv) // COLUMNS)
    return problem.batch * problem.kv_heads * _tiles(problem, rows) * passes


def split_bytes(problem: Problem) -> int:
    """Bytes of the partial results of one split: DV sums, top and sum of the probabilities, two spare floats a row."""
    return problem.results * 16 * (vec4s(problem.dv) + 1)


def _splits(problem: Problem, rows: int, limits: Limits) -> int:
    room = min(MAX_SCRATCH, limits.max_binding) // split_bytes(problem)
    wanted = TARGET_WORKGROUPS // _groups(problem, rows)
    return max(1, min(MAX_SPLITS, room, wanted, problem.capacity // KEYS_OF_A_SPLIT))


def variants(problem: Problem, limits: Limits) -> dict[str, FlashChoice]:
    """The choices that are sensible for a problem on a device, by name; none for head sizes that are no multiple of 4.

    "large", "medium", "small" have 128, 64, 32 rows a workgroup; "-whole": no splits; "-wide": no splits, tiles of
    128 keys where there is no mask.
    """
    found: dict[str, FlashChoice] = {}
    if problem.d % 4 or problem.dv % 4 or problem.dv == 0:
        return found
    shuffle = min(16, power_of_two_up_to(max(1, limits.subgroup_size // 2)))  # two rows share a subgroup
    for size, (rows, values) in _SIZES.items():
        chunk = 8 if vec4s(problem.d) % 8 == 0 and rows > 32 else 4
        value_keys = min(HALF, values // value_width(problem.dv))
        choice = FlashChoice(rows, chunk, value_keys, shuffle, _splits(problem, rows, limits))
        fits = choice.invocations <= limits.max_invocations
        if not fits or flash_memory(choice, problem.dv) > limits.max_workgroup_memory:
            continue
        found[size] = choice
        if choice.splits > 1:
            found[f"{size}-whole"] = replace(choice, splits=1)
        if rows > 32:  # at most four loads of keys a lane
            found[f"{size}-wide"] = replace(choice, splits=1, keys=WIDE_KEYS, chunk=min(choice.chunk, rows // 16))
    return found


def choose_flash(problem: Problem, limits: Limits, variant: str = "auto") -> FlashChoice | None:
    """The division of the flash route, or None where the device or the head sizes permit none.

    "auto" takes the largest tiles of which there are enough to fill a device, with split keys where these help. Where
    the rows are most of the keys, causal tiles differ in their work, and twice as many are needed for a balance. Large
    tiles over long caches that are not split take WIDE_KEYS keys at a time.
    """
    known = variants(problem, limits)
    if variant != "auto":
        return known.get(variant)
    count = problem.group * problem.rows
    uneven = 2 if problem.capacity < 2 * problem.rows else 1
    for size, wanted in (("large", uneven * TARGET_WORKGROUPS), ("medium", 1), ("small", 1)):
        rows, _ = _SIZES[size]
        if (
            size in known
            and _groups(problem, rows) * known[size].splits >= wanted
            and (rows == 32 or count > rows // 2)
        ):
            wide = known[size].splits == 1 and problem.capacity >= WIDE_FROM[value_width(problem.dv)]
            return known["large-wide" if size == "large" and wide else size]
    return next(iter(known.values()), None)


def _neighbour(shuffle: int) -> str:
    """The function by which attention_flash.wgsl exchanges vectors inside a subgroup."""
    value = "subgroupShuffleXor(x, distance)" if shuffle > 1 else "x"
    return f"fn neighbour(x: vec4<f32>, distance: u32) -> vec4<f32> {{ return {value}; }}\n"


def flash(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], choice: FlashChoice
) -> Iterator[Dispatch]:
    """The dispatches of the flash route: one, or two with split keys."""
    split = choice.splits > 1
    common, types = consts_of(ctx, args, problem), types_of(ctx, args, problem, out)
    scale = every["scale"]
    fold = int(args.get("attn_mask") is None and every["softcap"] == 0.0 and isinstance(scale, float) and scale > 0)
    tiles = _tiles(problem, choice.rows)
    total = _groups(problem, choice.rows) * choice.splits
    kinds = {"Mask": types["Mask"], "Sink": types["Sink"], "QVec": f"vec4<{types['Q']}>"}
    kinds["OutVec"] = "vec4<f32>" if split else f"vec4<{types['Out']}>"
    consts: dict[str, int | float | bool] = {
        **common,
        "QROWS": choice.rows,
        "CHUNK": choice.chunk,
        "VKEYS": choice.value_keys,
        "SUB": choice.shuffle,
        "SPLIT": int(split),
        "FOLD": fold,
        "PASSES": -(-vec4s(problem.dv) // COLUMNS),
    }
    for letter, name, columns in (("K", "key", problem.d), ("V", "value", problem.dv)):
        halves = ctx.wgsl_type(args[name]) == "f16" and columns % 8 == 0
        consts[f"{letter}STEP"] = 2 if halves else 1
        kinds[letter] = "vec4<u32>" if halves else types[letter]
        kinds[f"{letter}Wide"] = "vec4<u32>" if halves else "vec4<f32>"
    tensors = bindings_of(ctx, args, "key", "value", "mask", "sink")
    kernel = "attention_flash_wide" if choice.keys == WIDE_KEYS and "mask" not in tensors else "attention_flash"
    partial = ctx.scratch("f32", choice.splits * split_bytes(problem) // 4) if split else out.value
    own: dict[str, Param] = {"total": total, "tiles": tiles, "splits": choice.splits}
    bindings = {**tensors, "queries": ctx.id(args["query"]), "out": partial}
    cells = (scales_part(args), "flash_packed") if bits_of(args) else ("flash_cells",)
    shared = ("rules", "scores", "flash_ranges", "flash_rows", *cells, "flash_loads", "flash_tiles")
    first = dispatch_of(ctx, kernel, bindings, every, own, total, consts, kinds, shared)
    yield replace(first, body=first.body + _neighbour(choice.shuffle))
    if not split:
        return

    width = min(power_of_two_up_to(max(1, 2 * vec4s(problem.dv) - 1)), COLUMNS)
    subs = min(1 << math.ceil(math.log2(choice.splits)), MERGE_LANES // width)
    rows = MERGE_LANES // (width * subs) if subs >= choice.splits else 1
    own = {"total": problem.results, "splits": choice.splits}
    consts = {
        "DV": problem.dv, "QROWS": choice.rows, "FOLD": fold, "COLUMNS": width, "SUBS": subs, "ROWS": rows,
    }  # fmt: skip
    kinds = {"Sink": types["Sink"], "OutVec": f"vec4<{types['Out']}>"}
    bindings = {**bindings_of(ctx, args, "sink"), "partial": partial, "out": out.value}
    groups = -(-problem.results // rows)
    merged = ("rules", "flash_ranges")
    yield dispatch_of(ctx, "attention_flash_merge", bindings, every, own, groups, consts, kinds, merged)
