"""Takes the branches that constants decide out of a shader's text.

A compiler folds them as well, but only after it has placed and merged them: in a kernel that fills its registers a
branch that is never taken still moves what stands beside it. `compose` does this for files whose head asks for it in a
line that begins with "Pruned:".

Understood are `if (condition) { ... } else { ... }` whose condition, or an operand of whose outermost `&&` or `||`,
follows from `const` declarations of integers and booleans whose names begin with a capital, which no other name may.
Everything else stays as it is, `else if` among it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_CONST = re.compile(r"^const\s+([A-Z]\w*)\s*(?::\s*\w+\s*)?=\s*([^;]+);", re.M)
_SUFFIX = re.compile(r"\b(0x[0-9a-fA-F]+|\d+)[ui]\b")
_IF = re.compile(r"\bif \(")
_ELSE = re.compile(r"\s*else\s*")
_RETURN = re.compile(r"\breturn\b[^;]*;\s*\}$")
_DECLARES = re.compile(r"\b(let|var|const)\b")

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "min": min, "max": max, "select": lambda no, yes, condition: yes if condition else no,
}  # fmt: skip


def _evaluate(node: ast.expr, known: Mapping[str, int]) -> int | None:
    """The value of an expression of unsigned integers and booleans, None where it does not follow from `known`."""
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return known.get(name)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _evaluate(operand, known)
            return None if value is None else not value
        case ast.BoolOp(op=op, values=operands):
            values = [_evaluate(each, known) for each in operands]
            deciding = isinstance(op, ast.Or)  # one operand with this value decides
            if any(value is not None and bool(value) == deciding for value in values):
                return deciding
            return None if None in values else not deciding
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return _applied(_OPERATORS.get(type(op)), [_evaluate(left, known), _evaluate(right, known)])
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _applied(_FUNCTIONS.get(name), [_evaluate(each, known) for each in arguments])
    return None


def _applied(function: Callable[..., int] | None, values: list[int | None]) -> int | None:
    if function is None or None in values:
        return None
    try:
        result = function(*values)
    except (ZeroDivisionError, TypeError):
        return None
    return result if 0 <= result < 1 << 32 else None  # else it would have to wrap


def _value(expression: str, known: Mapping[str, int]) -> int | None:
    text = _SUFFIX.sub(r"\1", expression).replace("&&", " and ").replace("||", " or ")
    text = re.sub(r"!(?!=)", " not ", text).replace("true", "True").replace("false", "False")
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body, known)
    except SyntaxError:
        return None


def constants(text: str) -> dict[str, int]:
    """The integer and boolean constants that a module declares, by name, in whatever order."""
    waiting = dict(_CONST.findall(text))
    known: dict[str, int] = {}
    while found := {name: value for name, each in waiting.items() if (value := _value(each, known)) is not None}:
        known |= found
        waiting = {name: each for name, each in waiting.items() if name not in found}
    return known


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    opening = text[start]
    closing = {"(": ")", "{": "}"}[opening]
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at
    raise ValueError(f"no {closing!r} for the {opening!r} at {start}")


def _operands(condition: str, sign: str) -> list[str]:
    """The operands of an outermost `&&` or `||`."""
    found, depth, begin = [], 0, 0
    for at, letter in enumerate(condition):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and condition.startswith(sign, at):
            found.append(condition[begin:at])
            begin = at + len(sign)
    return [*found, condition[begin:]]


def _undecided(condition: str, known: Mapping[str, int]) -> str:
    """A condition that is not decided, without the operands that are."""
    for sign in ("||", "&&"):
        operands = _operands(condition, sign)
        if len(operands) > 1:
            return sign.join(each for each in operands if _value(each, known) is None).strip()
    return condition


def _end_of_block(text: str, start: int) -> int:
    """Where the block that `start` lies in closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth < 0:
            return at
    raise ValueError(f"no block around {start}")


def pruned(text: str) -> str:
    """The text without comments and without branches that its constants decide.

    What is taken keeps its braces, so that its names stay its own. Where it returns, what followed it goes too, since
    nothing may stand behind a return.
    """
    text = _COMMENT.sub("", text)
    known = constants(text)
    at = 0
    while found := _IF.search(text, at):
        start, opening = found.start(), found.end() - 1
        closing = _closing(text, opening)
        condition = text[opening + 1 : closing]
        first = text.index("{", closing)
        end = _closing(text, first) + 1
        at = found.end()
        otherwise = ""
        if other := _ELSE.match(text, end):
            if text[other.end()] != "{":
                continue
            otherwise = text[other.end() : _closing(text, other.end()) + 1]
            end = other.end() + len(otherwise)
        decided = _value(condition, known)
        if decided is None or text[:start].rstrip().endswith("else"):
            text = text[: opening + 1] + _undecided(condition, known) + text[closing:]
            continue
        taken = text[first : _closing(text, first) + 1] if decided else otherwise
        if _RETURN.search(taken):
            end = _end_of_block(text, end)
            taken = taken if _DECLARES.search(taken) else taken[1:-1]
        text, at = text[:start] + taken + text[end:], start
    return text
