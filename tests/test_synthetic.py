"""The synthetic market: reproducible, well formed, and such that words, ties and holdings rank better together."""

import hashlib
import re
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from fused_rec.config import SplitConfig
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.splits import observe, split
from fused_rec.data.synthetic import SECONDS, START, make_synthetic, sample_latent_factors


@pytest.fixture(scope="module")
def market() -> Dataset:
    return make_synthetic()


def digest(data: Dataset) -> str:
    tables = (data.users, data.items, data.interactions, data.reviews, data.ties)
    return hashlib.sha256(repr([table.to_pydict() for table in tables]).encode()).hexdigest()


def test_equal_arguments_give_equal_bytes(market):
    # Every figure published for the synthetic market rests on these bytes. If the generator changes on purpose, or
    # NumPy changes its streams, put the new digest here and say in CHANGELOG.md that such figures changed.
    assert digest(market) == "6877997f81cd9db2e3d31a750480c753f9cfa97f8cec271a8507a2b4e25829dc"
    assert digest(make_synthetic(1, 50, 30)) == digest(make_synthetic(1, 50, 30)) != digest(make_synthetic(2, 50, 30))


def test_tables_are_a_dataset(market):
    assert (market.n_users, market.n_items) == (2000, 400)
    int32, string, moment = pa.int32(), pa.string(), pa.int64()
    assert dict(zip(market.interactions.schema.names, market.interactions.schema.types, strict=True)) == {
        "user": int32, "item": int32, "timestamp": moment
    }  # fmt: skip
    assert dict(zip(market.reviews.schema.names, market.reviews.schema.types, strict=True)) == {
        "user": int32, "item": int32, "text": string, "timestamp": moment
    }  # fmt: skip
    assert dict(zip(market.ties.schema.names, market.ties.schema.types, strict=True)) == {
        "source": int32, "target": int32, "kind": string, "timestamp": moment
    }  # fmt: skip
    assert market.users.column("user_id").to_pylist()[:2] == ["C0001", "C0002"]
    assert market.items.column("item_id").to_pylist()[-1] == "P400"
    for nodes, name in ((market.users, "user_id"), (market.items, "item_id"), (market.items, "name")):
        assert len(set(nodes.column(name).to_pylist())) == nodes.num_rows
    pairs = column(market.interactions, "user").astype(np.int64) * 400 + column(market.interactions, "item")
    assert len(np.unique(pairs)) == len(pairs)
    assert (column(market.ties, "source") != column(market.ties, "target")).all()
    for nodes, band in ((market.users, "risk_tolerance"), (market.items, "risk_band")):
        assert set(column(nodes, band).tolist()) == {1, 2, 3, 4, 5}


def test_size_times_and_tails(market):
    times = column(market.interactions, "timestamp")
    assert 25_000 <= len(times) <= 30_000
    assert times.min() >= START and times.max() < START + SECONDS and (np.diff(times) >= 0).all()
    held = np.bincount(column(market.interactions, "user"), minlength=2000)
    popularity = np.sort(np.bincount(column(market.interactions, "item"), minlength=400))[::-1]
    assert held.min() >= 4 and np.median(held) == 9
    assert popularity[:40].sum() > 0.25 * len(times)  # a tenth of the items draws a quarter and more
    assert 0.05 < market.users.column("text").null_count / 2000 < 0.15
    assert market.items.column("text").null_count == 0


def test_reviews_follow_holdings(market):
    columns = (column(market.interactions, name).tolist() for name in ("user", "item", "timestamp"))
    bought = {(user, item): moment for user, item, moment in zip(*columns, strict=True)}
    for user, item, moment in zip(*(column(market.reviews, c) for c in ("user", "item", "timestamp")), strict=True):
        assert 3600 <= moment - bought[user, item] < 60 * 86_400


def test_small_markets_and_their_bound():
    small = make_synthetic(3, 20, 20)
    assert (small.n_users, small.n_items) == (20, 20) and small.interactions.num_rows == 100
    with pytest.raises(ValueError, match="n_users is 500 and n_items 19; a market needs at least 20 of each"):
        make_synthetic(0, 500, 19)


def test_facets_show_where_they_should(market):
    users, items = sample_latent_factors(0, 2000, 400)
    alike = users.concern[column(market.ties, "source")] == users.concern[column(market.ties, "target")]
    assert alike.mean() > 0.8  # a twelfth by chance
    assert (items.risk + 1 == column(market.items, "risk_band")).all()
    user, item = column(market.interactions, "user"), column(market.interactions, "item")
    for facet, chance in (("theme", 1 / 12), ("region", 1 / 6), ("style", 1 / 2), ("concern", 1 / 12)):
        matches = getattr(users, facet)[user] == getattr(items, facet)[item]
        assert matches.mean() > 1.15 * chance, facet
    # What tells apart items described alike is in no description.
    texts = np.array(market.items.column("text").to_pylist())
    vectors = tf_idf(texts.tolist())
    nearest = (vectors @ vectors.T - 2 * np.eye(400)).argmax(1)
    assert (items.theme == items.theme[nearest]).mean() > 0.6
    assert (items.concern == items.concern[nearest]).mean() < 0.15


def test_generation_is_quick():
    start = time.process_time()
    make_synthetic(5)
    assert time.process_time() - start < 5  # 0.5 s here


def tf_idf(texts: list[str]) -> np.ndarray:
    counts = [Counter(re.findall(r"[a-z]+", text.lower())) for text in texts]
    position = {word: k for k, word in enumerate(sorted(set().union(*counts)))}
    matrix = np.zeros((len(texts), len(position)))
    for row, count in enumerate(counts):
        for word, times in count.items():
            matrix[row, position[word]] = 1 + np.log(times)
    matrix *= np.log((1 + len(texts)) / (1 + (matrix > 0).sum(0))) + 1
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)


def oracle_scores(data: Dataset, observed) -> dict[str, np.ndarray]:
    """Scores U x I of methods that learn nothing, each from one source."""
    held = np.zeros((data.n_users, data.n_items))
    held[observed.user, observed.item] = 1
    together = held.T @ held
    norm = np.sqrt(np.maximum(np.diag(together), 1))
    cosine = together / norm[:, None] / norm
    np.fill_diagonal(cosine, 0)
    inverse = np.linalg.inv(together + 100 * np.eye(data.n_items))  # EASE, Steck 2019
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    words = [[text or ""] for nodes in (data.users, data.items) for text in nodes.column("text").to_pylist()]
    for user, item, text in zip(
        *(observed.reviews.column(c).to_pylist() for c in ("user", "item", "text")), strict=True
    ):
        words[user].append(text)
        words[data.n_users + item].append(text)
    vectors = tf_idf([" ".join(texts) for texts in words])
    users, items = vectors[: data.n_users], vectors[data.n_users :]
    tied = np.zeros((data.n_users, data.n_users))
    tied[column(observed.ties, "source"), column(observed.ties, "target")] = 1
    tied = np.maximum(tied, tied.T)
    return {
        "popularity": np.tile(held.sum(0), (data.n_users, 1)),
        "itemKNN": held @ cosine,
        "EASE": held @ weights,
        "words": standard(users @ items.T) + standard(held @ (items @ items.T)),
        "friends": tied @ held / np.maximum(tied.sum(1, keepdims=True), 1),
    }


def standard(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)


def at_ten(scores: np.ndarray, held: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Recall@10 and NDCG@10, means over the users with test items."""
    users = test.any(1)
    top = np.argsort(-np.where(held, -np.inf, scores)[users], axis=1, kind="stable")[:, :10]
    hits, wanted = np.take_along_axis(test[users], top, 1), test[users].sum(1)
    discount = 1 / np.log2(np.arange(2, 12))
    ideal = np.cumsum(discount)[np.minimum(wanted, 10) - 1]
    return float((hits.sum(1) / wanted).mean()), float((hits @ discount / ideal).mean())


def test_fusing_beats_every_single_source(market):
    parts = split(market, SplitConfig(kind="random", test=0.2))
    observed = observe(market, parts, ("train", "valid"))
    held, test = np.zeros((2, market.n_users, market.n_items), bool)
    held[observed.user, observed.item] = True
    user, item = column(market.interactions, "user")[parts.test], column(market.interactions, "item")[parts.test]
    test[user, item] = True
    scores = oracle_scores(market, observed)
    alone = {name: at_ten(of, held, test) for name, of in scores.items()}
    blend = at_ten(np.sum([standard(scores[name]) for name in ("EASE", "words", "friends")], axis=0), held, test)
    for name, (recall, ndcg) in alone.items():
        assert blend[0] > 1.25 * recall and blend[1] > 1.25 * ndcg, (name, alone, blend)
    for name in ("EASE", "words", "friends"):  # each source carries taste, and each is needed
        assert alone[name][0] > 1.5 * alone["popularity"][0], alone
        without = [standard(scores[other]) for other in ("EASE", "words", "friends") if other != name]
        assert blend[0] > 1.05 * at_ten(np.sum(without, axis=0), held, test)[0], name
    strangers = np.random.default_rng(0).permutation(market.n_users)
    assert at_ten(scores["friends"][strangers], held, test)[0] < 0.5 * alone["friends"][0]
