"""The audit passes what `observe` lets through, to the row, and names each leak that others have built."""

import dataclasses
import os
import time
import typing

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import DataConfig, SplitConfig, SplitKind
from fused_rec.data.dataset import Dataset
from fused_rec.data.leakage import LeakError, audit
from fused_rec.data.node_texts import node_texts
from fused_rec.data.sources.registry import load
from fused_rec.data.splits import SPLIT_NAMES, Observed, Split, observe, split

POST = "Bought the blue fund, and never looked back."


def table(**columns) -> pa.Table:
    types = {"timestamp": pa.int64(), "text": pa.string(), "kind": pa.string()}
    return pa.table({name: pa.array(values, types.get(name, pa.int32())) for name, values in columns.items()})


def market() -> tuple[Dataset, Split]:
    """Users 0-2, items 0-3. Known: (0, 0) and (1, 1) and (2, 2); validation (1, 2); test (0, 3)."""
    data = Dataset(
        "tiny",
        pa.table({"user_id": ["a", "b", "c"], "text": ["likes blue", None, "likes red"]}),
        pa.table(
            {"item_id": ["w", "x", "y", "z"], "text": ["bond", "fund", None, "note"], "issuer": ["W", "X", "Y", "Z"]}
        ),
        table(user=[0, 1, 2, 1, 0], item=[0, 1, 2, 2, 3], timestamp=[1, 2, 3, 10, 20]),
        table(user=[0, 1, 0], item=[0, 1, 3], text=["steady", "too dear for what it is", POST], timestamp=[1, 2, 20]),
        table(source=[1, 0, 0], target=[2, 2, 1], kind=["f", "r", "r"], timestamp=[1, 20, 9], item=[None, 3, 0]),
    )
    return data, Split("random", np.arange(3), np.array([3]), np.array([4]))


def check(data: Dataset, parts: Split, observed: Observed | None = None, texts_of: Observed | None = None):
    """The audit of `observed`, with node texts from `texts_of`; by default what the split lets see."""
    clean = observe(data, parts)
    return audit(data, parts, observed or clean, node_texts(data, texts_of or clean))


def with_pairs(seen: Observed, user: np.ndarray, item: np.ndarray) -> Observed:
    """The same with other pairs, all new."""
    pairs = {"user": user.astype(np.int32), "item": item.astype(np.int32)}
    return dataclasses.replace(seen, **pairs, age=np.zeros(len(user), np.float32))


def swap(data: Dataset, nodes: str, row: int, text: str, column: str = "text") -> Dataset:
    """The dataset with another text in one row of its users or items."""
    of_nodes: pa.Table = getattr(data, nodes)
    texts = of_nodes.column(column).to_pylist()
    texts[row] = text
    index = of_nodes.column_names.index(column)
    return dataclasses.replace(data, **{nodes: of_nodes.set_column(index, column, pa.array(texts, pa.string()))})


def test_what_observe_lets_through_passes_and_is_counted():
    data, parts = market()
    assert check(data, parts) == {
        "observed interactions": 3,
        "held-out interactions": 2,
        "observed reviews": 2,
        "withheld reviews": 1,
        "observed ties": 2,
        "withheld tie rows": 1,
        "texts of nodes": 4 + 5,
        "withheld passages searched for": 2,  # once for its user, once for its item
    }
    everything = observe(data, parts, SPLIT_NAMES)
    assert audit(data, parts, everything, node_texts(data, everything), SPLIT_NAMES)["withheld reviews"] == 0


def test_held_out_interactions():
    data, parts = market()
    known = observe(data, parts, ("train", "valid"))
    with pytest.raises(LeakError, match=r"1 observed interaction\(s\).*row 3 \(user 1, item 2\) is held out"):
        check(data, parts, known)
    assert audit(data, parts, known, node_texts(data, known), ("train", "valid"))["observed interactions"] == 4
    invented = with_pairs(observe(data, parts), np.array([2]), np.array([0]))
    with pytest.raises(LeakError, match=r"row 0 \(user 2, item 0\) is no interaction of the dataset"):
        check(data, parts, invented)


def test_all_reviews_as_with_the_tags_of_lastfm():
    data, parts = market()
    leaky = dataclasses.replace(observe(data, parts), reviews=data.reviews)
    with pytest.raises(LeakError, match="row 2 .user 0, item 3.*leaks a held-out interaction.*splits.observe"):
        check(data, parts, leaky)
    short = dataclasses.replace(data, reviews=data.reviews.set_column(2, "text", pa.array(["x"] * 3)))
    leaky = dataclasses.replace(leaky, reviews=short.reviews)  # a tag is too short for the search, not for the rows
    with pytest.raises(LeakError, match=r"1 observed review\(s\)"):
        check(short, parts, leaky)


def test_all_ties_as_with_the_retweets_of_stocknet():
    data, parts = market()
    leaky = dataclasses.replace(observe(data, parts), ties=data.ties.select(["source", "target", "kind"]))
    with pytest.raises(
        LeakError, match=r"1 observed tie\(s\).*row 1 \(source 0, target 2, kind 'r'\) leaks a held-out"
    ):
        check(data, parts, leaky)
    # the target posted on item 2 in the validation part; so a retweet of it on item 2 tells of that
    ties = table(source=[2], target=[1], kind=["r"], timestamp=[4], item=[2])
    with pytest.raises(LeakError, match="leaks a held-out interaction"):
        check(dataclasses.replace(data, ties=ties), parts, dataclasses.replace(observe(data, parts), ties=ties))


def test_text_of_a_node_from_all_reviews_as_with_amazon():
    data, parts = market()
    with pytest.raises(LeakError) as error:
        check(data, parts, texts_of=observe(data, parts, SPLIT_NAMES))
    assert "1 text(s) of users" in str(error.value) and "user 0 has 'Bought the blue fund" in str(error.value)
    assert "1 text(s) of items" in str(error.value) and "item 3 has 'Bought" in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "row", "column"), [("users", 0, "text"), ("items", 3, "text"), ("items", 3, "issuer")]
)
def test_review_inside_a_description(nodes, row, column):
    data, parts = market()
    leaky = swap(data, nodes, row, "Said:  bought THE blue\nfund, and never looked  back. Really", column)
    with pytest.raises(LeakError, match=f"{nodes[:-1]} {row} repeats review row 2 'bought the blue"):
        check(leaky, parts)
    assert check(swap(data, nodes, 1, POST, column), parts)  # another node's words say nothing of this pair
    assert check(swap(data, nodes, row, POST[:30], column), parts)


def test_words_that_may_be_seen_elsewhere_are_no_leak():
    data, parts = market()
    also = table(user=[0, 2], item=[0, 3], text=[POST.upper(), POST], timestamp=[5, 5])
    data = dataclasses.replace(data, reviews=pa.concat_tables([data.reviews, also]))
    described = swap(swap(data, "users", 0, POST), "items", 3, POST)
    assert check(described, parts)["withheld passages searched for"] == 0


def test_a_review_may_name_its_item():
    data, parts = market()
    items = swap(data, "items", 3, f"{POST} It is a note.").items
    with pytest.raises(LeakError):
        check(dataclasses.replace(data, items=items), parts)
    named = items.append_column("name", pa.array([None, None, None, POST]))
    assert check(dataclasses.replace(data, items=named), parts)["withheld passages searched for"] == 2


def test_one_post_on_two_items():
    data, parts = market()
    posts = table(user=[0, 0], item=[0, 3], text=[POST, POST], timestamp=[5, 5])
    data = dataclasses.replace(data, reviews=posts)
    assert observe(data, parts).reviews.num_rows == 0
    leaky = dataclasses.replace(observe(data, parts), reviews=posts.slice(0, 1))
    with pytest.raises(LeakError, match="row 0 .*is the same post as a review that leaks held-out data"):
        check(data, parts, leaky)


def test_dates():
    data, _ = market()
    parts = Split("time", np.arange(3), np.array([3]), np.array([4]), 10, 20)
    late = table(user=[0], item=[0], text=["still steady"], timestamp=[10])
    data = dataclasses.replace(data, reviews=pa.concat_tables([data.reviews, late]))
    assert check(data, parts)["withheld reviews"] == 2
    with pytest.raises(LeakError, match="row 0 .*is dated 10, not before the cut at 10"):
        check(data, parts, dataclasses.replace(observe(data, parts), reviews=late))
    ties = table(source=[2], target=[0], kind=["f"], timestamp=[12], item=[None])
    data = dataclasses.replace(data, ties=ties)
    with pytest.raises(LeakError, match="is dated 12, not before the cut at 10"):
        check(data, parts, dataclasses.replace(observe(data, parts), ties=ties))
    undated = late.drop_columns("timestamp")
    data = dataclasses.replace(data, reviews=undated, ties=ties.slice(0, 0))
    seen = with_pairs(observe(data, parts, SPLIT_NAMES), np.zeros(1), np.zeros(1))
    with pytest.raises(LeakError, match="has no timestamp, under a split by time"):
        audit(data, parts, seen, node_texts(data, seen))


def test_faults_in_the_split_itself():
    data, parts = market()
    with pytest.raises(LeakError, match="the splits overlap or miss interactions"):
        check(data, dataclasses.replace(parts, test=np.array([3, 4])))
    with pytest.raises(LeakError, match="1 fault.s. in the time split: the train split reaches beyond 3"):
        check(data, dataclasses.replace(parts, kind="time", valid_from=3, test_from=20))
    with pytest.raises(LeakError, match="row 0 of users is in more than one split; row 1 of users"):
        check(data, dataclasses.replace(parts, kind="new_users"))


def test_new_items_and_new_users():
    data, parts = market()
    parts = dataclasses.replace(parts, train=np.array([0, 1]), valid=np.array([2, 3]), kind="new_items")
    tag = table(user=[2], item=[3], text=["tag"], timestamp=[0])  # no interaction, but item 3 is new
    data = dataclasses.replace(data, reviews=tag)
    with pytest.raises(LeakError, match="leaks a held-out item"):
        check(data, parts, dataclasses.replace(observe(data, parts), reviews=tag))
    parts = Split("new_users", np.array([0, 4]), np.array([1, 3]), np.array([2]))
    tag = table(user=[2], item=[0], text=["tag"], timestamp=[0])
    data = dataclasses.replace(data, reviews=tag)
    with pytest.raises(LeakError, match="is an act of a held-out user"):
        check(data, parts, dataclasses.replace(observe(data, parts), reviews=tag))


def test_report_names_five_and_counts_the_rest():
    data, parts = market()
    leaky = with_pairs(observe(data, parts), np.zeros(9), np.full(9, 3))
    with pytest.raises(LeakError, match=r"9 observed.*row 4 \(user 0, item 3\) is held out and 4 more\. Take only"):
        check(data, parts, leaky)


@st.composite
def markets(draw) -> Dataset:
    n = 5
    node, moment = st.integers(0, n - 1), st.integers(0, 6)
    pairs = draw(st.lists(st.tuples(node, node, moment), min_size=12, max_size=25, unique_by=lambda row: row[:2]))
    texts = st.sampled_from(["rock", POST, POST.upper(), "five other words in here", None])
    texts_given = draw(st.lists(st.tuples(node, node, texts, moment), min_size=1, max_size=15))
    tie = st.tuples(node, node, st.sampled_from(["r", "m"]), moment, st.none() | node)
    tied = draw(st.lists(tie, min_size=1, max_size=15))
    ids = [str(k) for k in range(n)]
    return Dataset(
        "drawn",
        pa.table({"user_id": ids, "text": ["rock", "jazz", "pop", "folk", "punk"]}),
        pa.table({"item_id": ids}),
        table(**dict(zip(("user", "item", "timestamp"), zip(*pairs, strict=True), strict=True))),
        table(**dict(zip(("user", "item", "text", "timestamp"), zip(*texts_given, strict=True), strict=True))),
        table(**dict(zip(("source", "target", "kind", "timestamp", "item"), zip(*tied, strict=True), strict=True))),
    )


@settings(max_examples=80, deadline=None)
@given(
    markets(),
    st.sampled_from(["time", "per_user", "random", "new_items", "new_users"]),
    st.integers(0, 9),
    st.sampled_from([SPLIT_NAMES[:1], SPLIT_NAMES[:2], SPLIT_NAMES]),
)
def test_audit_and_observe_agree_to_the_row(data: Dataset, kind: SplitKind, seed: int, known: tuple[str, ...]):
    try:
        parts = split(data, SplitConfig(kind=kind, test=0.3, valid=0.3, seed=seed))
    except ValueError:
        return  # too small for this kind
    seen = observe(data, parts, known)
    counts = audit(data, parts, seen, node_texts(data, seen), known)
    assert seen.reviews.num_rows + counts["withheld reviews"] == data.reviews.num_rows
    for row in range(data.ties.num_rows):  # a tie is withheld only where the audit would refuse it
        one = data.ties.slice(row, 1).select(["source", "target", "kind"])
        key = one.to_pylist()[0]
        if key not in seen.ties.to_pylist():
            with pytest.raises(LeakError):
                audit(data, parts, dataclasses.replace(seen, ties=one), node_texts(data, seen), known)


def test_a_hundred_thousand_reviews_take_seconds():
    rng = np.random.default_rng(0)
    n = 100_000
    pairs = np.unique(rng.integers(0, 1000, (n, 2)), axis=0).astype(np.int32)
    words = np.array([f"word{k}" for k in range(3000)])
    texts_given = [" ".join(row) for row in words[rng.integers(0, 3000, (len(pairs), 12))]]
    ids = [str(k) for k in range(1000)]
    reviews = pa.table({"user": pairs[:, 0], "item": pairs[:, 1], "text": texts_given})
    data = Dataset(
        "large",
        pa.table({"user_id": ids, "text": [" ".join(words[rng.integers(0, 3000, 2000)]) for _ in ids]}),
        pa.table({"item_id": ids}),
        pa.table({"user": pairs[:, 0], "item": pairs[:, 1]}),
        reviews,
        table(source=[], target=[], kind=[]),
    )
    parts = split(data, SplitConfig())
    start = time.process_time()
    counts = check(data, parts)
    assert counts["withheld passages searched for"] > 50_000
    assert time.process_time() - start < 20  # 2 s of processor time unhooked


needs_data = pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to run on real data")


def real(name: str, kind: SplitKind) -> tuple[Dataset, Split, Observed]:
    """With the proof that what `observe` lets through passes."""
    data = load(DataConfig(name))
    parts = split(data, SplitConfig(kind))
    assert check(data, parts)["withheld reviews"] > 0
    return data, parts, observe(data, parts)


@needs_data
def test_tags_of_lastfm():
    data, parts, seen = real("lastfm_sociallgn", "predefined")
    with pytest.raises(LeakError, match=r"2\d{4} observed review\(s\) must be withheld.*leaks a held-out interaction"):
        check(data, parts, dataclasses.replace(seen, reviews=data.reviews))


@needs_data
def test_retweets_of_stocknet():
    data, parts, seen = real("stocknet", "time")
    leaky = dataclasses.replace(seen, ties=observe(data, parts, SPLIT_NAMES).ties)
    with pytest.raises(LeakError, match=r"\d{4,5} observed tie\(s\) must be withheld.*kind 'retweet'"):
        check(data, parts, leaky)


@needs_data
def test_item_text_of_amazon_from_all_reviews():
    data, parts, seen = real("amazon", "per_user")
    with pytest.raises(LeakError, match=r"text\(s\) of items are neither"):
        check(data, parts, texts_of=observe(data, parts, SPLIT_NAMES))
    for known, leaks in ((seen, False), (observe(data, parts, SPLIT_NAMES), True)):
        texts = [""] * data.n_items
        for item, text in zip(*(known.reviews.column(c).to_pylist() for c in ("item", "text")), strict=True):
            texts[item] += f" {text}"
        described = dataclasses.replace(data, items=data.items.append_column("text", pa.array(texts)))
        if leaks:
            with pytest.raises(LeakError, match=r"4\d{3} item\(s\) contain a withheld review"):
                check(described, parts)
        else:
            assert check(described, parts)


@pytest.mark.parametrize("kind", typing.get_args(SplitKind))
def test_what_observe_lets_through_passes_with_dropped_rows(kind):
    """Users and items of dropped rows are no held-out ones; so their other reviews are seen and pass."""
    user, item = (side.astype(np.int32) for side in np.divmod(np.arange(100), 10))
    ids = [str(k) for k in range(10)]
    rows = table(user=user, item=item, timestamp=np.arange(100)).append_column(
        "split", pa.array(["test" if k % 7 == 0 else "train" for k in range(100)])
    )
    reviews = table(user=user, item=item, text=ids * 10, timestamp=[0] * 100)
    nodes = pa.table({"user_id": ids}), pa.table({"item_id": ids})
    data = Dataset("tiny", *nodes, rows, reviews, table(source=[0], target=[1], kind=["f"], timestamp=[0]))
    parts = split(data, SplitConfig(kind=kind, history=2, new_item_share=0.2))
    assert len(parts.dropped)
    assert check(data, parts)["observed reviews"] == len(parts.train)


def test_dropped_rows_are_held_out():
    """What `observe` lets through passes; a dropped pair, its review, or a row of a new item does not."""
    data, parts = market()
    limited = dataclasses.replace(parts, train=np.array([0]), dropped=np.array([1, 2]))
    assert check(data, limited)["held-out interactions"] == 4
    everything = observe(data, parts)  # as if nothing were dropped
    with pytest.raises(LeakError) as error:
        check(data, limited, everything, everything)
    for found in (r"row 1 (user 1, item 1) is held out", "1 observed review(s)", "text(s) of users"):
        assert found in str(error.value)
    with pytest.raises(LeakError, match="the splits overlap or miss interactions"):
        check(data, dataclasses.replace(limited, dropped=np.array([1])))
    new = dataclasses.replace(limited, new_items=np.array([2], np.int32))
    check(data, new)
    with pytest.raises(LeakError, match="item 0 is new and in the train split"):
        check(data, dataclasses.replace(new, new_items=np.array([0], np.int32)))
    about_new = table(user=[2], item=[2], text=["fine"], timestamp=[1])
    other = dataclasses.replace(data, reviews=about_new, interactions=data.interactions.slice(0, 2))
    parts = Split("random", np.array([0]), np.array([1]), np.empty(0, np.int64), new_items=np.array([2], np.int32))
    with pytest.raises(LeakError, match="leaks a held-out item"):
        check(other, parts, dataclasses.replace(observe(other, parts), reviews=about_new))
