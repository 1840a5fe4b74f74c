"""Attributes as words, sentence by sentence."""

import datetime
import decimal

import pyarrow as pa
import pytest

from fused_rec.config import Config, TextConfig
from fused_rec.data.attributes import describe
from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.data.leakage import audit
from fused_rec.data.node_texts import USER, node_texts
from fused_rec.data.splits import observe
from fused_rec.training import inputs as preparing


def dataset(users: dict, items: dict) -> Dataset:
    tables = pa.table({"user_id": ["u", "v"]} | users), pa.table({"item_id": ["i", "j"]} | items)
    return Dataset("tiny", *tables, pa.table({}), empty_reviews(), empty_ties())


def reported(values: pa.Array, name: str = "sector") -> list[str | None]:
    """What becomes of two values of one column."""
    return describe(dataset({}, {name: values}), (name,)).items.column("text").to_pylist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["technology", None], ["Sector: technology.", None]),
        (["  ", "Acme Inc. "], [None, "Sector: Acme Inc."]),
        (pa.array(["a", None]).dictionary_encode(), ["Sector: a.", None]),
        ([True, False], ["Sector: yes.", "Sector: no."]),
        ([3, -7], ["Sector: 3.", "Sector: -7."]),
        (pa.array([0.1, 3.0], pa.float32()), ["Sector: 0.1.", "Sector: 3."]),
        ([0.1 + 0.2, 2.5e6], ["Sector: 0.30000000000000004.", "Sector: 2500000."]),
        ([1e-9, -1e300], ["Sector: 1e-09.", "Sector: -1e+300."]),
        ([-0.0, float("nan")], ["Sector: 0.", None]),
        ([["a", "", None, " "], [" "]], ["Sector: a.", None]),
        (pa.array([[1.5, float("nan")], [float("nan")]]), ["Sector: 1.5.", None]),
        ([2**53 + 1, -(2**53) - 1], ["Sector: 9007199254740993.", "Sector: -9007199254740993."]),
        (["", "\u00a0"], [None, None]),
        (["007", "0x1A"], ["Sector: 007.", "Sector: 0x1A."]),
        ([["a", None, " b"], []], ["Sector: a, b.", None]),
        (pa.array([[0.1], [1.5, 2]], pa.list_(pa.float32())), ["Sector: 0.1.", "Sector: 1.5, 2."]),
        ([decimal.Decimal("1.50"), decimal.Decimal("100.00")], ["Sector: 1.5.", "Sector: 100."]),
        ([datetime.date(2020, 1, 2), None], ["Sector: 2020-01-02.", None]),
        ([None, None], [None, None]),
    ],
)
def test_every_kind_of_value(values, expected):
    assert reported(pa.array(values) if isinstance(values, list) else values) == expected


def test_the_template():
    rows = {"risk_band": [3.0, None], "sector": ["technology", "energy"], "listed": [True, None]}
    data = describe(dataset({"age": [41, 7]}, rows), ("sector", "risk_band", "listed", "age"))
    assert data.items.column("text").to_pylist() == [
        "Sector: technology. Risk band: 3. Listed: yes.",
        "Sector: energy.",
    ]
    assert data.users.column("text").to_pylist() == ["Age: 41.", "Age: 7."]


def test_own_words_stay():
    """In the order of the columns too, on which the digest of the tables depends."""
    data = dataset({}, {"text": ["Own words.", " "], "sector": ["a", "b"]})
    described = describe(data, ("sector",))
    assert described.items.column("text").to_pylist() == ["Own words.", "Sector: b."]
    assert described.items.column_names == data.items.column_names
    assert described.users is data.users
    assert describe(data, ()) is data


@pytest.mark.parametrize(
    ("name", "says"),
    [("secter", "users have .'user_id'.* and the items .'item_id', 'sector'"), ("text", "no attribute")],
)
def test_a_name_that_is_no_attribute_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        describe(dataset({}, {"sector": ["a", "b"]}), (name,))


def test_a_type_without_words_is_refused():
    with pytest.raises(ValueError, match=r"'sector', whose values \(binary\) have no text form"):
        reported(pa.array([b"a", None]))


def test_isolated_users_of_the_market_get_words():
    """From the setting to the texts of nodes, with the leave of the audit."""
    config = Config(text=TextConfig(attributes=("risk_tolerance", "age_band")))
    before, _ = preparing.read(Config())
    market, data_split = preparing.read(config)
    own, made = (tables.users.column("text").to_pylist() for tables in (before, market))
    rows = market.users.select(["risk_tolerance", "age_band"]).to_pylist()
    expected = [
        text or f"Risk tolerance: {row['risk_tolerance']}. Age band: {row['age_band']}."
        for text, row in zip(own, rows, strict=True)
    ]
    assert made == expected and own.count(None) > 100
    observed = observe(market, data_split)
    texts = node_texts(market, observed)
    assert set(texts.links[USER].nodes) == set(range(market.n_users))
    assert audit(market, data_split, observed, texts)["texts of nodes"] > market.n_users
