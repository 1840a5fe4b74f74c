"""Rules as their file states them, against an oracle that reads the file's JSON pair by pair, and what is refused."""

import decimal
import json
import re

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.data.io.tables import dataset_from_tables
from fused_rec.evaluation.filters import apply, excluded_by, parse
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import CandidateFilter

USERS = pa.table(
    {
        "user_id": ["ann", "bob", "cid", "dee"],
        "age": [17, 40, None, 80],
        "tolerance": ["low", "high", "medium", None],
        "country": ["AT", "DE", "CH", None],
        "cash": [100.0, 16_777_217.0, 50.5, float("nan")],
        "avoids": pa.array([["arms"], [], None, ["arms", "oil"]], pa.list_(pa.string())),
        "professional": [False, True, None, False],
    }
)
ITEMS = pa.table(
    {
        "item_id": ["p", "q", "r"],
        "risk": ["low", "high", None],
        "min_age": [18, 18, None],
        "max_age": [65, None, 75],
        "sold_in": ["AT;DE", " CH ", None],
        "sector": ["oil", "arms", "water"],
        "minimum": [100, 16_777_217, None],
        "closed": [False, True, True],
    }
)
HELD = item_sets(np.array([0, 1, 1]), np.array([2, 0, 1]), 4)


def masks(eligible: CandidateFilter, n_users: int, n_items: int) -> dict[str, np.ndarray]:
    """bool [U, I] by rule."""
    users = jnp.arange(n_users, dtype=jnp.int32)
    found = {name: np.array(test(users)) for name, test in zip(eligible.names, eligible.tests, strict=False)}
    for name, barred in zip(eligible.names[len(eligible.tests) :], eligible.excluded, strict=True):
        found[name] = np.ones((n_users, n_items), bool)
        found[name][barred.users, barred.items] = False
    return found


def mask(rule: dict, users: pa.Table = USERS, items: pa.Table = ITEMS) -> list[str]:
    """The rule's mask of users by items, a line a user: + passes, - does not."""
    rules = parse(json.dumps({"rules": [{"name": "r", **rule}]}))
    found = masks(apply(rules, users, items, HELD), len(users), len(items))["r"]
    return ["".join("-+"[int(fine)] for fine in row) for row in found]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"require": ["item.min_age", "at_most", "user.age"]}, ["---", "++-", "---", "++-"]),
        ({"require": ["user.age", "at_least", "item.min_age"]}, ["---", "++-", "---", "++-"]),
        (
            {"require": ["user.age", "at_least", "item.min_age"], "allow_unknown": ["item"]},
            ["--+", "+++", "---", "+++"],
        ),
        (
            {"require": ["user.age", "at_least", "item.min_age"], "allow_unknown": ["user"]},
            ["---", "++-", "++-", "++-"],
        ),
        (
            {"require": ["user.age", "at_least", "item.min_age"], "allow_unknown": ["user", "item"]},
            ["--+", "+++", "+++", "+++"],
        ),
        ({"require": ["user.age", "at_most", "item.max_age"]}, ["+-+", "+-+", "---", "---"]),
        ({"require": ["item.max_age", "at_least", "user.age"]}, ["+-+", "+-+", "---", "---"]),
        (
            {"require": ["item.risk", "at_most", "user.tolerance"], "order": ["low", "medium", "high"]},
            ["+--", "++-", "+--", "---"],
        ),
        (
            {"require": ["item.risk", "at_most", "user.tolerance"], "order": ["low", ["medium", "high"]]},
            ["+--", "++-", "++-", "---"],
        ),
        ({"require": ["item.risk", "at_most", "medium"], "order": ["low", "medium", "high"]}, ["+--"] * 4),
        ({"require": ["user.country", "one_of", "item.sold_in"], "separator": ";"}, ["+--", "+--", "-+-", "---"]),
        ({"require": ["user.country", "none_of", "item.sold_in"], "separator": ";"}, ["-+-", "-+-", "+--", "---"]),
        ({"require": ["item.sector", "none_of", "user.avoids"]}, ["+-+", "+++", "---", "--+"]),
        (
            {"require": ["item.sector", "none_of", "user.avoids"], "allow_unknown": ["user"]},
            ["+-+", "+++", "+++", "--+"],
        ),
        ({"require": ["item.sector", "one_of", "user.avoids"]}, ["-+-", "---", "---", "++-"]),
        ({"require": ["item.sector", "one_of", ["oil", "water"]]}, ["+-+"] * 4),
        ({"require": ["user.country", "none_of", ["AT"]]}, ["---", "+++", "+++", "---"]),
        ({"require": ["user.country", "none_of", ["AT"]], "allow_unknown": ["user"]}, ["---", "+++", "+++", "+++"]),
        ({"require": ["user.cash", "at_least", "item.minimum"]}, ["+--", "++-", "---", "---"]),
        ({"require": ["user.age", "at_least", 18]}, ["---", "+++", "---", "+++"]),
        ({"require": ["user.age", "at_most", 17.5]}, ["+++", "---", "---", "---"]),
        ({"require": ["item.closed", "at_most", "user.professional"]}, ["+--", "+++", "---", "+--"]),
        ({"require": ["user.age", "one_of", ["17", "80"]]}, ["+++", "---", "---", "+++"]),
        ({"refuse": "held"}, ["++-", "--+", "+++", "+++"]),
        ({"refuse": {"items": ["q"]}}, ["+-+"] * 4),
        ({"refuse": {"users": ["ann", "cid"]}}, ["---", "+++", "---", "+++"]),
        ({"refuse": {"pairs": [["bob", "r"], ["dee", "p"], ["bob", "r"]]}}, ["+++", "++-", "+++", "-++"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_rule_by_hand(rule, expected):
    assert mask(rule) == expected


def test_numbers_compare_exactly():
    """float32, in which devices score, has neither 16,777,217 nor a difference between these two."""
    users = pa.table({"user_id": ["u", "v"], "cash": [2**53 + 1, 2**53]})
    items = pa.table({"item_id": ["i", "j"], "minimum": [2**53 + 1, 2**53]})
    assert mask({"require": ["user.cash", "at_least", "item.minimum"]}, users, items) == ["++", "-+"]


def test_columns_as_files_hold_them():
    """Dictionaries, decimals, columns without a value, lists with a gap."""
    users = pa.table(
        {
            "user_id": ["u", "v"],
            "kind": pa.array(["a", None]).dictionary_encode(),
            "cash": pa.array(["1.50", "0.10"]).cast(pa.decimal128(5, 2)),
            "nothing": pa.nulls(2),
        }
    )
    items = pa.table({"item_id": ["i", "j"], "kinds": [["a", None], ["a"]], "minimum": [0.1, 1.5]})
    assert mask({"require": ["user.kind", "one_of", "item.kinds"]}, users, items) == ["-+", "--"]
    assert mask({"require": ["user.cash", "at_least", "item.minimum"]}, users, items) == ["++", "+-"]
    assert mask({"require": ["user.nothing", "at_least", 1]}, users, items) == ["--", "--"]
    assert mask({"require": ["user.nothing", "one_of", "item.kinds"], "allow_unknown": ["user"]}, users, items) == [
        "-+",
        "-+",
    ]


def rules_of(*rules: dict) -> str:
    return json.dumps({"rules": list(rules)})


AGE = ["user.age", "at_least", "item.min_age"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"rules": [], "rules": []}', "'rules' is defined twice in one object"),
        ('{"rules": [{"name": "a", "require": ["user.age", "at_least", NaN]}]}', "NaN is not a finite number"),
        ("[]", 'the rules are []; they must be {"rules": [...]}'),
        ('{"rules": [], "version": 2}', "they must be"),
        ('{"rules": [3]}', "rule 1 is 3; it must be an object"),
        (rules_of({"require": AGE}), "rule 1: name is null"),
        (rules_of({"name": "a\nb", "require": AGE}), "it must be printable text"),
        (rules_of({"name": "a"}), "rule 'a': the rule is"),
        (rules_of({"name": "a", "require": AGE, "refuse": "held"}), "either `require` or `refuse`"),
        (rules_of({"name": "a", "require": AGE, "sides": 1}), "the rule's fields is [\"sides\"]"),
        (rules_of({"name": "a", "refuse": "held", "order": []}), "it must be of name, refuse"),
        (rules_of({"name": "a", "require": AGE}, {"name": "a", "refuse": "held"}), "rule 'a' is defined 2 times"),
        (rules_of({"name": "a", "refuse": "held"}, {"name": "b", "refuse": "held"}), 'two rules refuse "held"'),
        (rules_of({"name": "a", "require": "age"}), "require is \"age\"; it must be [column"),
        (rules_of({"name": "a", "require": ["age", "at_most", 3]}), 'it must be a column as "user.age"'),
        (rules_of({"name": "a", "require": ["users.age", "at_most", 3]}), 'it must be a column as "user.age"'),
        (rules_of({"name": "a", "require": ["user.", "at_most", 3]}), 'it must be a column as "user.age"'),
        (rules_of({"name": "a", "require": ["user.age", "<=", 3]}), "it must be one of at_most, at_least, one_of"),
        (rules_of({"name": "a", "require": ["user.age", [], 3]}), "it must be one of at_most, at_least, one_of"),
        (rules_of({"name": "a", "require": ["user.age", "at_most", "items.max"]}), "a column or a number"),
        (rules_of({"name": "a", "require": ["user.age", "at_most", True]}), "a column or a number"),
        (rules_of({"name": "a", "require": ["user.age", "at_most", 2**63]}), "a column or a number"),
        ('{"rules": [{"name": "a", "require": ["user.age", "at_most", 1e999]}]}', "a column or a number"),
        (rules_of({"name": "a", "require": ["user.age", "at_most", "user.max"]}), "about a user and an item"),
        (rules_of({"name": "a", "require": ["user.land", "one_of", "AT"]}), "a column or a list of texts"),
        (rules_of({"name": "a", "require": ["user.land", "one_of", []]}), "a column or a list of texts"),
        (rules_of({"name": "a", "require": ["user.land", "one_of", [1]]}), "a column or a list of texts"),
        (rules_of({"name": "a", "require": AGE, "order": ["low"]}), "a list of two or more distinct cat"),
        (rules_of({"name": "a", "require": AGE, "order": ["low", ["low", "high"]]}), "distinct categories"),
        (rules_of({"name": "a", "require": AGE, "order": "low"}), "a list of two or more distinct cat"),
        (rules_of({"name": "a", "require": ["user.t", "at_most", 3], "order": ["a", "b"]}), "a value of `order`"),
        (rules_of({"name": "a", "require": ["user.t", "one_of", ["a"]], "order": ["a", "b"]}), "does not use an order"),
        (rules_of({"name": "a", "require": ["user.t", "one_of", ["a"]], "separator": ";"}), "given only where"),
        (rules_of({"name": "a", "require": AGE, "separator": ";"}), "given only where"),
        (rules_of({"name": "a", "require": ["user.t", "one_of", "item.s"], "separator": ""}), "given only where"),
        (rules_of({"name": "a", "require": ["user.t", "one_of", "item.s"], "separator": "word"}), "1 to 3 characters"),
        (rules_of({"name": "a", "require": AGE, "allow_unknown": ["items"]}), "tables that the rule reads: item, user"),
        (rules_of({"name": "a", "require": AGE, "allow_unknown": True}), "tables that the rule reads"),
        (rules_of({"name": "a", "require": ["user.age", "at_least", 1], "allow_unknown": ["item"]}), "reads: user"),
        (rules_of({"name": "a", "refuse": "all"}), '"held" or one list among users, items, pairs'),
        (rules_of({"name": "a", "refuse": {"items": ["p"], "users": ["u"]}}), "or one list among"),
        (rules_of({"name": "a", "refuse": {"items": []}}), "a list of ids, as text"),
        (rules_of({"name": "a", "refuse": {"items": [7]}}), "a list of ids, as text"),
        (rules_of({"name": "a", "refuse": {"pairs": [["u"]]}}), "pairs of ids [user, item]"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"require": ["user.old", "at_least", 3]}, "one of the users' columns: user_id, age, tolerance"),
        (
            {"require": ["user.tolerance", "at_least", 3]},
            'user.tolerance is "string"; it must be numbers; for categories',
        ),
        ({"require": ["user.tolerance", "at_least", 3]}, "(\"low\" of user 'ann', row 2 of the users)"),
        (
            {"require": ["item.risk", "at_most", "user.tolerance"], "order": ["low", "high"]},
            'user.tolerance is ["medium"]; it must be in `order`: low, high',
        ),
        ({"require": ["user.cash", "one_of", ["1"]]}, 'user.cash is "double"; it must be text or integers'),
        ({"require": ["user.avoids", "one_of", ["arms"]]}, "one value per row"),
        ({"refuse": {"items": ["p", "x", "y"]}}, '2 item ids, the first is "x"; it must be ids of the 3 items'),
        ({"refuse": {"pairs": [["ann", "p"], ["p", "ann"]]}}, '1 user ids, the first is "p"'),
    ],
)
def test_what_the_tables_do_not_bear_is_refused(rule, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        mask(rule)


def test_rules_that_exclude_one_pair_are_named():
    rules = parse(
        rules_of(
            {"name": "age", "require": AGE},
            {"name": "mine", "refuse": "held"},
            {"name": "country", "require": ["user.country", "one_of", "item.sold_in"], "separator": ";"},
            {"name": "withdrawn", "refuse": {"items": ["q"]}},
        )
    )
    eligible = apply(rules, USERS, ITEMS, HELD)
    assert excluded_by(eligible, 0, 2) == ("age", "country", "mine")
    assert excluded_by(eligible, 1, 1) == ("country", "withdrawn", "mine")
    assert excluded_by(eligible, 1, 0) == ("mine",)
    assert excluded_by(eligible.without("mine"), 1, 0) == ()
    assert eligible.without("age").names == ("country", "withdrawn", "mine")


# --- missing values, codes and large numbers


def test_missing_is_unknown_whatever_it_is_written_as():
    """Empty and blank texts, NaN, dictionaries; what `order` ranks; constants and columns; both directions."""
    blank = pa.array(["arms", "", " ", None, "oil"])
    items = pa.table(
        {"item_id": list("vwxyz"), "sector": blank, "code": blank.dictionary_encode(), "n": [1.0, *[np.nan] * 3, 2]}
    )
    users = pa.table({"user_id": ["u"], "avoids": [["arms"]], "sector": [" "], "n": [1.5]})
    assert mask({"require": ["item.sector", "none_of", ["arms"]]}, users, items) == ["----+"]
    assert mask({"require": ["item.code", "none_of", ["arms"]]}, users, items) == ["----+"]
    assert mask({"require": ["item.sector", "none_of", "user.avoids"]}, users, items) == ["----+"]
    assert mask({"require": ["item.sector", "none_of", ["arms"]], "allow_unknown": ["item"]}, users, items) == ["-++++"]
    assert mask({"require": ["item.sector", "at_most", "oil"], "order": ["arms", "oil"]}, users, items) == ["+---+"]
    assert mask({"require": ["item.n", "at_most", "user.n"]}, users, items) == ["+----"]
    assert mask({"require": ["user.sector", "none_of", ["arms"]]}, users, items) == ["-----"]


def test_an_empty_list_is_known_and_means_none():
    """As the readers hand it over; a cell with separators alone says nothing."""
    held = {"user_id": list("abcdef"), "item_id": ["x"] * 6}
    avoids = [["arms"], [], None, [None], [""], ["oil", None]]
    items = {"item_id": ["x"], "sector": ["arms"]}
    dataset = dataset_from_tables(held, items=items, users={"user_id": list("abcdef"), "avoids": avoids})
    rule = {"require": ["item.sector", "none_of", "user.avoids"]}
    assert mask(rule, dataset.users, dataset.items) == ["-", "+", "-", "-", "-", "+"]
    cells = pa.table({"user_id": list("abcd"), "avoids": ["arms;oil", ";", " ; ", "oil;"]})
    assert mask({**rule, "separator": ";"}, cells, dataset.items) == ["-", "-", "-", "+"]


def test_white_space_around_a_word_hides_nothing():
    users = pa.table({"user_id": ["u"], "sector": ["arms "]})
    items = pa.table({"item_id": ["i", "j"], "sector": ["arms ", " arms"]})
    assert mask({"require": ["item.sector", "none_of", ["arms"]]}, users, items) == ["--"]
    assert mask({"require": ["item.sector", "none_of", [" arms"]]}, users, items) == ["--"]


BIG = 2**53
CODES = pa.table(
    {"item_id": ["i", "j"], "n": [26, 7], "code": ["0x1A", "26"], "open": [True, False], "flag": ["a", "b"]}
)
ASKS = pa.table({"user_id": ["u"], "codes": [["0x1A"]], "numbers": [[26]], "n": [26], "halves": [[0.5]]})


@pytest.mark.parametrize(
    ("require", "said"),
    [
        (["item.n", "none_of", ["0x1A"]], 'require, third is ["0x1A"]; it must be int64 values as in item.n'),
        (["item.n", "none_of", ["007"]], 'require, third is ["007"]'),
        (["item.n", "none_of", ["26.0"]], 'require, third is ["26.0"]'),
        (["item.open", "one_of", ["yes"]], 'require, third is ["yes"]; it must be bool values as in item.open'),
        (["item.n", "none_of", "user.codes"], 'user.codes is ["0x1A"]; it must be int64 values as in item.n'),
        (["item.code", "none_of", "user.numbers"], 'item.code is ["0x1A"]; it must be int64 values as in user.numbers'),
        (["item.open", "none_of", "user.numbers"], 'user.numbers is ["26"]; it must be bool values as in item.open'),
        (["item.code", "none_of", "user.halves"], 'user.halves is "list<item: double>"; it must be lists of text'),
        (["item.code", "at_most", 26], 'item.code is "string"; it must be numbers; for categories give `order`, lowest '
         'first ("0x1A" of item \'i\', row 2 of the items)'),
        (["item.code", "at_most", "user.n"], '("0x1A" of item \'i\', row 2 of the items)'),
    ],
)  # fmt: skip
def test_codes_and_numbers_that_cannot_be_equal_are_refused(require, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        mask({"require": require}, ASKS, CODES)


@pytest.mark.parametrize("word", ["", " "])
def test_a_missing_value_is_no_word_of_a_rule(word):
    with pytest.raises(ValueError, match="use `allow_unknown` to let missing values pass"):
        parse(rules_of({"name": "a", "require": ["item.sector", "one_of", ["arms", word]]}))


def test_numbers_as_text_are_no_constants():
    with pytest.raises(ValueError, match='numbers as text, such as "26"'):
        parse(rules_of({"name": "a", "require": ["item.code", "none_of", [26]]}))


@pytest.mark.parametrize(
    ("values", "bound", "at_most", "at_least"),
    [
        ([BIG, BIG + 1], BIG, "+-", "++"),
        ([BIG, BIG + 1], float(BIG), "+-", "++"),
        ([BIG + 1, 2**62 + 1], 2.0**62, "+-", "-+"),
        ([decimal.Decimal(BIG), decimal.Decimal(BIG + 1)], BIG, "+-", "++"),
        ([decimal.Decimal("0.10"), decimal.Decimal("0.11")], 0.1, "+-", "++"),
        (pa.array([0.1, 0.2], pa.float32()), 0.1, "+-", "++"),
        ([0.1, 0.3], 0.1, "+-", "++"),
    ],
)
def test_constants_compare_exactly(values, bound, at_most, at_least):
    items = pa.table({"item_id": ["i", "j"], "n": values})
    for relation, expected in (("at_most", at_most), ("at_least", at_least)):
        assert mask({"require": ["item.n", relation, bound]}, USERS.slice(0, 1), items) == [expected]


@pytest.mark.parametrize(
    "bounds",
    [
        pa.array([float(BIG)]),
        pa.array([decimal.Decimal(BIG)]),
        pa.array([decimal.Decimal(f"{BIG}.5")]),
        pa.array([BIG]),
    ],
)
def test_columns_of_two_types_compare_exactly(bounds):
    items = pa.table({"item_id": ["i", "j", "k"], "n": [BIG, BIG + 1, None]})
    users = pa.table({"user_id": ["u"], "n": bounds})
    assert mask({"require": ["item.n", "at_most", "user.n"]}, users, items) == ["+--"]


# --- any tables, any rules

N_USERS, N_ITEMS = 4, 5
NUMBERS = st.lists(st.one_of(st.none(), st.integers(-2, 2)), min_size=N_ITEMS, max_size=N_ITEMS)
WORDS = st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "c"])), min_size=N_ITEMS, max_size=N_ITEMS)
LISTS = st.lists(
    st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c"]), unique=True)), min_size=N_ITEMS, max_size=N_ITEMS
)
TYPES = {"n": pa.int64(), "w": pa.string(), "l": pa.list_(pa.string())}


@st.composite
def tables(draw, side: str, rows: int) -> pa.Table:
    values = {name: draw(kind)[:rows] for name, kind in (("n", NUMBERS), ("w", WORDS), ("l", LISTS))}
    ids = pa.array([f"{side}{n}" for n in range(rows)])
    return pa.table({f"{side}_id": ids} | {name: pa.array(column, TYPES[name]) for name, column in values.items()})


@st.composite
def requirements(draw) -> dict:
    left, right = draw(st.permutations(["user", "item"]))
    allow = draw(st.lists(st.sampled_from(["user", "item"]), unique=True))
    relation = draw(st.sampled_from(["at_most", "at_least", "one_of", "none_of"]))
    constant = draw(st.booleans())
    rule: dict = {"allow_unknown": [side for side in allow if not constant or side == left]}
    if relation in ("one_of", "none_of"):
        words = draw(st.lists(st.sampled_from(["a", "b"]), min_size=1))
        return rule | {"require": [f"{left}.w", relation, words if constant else f"{right}.l"]}
    if draw(st.booleans()):
        order = draw(st.sampled_from([["a", "b", "c"], ["c", ["a", "b"]]]))
        return rule | {"require": [f"{left}.w", relation, "b" if constant else f"{right}.w"], "order": order}
    return rule | {"require": [f"{left}.n", relation, draw(st.integers(-2, 2)) if constant else f"{right}.n"]}


@st.composite
def refusals(draw) -> dict:
    users, items = ([f"{side}{n}" for n in range(rows)] for side, rows in (("user", N_USERS), ("item", N_ITEMS)))
    lists = st.one_of(
        st.fixed_dictionaries({"users": st.lists(st.sampled_from(users), min_size=1)}),
        st.fixed_dictionaries({"items": st.lists(st.sampled_from(items), min_size=1)}),
        st.fixed_dictionaries(
            {"pairs": st.lists(st.tuples(st.sampled_from(users), st.sampled_from(items)).map(list), min_size=1)}
        ),
    )
    return {"refuse": draw(lists)}


def may(rule: dict, user: dict, item: dict, held: bool) -> bool:
    """The oracle: whether the rule, as its JSON reads, lets the pair pass."""
    if "refuse" in rule:
        listed = rule["refuse"]
        if listed == "held":
            return not held
        [(kind, ids)] = listed.items()
        one = {"users": user["user_id"], "items": item["item_id"], "pairs": [user["user_id"], item["item_id"]]}[kind]
        return one not in ids
    rows = {"user": user, "item": item}
    left, relation, right = rule["require"]
    side, name = left.split(".")
    read = [(side, rows[side][name])]
    bound = right
    if isinstance(right, str) and "." in right:
        other, name = right.split(".")
        bound = rows[other][name]
        read.append((other, bound))
    missing = [side for side, value in read if value is None]
    if missing:
        return all(side in rule["allow_unknown"] for side in missing)
    value = read[0][1]
    if relation in ("one_of", "none_of"):
        return (value in bound) == (relation == "one_of")
    if "order" in rule:
        value, bound = (next(n for n, r in enumerate(rule["order"]) if word in r) for word in (value, bound))
    return value <= bound if relation == "at_most" else value >= bound


@settings(max_examples=150, deadline=None)
@given(
    tables("user", N_USERS),
    tables("item", N_ITEMS),
    st.lists(st.one_of(requirements(), refusals()), min_size=1, max_size=4),
    st.sets(st.tuples(st.integers(0, N_USERS - 1), st.integers(0, N_ITEMS - 1))),
)
def test_any_rules_mean_what_they_say(users, items, rules, interactions):
    rules = [{"name": f"rule {n}", **rule} for n, rule in enumerate([*rules, {"refuse": "held"}])]
    pairs = np.array(sorted(interactions), np.int64).reshape(-1, 2)
    eligible = apply(parse(rules_of(*rules)), users, items, item_sets(pairs[:, 0], pairs[:, 1], N_USERS))
    found = masks(eligible, N_USERS, N_ITEMS)
    for rule in rules:
        expected = [
            [may(rule, user, item, (u, i) in interactions) for i, item in enumerate(items.to_pylist())]
            for u, user in enumerate(users.to_pylist())
        ]
        assert found[rule["name"]].tolist() == expected, rule
    refused = {name for name, fine in found.items() if not fine[1, 2]}
    assert set(excluded_by(eligible, 1, 2)) == refused
