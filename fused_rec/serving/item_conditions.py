"""Conditions on columns of the items, written as text: `type == 'fund' and risk_band <= 3`.

A condition compares columns with values (==, !=, <, <=, >, >=, in [...], not in [...]) and joins comparisons by `and`,
`or` and `not`. The syntax is Python's, of which nothing else is accepted; it is compiled to functions of Arrow and
never run by Python. A comparison with a missing value is neither true nor false, and such an item does not match.
Dates and times are written as text: `closes < '2026-01-01'`.
"""

import ast
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.dataset import printable
from fused_rec.data.io.arrow import flags, known, pc

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
GRAMMAR = "compare columns with values (==, !=, <, <=, >, >=, in [...], not in [...]), joined by and, or and not"
MAX_LENGTH = 10_000  # characters


def matching_rows(items: pa.Table, where: str) -> Int64[np.ndarray, "C"]:
    """Finds the items that match a condition.

    Args:
      items: the item table.
      where: the condition.

    Returns:
      Their rows, ascending.

    Raises:
      ValueError: the condition has another syntax, names a column that the table does not have, or compares a column
        with a value of another type.
    """
    if len(where) > MAX_LENGTH:
        raise ValueError(f"where has {len(where):,} characters; it must have {MAX_LENGTH:,} at most: list items by id")
    try:
        return np.flatnonzero(flags(_condition(ast.parse(where.strip(), mode="eval").body, items)))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise _syntax(where, str(error)) from error
    except _NotAcceptedError as error:
        raise _syntax(where, f"{error} is not part of it") from error


class _NotAcceptedError(Exception):
    """Python syntax outside of the grammar."""


def _syntax(where: str, why: str) -> ValueError:
    shown = printable(where if len(where) <= 80 else f"{where[:80]}...")
    return ValueError(f"where is {shown!r}, which cannot be read ({printable(why)}); {GRAMMAR}")


def _condition(node: ast.expr, items: pa.Table) -> Any:
    """Compiles and computes a condition: booleans, null where unknown."""
    match node:
        case ast.BoolOp(op, values):
            join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
            return functools.reduce(join, (_condition(value, items) for value in values))
        case ast.UnaryOp(ast.Not(), operand):
            return pc.invert(_condition(operand, items))
        case ast.Compare(left, ops, rights):
            lefts = [left, *rights[:-1]]  # a < b < c is a < b and b < c
            found = [_compared(*pair, items) for pair in zip(ops, lefts, rights, strict=True)]
            return functools.reduce(pc.and_kleene, found)
    raise _NotAcceptedError(ast.unparse(node))


def _compared(op: ast.cmpop, left: ast.expr, right: ast.expr, items: pa.Table) -> Any:
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise _NotAcceptedError(ast.unparse(right))
        equal = (_compared(ast.Eq(), left, value, items) for value in right.elts)
        found = functools.reduce(pc.or_kleene, equal)
        return found if isinstance(op, ast.In) else pc.invert(found)
    compare = COMPARISONS.get(type(op))
    names = [side.id for side in (left, right) if isinstance(side, ast.Name)]
    if compare is None or not names:
        raise _NotAcceptedError(ast.unparse(ast.Compare(left, [op], [right])))
    kind = _column(names[0], items).type
    if any(pa.types.is_null(_column(name, items).type) for name in names):  # a column without any value
        return pa.nulls(items.num_rows, pa.bool_())
    sides = [_column(s.id, items) if isinstance(s, ast.Name) else _value(s, names[0], kind) for s in (left, right)]
    try:
        return compare(*sides)
    except pa.ArrowException as error:
        types = " and ".join(str(side.type) for side in sides)
        raise ValueError(f"where compares {' with '.join(names)}: {types} cannot be compared") from error


def _column(name: str, items: pa.Table) -> pa.ChunkedArray:
    if items.column_names.count(name) != 1:
        columns = ", ".join(map(printable, items.column_names))
        raise ValueError(f"where has {name}, which is no column of the items; they have {columns}")
    column = items[name]
    return known(column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column)


def _value(node: ast.expr, name: str, kind: pa.DataType) -> pa.Scalar:
    """Returns a value that is compared with a column of this type."""
    try:
        value = ast.literal_eval(node)
    except ValueError as error:
        raise _NotAcceptedError(ast.unparse(node)) from error
    expected, fits = "text in quotes", isinstance(value, str)
    if pa.types.is_boolean(kind):
        expected, fits = "True or False", isinstance(value, bool)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        expected, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    elif pa.types.is_temporal(kind):
        expected = "a date or time as text, such as '2026-01-31'"
    try:
        if fits:
            return pa.scalar(value).cast(kind) if pa.types.is_temporal(kind) else pa.scalar(value)
    except (pa.ArrowException, OverflowError):
        fits = False
    raise ValueError(f"where compares {name}, a column of {kind}, with {value!r:.80}; it must be {expected}")
