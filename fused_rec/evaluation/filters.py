"""Suitability rules: a JSON file of hard constraints on (user, item) pairs, applied to the tables as masks.

    {"rules": [
      {"name": "risk", "require": ["item.risk_band", "at_most", "user.risk_tolerance"]},
      {"name": "country", "require": ["user.country", "one_of", "item.sold_in"], "separator": ";"},
      {"name": "age", "require": ["user.age", "at_least", "item.min_age"]},
      {"name": "accredited", "require": ["item.open_to", "at_most", "user.kind"], "order": ["retail", "professional"]},
      {"name": "cash", "require": ["item.minimum", "at_most", "user.cash"], "allow_unknown": ["item"]},
      {"name": "adult", "require": ["user.age", "at_least", 18]},
      {"name": "withdrawn", "refuse": {"items": ["P007"]}},
      {"name": "already held", "refuse": "held"}
    ]}

A rule either requires a relation between a column of one table and a column of the other or a constant, or refuses a
list. A pair with a missing value is refused, unless `allow_unknown` names each table with the missing value. A pair
that any rule refuses is never ranked.

U users, I items; B users per batch; N rows of either table; D distinct values.
"""

import dataclasses
import decimal
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Bool, Int32, Int64

from fused_rec.data.dataset import printable
from fused_rec.data.io.arrow import known as known_values
from fused_rec.data.io.arrow import pc
from fused_rec.evaluation.item_sets import UserItemSets, item_sets
from fused_rec.evaluation.ranking import CandidateFilter

Side = Literal["user", "item"]
SIDES: tuple[Side, ...] = ("user", "item")
RELATIONS = ("at_most", "at_least", "one_of", "none_of")
SEEN_RULE = "held"
CELLS = 1 << 28  # largest lookup table of distinct user values by items, one byte per cell
_WHOLE = re.compile("0|-?[1-9][0-9]*")
EXACT = 2**53  # float64 represents all integers up to here exactly
_BETWEEN = "\x1f"  # separator of the entries of a joined list


@dataclasses.dataclass(frozen=True)
class Column:
    """Column of the users or of the items."""

    side: Side
    name: str


@dataclasses.dataclass(frozen=True)
class Require:
    """Required relation between `left` and `right`.

    Attributes:
      name: name of the rule.
      left: a column.
      relation: one of `RELATIONS`.
      right: a column of the other table, a number, a value of `order`, or a tuple of values.
      order: categories from the lowest rank, equal ones together; empty for numeric columns.
      separator: separator of list entries in a cell; empty for cells with one entry, or for Arrow lists.
      allow_unknown: tables whose missing values pass.
    """

    name: str
    left: Column
    relation: str
    right: Column | float | int | str | tuple[str, ...]
    order: tuple[tuple[str, ...], ...] = ()
    separator: str = ""
    allow_unknown: frozenset[Side] = frozenset()


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Refused pairs: the user's own interactions (`held`), or listed users, items or (user, item) pairs, by id."""

    name: str
    held: bool = False
    users: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()


Rule = Require | Refuse


def parse(text: str) -> tuple[Rule, ...]:
    """Parses the text of a rules file.

    Args:
      text: JSON, as in the docstring of this module.

    Returns:
      The rules in their order.

    Raises:
      ValueError: names the rule, the value, the bound and the remedy.
    """
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the rules cannot be read as JSON: {printable(str(error))}") from error
    if not isinstance(values, dict) or set(values) != {"rules"} or not isinstance(values["rules"], list):
        raise ValueError(f'the rules are {_shown(values)}; they must be {{"rules": [...]}}, a list of rules')
    rules = tuple(_rule(value, place) for place, value in enumerate(values["rules"], start=1))
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"rule {name!r} is defined {names.count(name)} times; give each rule a unique name")
    if sum(isinstance(rule, Refuse) and rule.held for rule in rules) > 1:
        raise ValueError(f'two rules refuse "{SEEN_RULE}"; one is enough')
    return rules


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is defined twice in one object; keep one")
    return values


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a finite number; leave the rule out, or give a bound")


def _shown(value: Any) -> str:
    shown = printable(json.dumps(value, ensure_ascii=False, default=str))
    return shown if len(shown) <= 80 else shown[:80] + "..."


def _fail(rule: str, field: str, value: Any, bound: str) -> ValueError:
    return ValueError(f"rule {printable(rule)!r}: {field} is {_shown(value)}; it must be {bound}")


def _rule(value: Any, place: int) -> Rule:
    if not isinstance(value, dict):
        raise ValueError(f"rule {place} is {_shown(value)}; it must be an object with a name and `require` or `refuse`")
    name = value.get("name")
    if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 80:
        raise ValueError(f"rule {place}: name is {_shown(name)}; it must be printable text of 1 to 80 characters")
    if ("require" in value) == ("refuse" in value):
        raise _fail(name, "the rule", value, "either `require` or `refuse`")
    known = {"name", "require", "order", "separator", "allow_unknown"} if "require" in value else {"name", "refuse"}
    if unknown := sorted(set(value) - known):
        raise _fail(name, "the rule's fields", unknown, f"of {', '.join(sorted(known))}")
    if name == SEEN_RULE and value.get("refuse") != SEEN_RULE:
        raise ValueError(
            f'rule {place}: the name "{SEEN_RULE}" is reserved for a rule that refuses "{SEEN_RULE}"; choose another'
        )
    return _require(name, value) if "require" in value else _refuse(name, value["refuse"])


def _refuse(name: str, listed: Any) -> Refuse:
    if listed == SEEN_RULE:
        return Refuse(name, held=True)
    kinds = ("users", "items", "pairs")
    if not isinstance(listed, dict) or len(listed) != 1 or next(iter(listed)) not in kinds:
        raise _fail(name, "refuse", listed, f'"{SEEN_RULE}" or one list among {", ".join(kinds)}')
    [(kind, ids)] = listed.items()
    if kind == "pairs":
        if not _is_list(ids, list) or not all(len(pair) == 2 and _is_list(pair, str) for pair in ids):
            raise _fail(name, "refuse.pairs", ids, "a list of pairs of ids [user, item], as text")
        return Refuse(name, pairs=tuple((user, item) for user, item in ids))
    if not _is_list(ids, str):
        raise _fail(name, f"refuse.{kind}", ids, "a list of ids, as text")
    return Refuse(name, users=tuple(ids)) if kind == "users" else Refuse(name, items=tuple(ids))


def _is_list(value: Any, of: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, of) for entry in value)


def _require(name: str, value: Mapping[str, Any]) -> Require:
    sentence = value["require"]
    if not isinstance(sentence, list) or len(sentence) != 3:
        raise _fail(name, "require", sentence, '[column, relation, column or constant], a column as "item.risk_band"')
    left = _column(sentence[0])
    if left is None:
        raise _fail(name, "require, first", sentence[0], 'a column as "user.age" or "item.risk_band"')
    relation = sentence[1]
    if relation not in RELATIONS:
        raise _fail(name, "require, second", relation, f"one of {', '.join(RELATIONS)}")
    order = _order(name, value.get("order", []))
    right = _right(name, relation, sentence[2], order)
    if isinstance(right, Column) and right.side == left.side:
        raise _fail(name, "require", sentence, "about a user and an item, or a column and a constant")
    separator = value.get("separator", "")
    if not isinstance(separator, str) or len(separator) > 3 or separator == _BETWEEN:
        raise _fail(name, "separator", separator, "a text of 1 to 3 characters")
    if order and relation in ("one_of", "none_of"):
        raise _fail(name, "order", value["order"], f"left out: {relation} does not use an order")
    if "separator" in value and (not separator or relation in ("at_most", "at_least") or not isinstance(right, Column)):
        raise _fail(name, "separator", separator, "given only where the column after one_of or none_of holds lists")
    allow = value.get("allow_unknown", [])
    sides = {left.side} | ({right.side} if isinstance(right, Column) else set())
    if not isinstance(allow, list) or not all(isinstance(side, str) and side in sides for side in allow):
        raise _fail(name, "allow_unknown", allow, f"a list of tables that the rule reads: {', '.join(sorted(sides))}")
    return Require(name, left, relation, right, order, separator, frozenset(allow))


def _column(value: Any) -> Column | None:
    side, dot, name = value.partition(".") if isinstance(value, str) else ("", "", "")
    return Column(side, name) if side in SIDES and dot and name else None  # pyright: ignore[reportArgumentType]


def _order(name: str, value: Any) -> tuple[tuple[str, ...], ...]:
    """Parses `order`: each rank is a category, or a list of equal categories."""
    ranks = [[rank] if isinstance(rank, str) else rank for rank in value] if isinstance(value, list) else value
    valid = isinstance(ranks, list) and all(_is_list(rank, str) for rank in ranks)
    if not valid or len(ranks) == 1 or len({w for rank in ranks for w in rank}) < sum(map(len, ranks)):
        bound = "a list of two or more distinct categories, lowest first; a list within it for equal ones"
        raise _fail(name, "order", value, bound)
    return tuple(tuple(rank) for rank in ranks)


def _right(name: str, relation: str, value: Any, order: tuple[tuple[str, ...], ...]) -> Any:
    if relation in ("one_of", "none_of"):
        right = _column(value)
        if right is None and not _is_list(value, str):
            bound = f'a column or a list of texts, since the relation is {relation}; numbers as text, such as "26"'
            raise _fail(name, "require, third", value, bound)
        if right is None and not all(entry.strip() for entry in value):
            bound = "texts that are not empty; use `allow_unknown` to let missing values pass"
            raise _fail(name, "require, third", value, bound)
        return tuple(entry.strip() for entry in value) if right is None else right
    if order and any(value in rank for rank in order):
        return value
    if right := _column(value):
        return right
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if order or not number or not math.isfinite(value) or abs(value) >= 2**63:
        raise _fail(
            name, "require, third", value, "a column or a value of `order`" if order else "a column or a number"
        )
    return value


def apply(rules: Sequence[Rule], users: pa.Table, items: pa.Table, held: UserItemSets) -> CandidateFilter:
    """Compiles rules for these tables into masks of int32 codes: exact comparisons, without a dense U x I array.

    Args:
      rules: the rules.
      users: user table, as in `Dataset`.
      items: item table, as in `Dataset`.
      held: interactions of each user, for a rule that refuses them.

    Returns:
      The filter, with the names of the rules.

    Raises:
      ValueError: a column is missing or cannot be compared, or an id is unknown.
    """
    tables: dict[Side, pa.Table] = {"user": users, "item": items}
    tests: list[tuple[str, jax.tree_util.Partial]] = []
    barred: list[tuple[str, UserItemSets]] = []
    for rule in rules:
        if isinstance(rule, Require):
            tests.append((rule.name, _test(rule, tables)))
        elif rule.held:
            barred.append((rule.name, held))
        elif rule.pairs:
            user, item = (
                _places(rule.name, side, [pair[n] for pair in rule.pairs], tables) for n, side in enumerate(SIDES)
            )
            barred.append((rule.name, item_sets(user, item, users.num_rows)))
        else:
            side: Side = "user" if rule.users else "item"
            fine = np.ones(tables[side].num_rows, bool)
            fine[_places(rule.name, side, rule.users or rule.items, tables)] = False
            tests.append((rule.name, _one_sided(side, fine, tables)))
    names = *(name for name, _ in tests), *(name for name, _ in barred)
    return CandidateFilter(names, tuple(test for _, test in tests), tuple(sets for _, sets in barred))


def _places(rule: str, side: Side, ids: Sequence[str], tables: Mapping[Side, pa.Table]) -> Int32[np.ndarray, "N"]:
    known = tables[side].column(f"{side}_id").combine_chunks()
    rows = pc.index_in(pa.array(ids, pa.string()), value_set=known)
    if rows.null_count:
        first = ids[int(np.flatnonzero(np.asarray(rows.is_null()))[0])]
        raise _fail(
            rule, f"{rows.null_count} {side} ids, the first", first, f"ids of the {len(known)} {side}s; correct it"
        )
    return rows.to_numpy().astype(np.int32)


def _one_sided(side: Side, fine: Bool[np.ndarray, "N"], tables: Mapping[Side, pa.Table]) -> jax.tree_util.Partial:
    """Builds a test of users alone or of items alone, as a lookup table with one or two rows."""
    n_users, n_items = (tables[s].num_rows for s in SIDES)
    if side == "user":
        return _table(fine.astype(np.int32), np.repeat(np.array([[False], [True]]), n_items, axis=1))
    return _table(np.zeros(n_users, np.int32), fine[None])


def _table(code: Int32[np.ndarray, "U"], passes: Bool[np.ndarray, "D I"]) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(_listed, jnp.asarray(code), jnp.asarray(passes))


def _listed(code: Int32[Array, "U"], passes: Bool[Array, "D I"], users: Int32[Array, "B"]) -> Bool[Array, "B I"]:
    return passes[code[users]]


def _ordered(
    low: Int32[Array, "I"],
    high: Int32[Array, "U"],
    allow: Bool[Array, "2"],
    users: Int32[Array, "B"],
) -> Bool[Array, "B I"]:
    """Tests item rank <= user rank, 0 = unknown. allow: whether unknown users and unknown items pass."""
    low, high = low[None, :], high[users][:, None]
    unknown = (low == 0) | (high == 0)
    let_pass = ((high != 0) | allow[0]) & ((low != 0) | allow[1])
    return jnp.where(unknown, let_pass, low <= high)


def _test(rule: Require, tables: Mapping[Side, pa.Table]) -> jax.tree_util.Partial:
    allow: dict[Side, bool] = {side: side in rule.allow_unknown for side in SIDES}
    if rule.relation in ("one_of", "none_of"):
        return _membership(rule, _values(rule, rule.left, tables), tables, allow)
    numbers = _ranks(rule, rule.left, tables)
    if not isinstance(rule.right, Column):
        assert not isinstance(rule.right, tuple)
        bound = next((n for n, rank in enumerate(rule.order) if rule.right in rank), rule.right)
        values, bounds = _alike(numbers[0], np.array([bound]))
        fine = values <= bounds if rule.relation == "at_most" else values >= bounds
        return _one_sided(rule.left.side, np.where(numbers[1], fine, allow[rule.left.side]), tables)
    others = _ranks(rule, rule.right, tables)
    values, bounds = _alike(numbers[0], others[0])
    of_side = {rule.left.side: (values, numbers[1]), rule.right.side: (bounds, others[1])}
    # Ranks among the values of both columns compare as the values do, whatever their size. The item's rank must be at
    # most the user's; for the opposite relation both signs are flipped.
    among = np.unique(np.concatenate([values[known] for values, known in of_side.values()]))
    sign = 1 if (rule.relation == "at_most") == (rule.left.side == "item") else -1
    ranks = {
        side: np.where(known, sign * (np.searchsorted(among, values) + 1), 0).astype(np.int32)
        for side, (values, known) in of_side.items()
    }
    allowed = np.array([allow[side] for side in SIDES])
    return jax.tree_util.Partial(_ordered, jnp.asarray(ranks["item"]), jnp.asarray(ranks["user"]), jnp.asarray(allowed))


def _alike(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Converts both to decimals if float64 would round one of them; a float counts as it is printed: .1 is a tenth."""
    kinds = {left.dtype.kind, right.dtype.kind}
    integers = [numbers for numbers in (left, right) if numbers.dtype.kind == "i"]
    small = all(
        abs(int(end)) <= EXACT for numbers in integers if len(numbers) for end in (numbers.min(), numbers.max())
    )
    if len(kinds) == 1 or (small and "O" not in kinds):
        return left, right
    return _decimals(left), _decimals(right)


def _decimals(numbers: np.ndarray) -> np.ndarray:
    exact = np.empty(len(numbers), object)
    exact[:] = [_decimal(number) for number in numbers.tolist()]
    return exact


def _decimal(number: int | float | decimal.Decimal) -> decimal.Decimal:
    if isinstance(number, float) and EXACT <= abs(number) < math.inf:  # all of them are integers
        return decimal.Decimal(number)
    return number if isinstance(number, decimal.Decimal) else decimal.Decimal(repr(number))


def _values(rule: Require, column: Column, tables: Mapping[Side, pa.Table]) -> pa.ChunkedArray:
    table = tables[column.side]
    if table.column_names.count(column.name) != 1:
        columns = ", ".join(map(printable, table.column_names))
        raise _fail(
            rule.name, "column", f"{column.side}.{column.name}", f"one of the {column.side}s' columns: {columns}"
        )
    values = table.column(column.name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return (
        values if _is_list_type(values.type) else known_values(values)
    )  # a list with a missing entry is unknown as a whole


def _is_list_type(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _ranks(rule: Require, column: Column, tables: Mapping[Side, pa.Table]) -> tuple[np.ndarray, Bool[np.ndarray, "N"]]:
    """Returns numbers that order the values (int64, float64 or decimals), and which values are known."""
    values = _values(rule, column, tables)
    kind, named = values.type, f"{column.side}.{column.name}"
    if rule.order:
        rank_of = {category: n for n, rank in enumerate(rule.order) for category in rank}
        texts = _text_values(rule, column, values)
        codes = pc.index_in(texts, value_set=pa.array(list(rank_of)))
        if strange := pc.unique(texts.filter(pc.and_(pc.is_null(codes), pc.is_valid(texts)))).to_pylist():
            raise _fail(rule.name, named, strange[:5], f"in `order`: {', '.join(rank_of)}; list all categories there")
        known = np.asarray(codes.is_valid())
        ranks = np.array(list(rank_of.values()), np.int64)
        return ranks[np.asarray(pc.fill_null(codes, 0))], known
    known = np.asarray(values.is_valid())
    if pa.types.is_null(kind):
        return np.zeros(len(values), np.int64), known
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        try:
            numbers = pc.fill_null(values.cast(pa.int8() if pa.types.is_boolean(kind) else pa.int64()), 0)
        except pa.ArrowInvalid as error:
            raise _fail(rule.name, named, str(error), "integers of 64 bits") from error
        return np.asarray(numbers).astype(np.int64), known
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):  # as it is printed: .1 is a tenth
        written = np.asarray(pc.fill_null(values.cast(pa.float32()), 0.0)).astype(np.str_)
        return written.astype(np.float64), known
    if pa.types.is_floating(kind):
        return np.asarray(pc.fill_null(values.cast(pa.float64()), 0.0)), known
    if pa.types.is_decimal(kind):
        exact = np.empty(len(values), object)
        exact[:] = [decimal.Decimal(0) if value is None else value for value in values.to_pylist()]
        return exact, known
    bound = "numbers; for categories give `order`, lowest first"
    if (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and (first := _first_text(values)) is not None:
        id_ = printable(str(tables[column.side].column(f"{column.side}_id")[first]))
        bound += f" ({_shown(values[first].as_py())} of {column.side} {id_!r}, row {first + 2} of the {column.side}s)"
    raise _fail(rule.name, named, str(kind), bound)


def _first_text(texts: pa.ChunkedArray) -> int | None:
    """Returns the first row whose text is not a number, else the first with a text."""
    known = np.asarray(texts.is_valid())
    number = np.asarray(pc.fill_null(pc.match_substring_regex(texts, r"\A-?[0-9]+(\.[0-9]+)?\z"), True))
    return next((int(rows[0]) for rows in (np.flatnonzero(~number), np.flatnonzero(known)) if len(rows)), None)


def _text_values(rule: Require, column: Column, values: pa.ChunkedArray) -> pa.Array:
    """Converts values to trimmed text in one chunk; entries of lists are joined by `_BETWEEN`."""
    kind = values.type
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    of_lists = _is_list_type(kind)
    if not any(is_kind(_element(kind)) for is_kind in plain):
        bound = "lists of text or integers" if of_lists else "text or integers"
        raise _fail(rule.name, f"{column.side}.{column.name}", str(kind), bound)
    if of_lists:
        return pc.binary_join(values.cast(pa.list_(pa.string())), _BETWEEN).combine_chunks()  # null if an entry is null
    return pc.utf8_trim_whitespace(values.cast(pa.string())).combine_chunks()


def _element(kind: pa.DataType) -> pa.DataType:
    """Returns the type of list entries or of the values, decoded if dictionary-encoded."""
    kind = kind.value_type if _is_list_type(kind) else kind
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_alike(rule: Require, kind: pa.DataType, of: str, texts: Iterable[str], where: str) -> None:
    """Refuses a comparison of integers or booleans with texts that cannot equal any of them."""
    if pa.types.is_integer(kind):
        strange = [text for text in texts if not _WHOLE.fullmatch(text)]
    elif pa.types.is_boolean(kind):
        strange = [text for text in texts if text not in ("true", "false")]
    else:
        return
    if strange:
        bound = f"{kind} values as in {of}, since others never match; store codes as text in both"
        raise _fail(rule.name, where, sorted(set(strange))[:5], bound)


def _classes(texts: pa.Array) -> tuple[list[str], Int64[np.ndarray, "N"]]:
    """Returns the distinct texts and the code of each row; the code of null is their number."""
    encoded = pc.dictionary_encode(texts)
    distinct = encoded.dictionary.to_pylist()
    return distinct, np.asarray(pc.fill_null(encoded.indices, len(distinct))).astype(np.int64)


def _membership(
    rule: Require, left: pa.ChunkedArray, tables: Mapping[Side, pa.Table], allow: Mapping[Side, bool]
) -> jax.tree_util.Partial:
    if _is_list_type(left.type):
        named = f"{rule.left.side}.{rule.left.name}"
        raise _fail(
            rule.name, named, str(left.type), f"one value per row; the list is the operand after {rule.relation}"
        )
    wanted = rule.relation == "one_of"
    scalars, code = _classes(_text_values(rule, rule.left, left))
    named = f"{rule.left.side}.{rule.left.name}"
    if not isinstance(rule.right, Column):
        assert isinstance(rule.right, tuple)
        _check_alike(rule, left.type, named, rule.right, "require, third")
        fine = [(scalar in rule.right) == wanted for scalar in scalars]
        return _one_sided(rule.left.side, np.array([*fine, allow[rule.left.side]], bool)[code], tables)
    right = _values(rule, rule.right, tables)
    lists, list_code = _classes(_text_values(rule, rule.right, right))
    separator = rule.separator or _BETWEEN
    entries = [{entry.strip() for entry in cell.split(separator)} - {""} for cell in lists]
    if rule.separator:  # a cell of separators alone is an empty cell
        empty = np.array([not entry for entry in entries] + [True], bool)
        list_code = np.where(empty[list_code], len(lists), list_code)
    others = f"{rule.right.side}.{rule.right.name}"
    _check_alike(rule, left.type, named, set().union(*entries), others)
    _check_alike(rule, _element(right.type), others, scalars, named)
    kinds = (len(scalars) + 1) * (len(lists) + 1)
    n_items = tables["item"].num_rows
    of_users = (len(scalars) if rule.left.side == "user" else len(lists)) + 1
    if max(kinds, of_users * n_items) > CELLS:
        counts = f"{len(scalars):,} values and {len(lists):,} lists for {n_items:,} items"
        raise _fail(
            rule.name,
            "the number of distinct",
            counts,
            f"such that their lookup table has at most {CELLS:,} cells; group them",
        )
    member = np.array([[(scalar in entry) == wanted for entry in entries] for scalar in scalars], bool)
    both = np.empty((len(scalars) + 1, len(lists) + 1), bool)
    both[:-1, :-1] = member.reshape(len(scalars), len(lists))
    both[-1, :-1], both[:-1, -1] = allow[rule.left.side], allow[rule.right.side]
    both[-1, -1] = allow[rule.left.side] and allow[rule.right.side]
    if rule.left.side == "user":
        return _table(code.astype(np.int32), both[:, list_code])
    return _table(list_code.astype(np.int32), both.T[:, code])


def excluded_by(eligible: CandidateFilter, user: int, item: int) -> tuple[str, ...]:
    """Lists the rules that exclude a pair.

    Args:
      eligible: the filter.
      user: user row.
      item: item row.

    Returns:
      Names of the rules; empty if the item may be recommended to the user.
    """
    passes = [bool(test(jnp.array([user], jnp.int32))[0, item]) for test in eligible.tests]
    passes += [item not in barred.items[barred.indptr[user] : barred.indptr[user + 1]] for barred in eligible.excluded]
    return tuple(name for name, fine in zip(eligible.names, passes, strict=True) if not fine)
