"""Exact arithmetic over Python expressions, so that a generated task's gold is right by construction.

The same text is what a policy could run in the sandbox, so a task carries its own proof.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: a ** int(b),
}


def exact(expression: str) -> Fraction:
    """The value of `+ - * / // % **` over decimal literals, with no rounding. Raises ValueError on anything else."""
    return _value(ast.parse(expression, mode="eval").body, expression)


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(ast.get_source_segment(source, node) or str(node.value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, source)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, source), _value(right, source))
    raise ValueError(f"cannot evaluate {ast.unparse(node)!r} in {source!r}: only numbers and + - * / // % ** are known")


def is_tie(value: Fraction, places: int) -> bool:
    """Whether rounding to `places` is ambiguous: half-up, half-even and floats may disagree on such a value."""
    return bool(value * 10**places % 1 == Fraction(1, 2))


def decimal_text(value: Fraction, places: int) -> str:
    """`value` rounded to `places`, as plain digits: `decimal_text(Fraction(1, 3), 2) == "0.33"`."""
    scaled = round(value * 10**places)
    sign, digits = ("-" if scaled < 0 else ""), str(abs(scaled)).rjust(places + 1, "0")
    return f"{sign}{digits[:-places]}.{digits[-places:]}" if places else f"{sign}{digits}"
