"""Vectors of counted words on texts small enough to count by hand, and their place beside the language model's."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from fused_rec.config import Config, from_dict
from fused_rec.data.node_texts import NodeTexts
from fused_rec.text.tfidf import concat_normalized, tfidf_vectors
from fused_rec.training import inputs as preparing

# Every term is in two of the six texts, so all weigh the same.
CHAIN = ["gold ore", "gold coin", "bank coin", "bank loan", "loan", "ore"]
HALF, ROOT = 1 / 2, 1 / 2**0.5
CHAIN_COSINES = [
    [1, HALF, 0, 0, 0, ROOT],
    [HALF, 1, HALF, 0, 0, 0],
    [0, HALF, 1, HALF, 0, 0],
    [0, 0, HALF, 1, ROOT, 0],
    [0, 0, 0, ROOT, 1, 0],
    [ROOT, 0, 0, 0, 0, 1],
]


def test_likeness_by_hand():
    """With all directions kept, dot products are those of the TF-IDF rows, which have unit length."""
    vectors = tfidf_vectors(CHAIN, 10)
    assert (vectors.shape, vectors.dtype.name) == ((6, 5), "float32")
    np.testing.assert_allclose(vectors @ vectors.T, CHAIN_COSINES, atol=1e-6)


def test_the_first_directions_are_kept():
    """Two hold as much of the texts as two can: the two largest eigenvalues of their cosines."""
    vectors = tfidf_vectors(CHAIN, 2)
    assert vectors.shape == (6, 2)
    largest = np.linalg.eigvalsh(CHAIN_COSINES)[::-1][:2]
    np.testing.assert_allclose(np.square(vectors).sum(0), largest, rtol=1e-5)


def test_a_rare_term_makes_texts_more_alike_than_a_frequent_one():
    texts = ["fund uranium", "uranium", "fund", "fund", "fund", "silver", "silver", "other"]
    vectors = tfidf_vectors(texts, 8)
    # idf = ln((1 + 8) / (1 + texts with the term)) + 1: uranium in 2 texts, fund in 4
    rare, frequent = np.log(9 / 3) + 1, np.log(9 / 5) + 1
    cosines = vectors @ vectors[0]
    np.testing.assert_allclose(cosines[[1, 2]], np.array([rare, frequent]) / np.hypot(rare, frequent), rtol=1e-5)
    assert cosines[1] > cosines[2] > 0.6
    np.testing.assert_allclose(cosines[5:], 0, atol=1e-6)
    assert not vectors[7].any()  # it shares nothing with the others


def test_a_repeated_term_counts_by_its_logarithm():
    vectors = tfidf_vectors(["gold gold gold ore", "gold", "ore", "silver", "silver", "tin"], 8)
    gold, ore = 1 + np.log(3), 1
    np.testing.assert_allclose(vectors @ vectors[1], [gold / np.hypot(gold, ore), 1, 0, 0, 0, 0], rtol=1e-5, atol=1e-6)


def test_names_of_one_text_and_words_of_most_say_nothing():
    more = [f"{text} Company{place}" for place, text in enumerate(CHAIN)]
    more[:2] = [text.upper() for text in more[:2]]
    more[2:] = [f"{text}, fund" for text in more[2:]]  # in four of six
    vectors = tfidf_vectors(more, 10)
    np.testing.assert_allclose(vectors @ vectors.T, CHAIN_COSINES, atol=1e-6)


def test_the_same_texts_give_the_same_vectors():
    drawn = np.random.default_rng(0).integers(0, 40, (60, 8))
    texts = [" ".join(f"term{term}" for term in terms) for terms in drawn]
    vectors = tfidf_vectors(texts, 5)
    assert vectors.shape == (60, 5)
    np.testing.assert_array_equal(tfidf_vectors(texts, 5), vectors)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["gold ore"],
        ["gold ore", "gold ore today", "silver"],
        ["gold", "silver", "bank", "loan"],  # no term of two texts
        ["gold a", "gold b", "gold c", "silver"],  # one of more than half of them
        ["the of", "and", "to a", "in"],
        ["", "", "", ""],
        ["gold", "gold coin", "bank", "loan"],  # a single term
    ],
)
def test_texts_that_share_too_little_have_no_columns(texts):
    vectors = tfidf_vectors(texts, 4)
    assert (vectors.shape, vectors.dtype.name) == ((len(texts), 0), "float32")


def test_another_fault_is_not_taken_for_too_few_terms(monkeypatch):
    def fail(self, texts):
        raise ValueError("something else")

    monkeypatch.setattr(TfidfVectorizer, "fit_transform", fail)
    with pytest.raises(ValueError, match="something else"):
        tfidf_vectors(CHAIN, 4)


# --- beside other vectors ------------------------------------------------------------------------------------------


def test_each_view_is_scaled_by_its_spread():
    one = np.array([[3, 4], [-3, -4], [3, 4], [-3, -4]], np.float32)  # 5 from the mean, 0
    other = np.array([[10], [14], [10], [14]], np.float32)  # 2 from the mean, 12, which stays in
    joined = concat_normalized(one, np.zeros((4, 0), np.float32), other)
    np.testing.assert_allclose(joined, [[0.6, 0.8, 5], [-0.6, -0.8, 7], [0.6, 0.8, 5], [-0.6, -0.8, 7]], rtol=1e-6)
    assert joined.dtype == np.float32


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equal_rows_are_not_blown_up(rows):
    """The mean of seven equal rows is off by a rounding error, which is no spread."""
    view = np.tile(np.array([[0.1, 0.3, 0.7]], np.float32), (rows, 1))
    np.testing.assert_array_equal(concat_normalized(view), view)
    np.testing.assert_array_equal(concat_normalized(np.zeros_like(view)), np.zeros_like(view))


# --- among the words of a run --------------------------------------------------------------------------------------


def texts_of(texts_given: list[str]) -> NodeTexts:
    """Users say the first half of the texts, items the rest, one each."""
    half, places = len(texts_given) // 2, np.arange(len(texts_given), dtype=np.int32)
    users, items = places[:half], places[half:]
    return NodeTexts(
        texts_given, users, users, np.ones(len(users), np.float32), items - half, items, np.ones(len(items), np.float32)
    )


@pytest.fixture
def encoder(monkeypatch) -> np.ndarray:
    """What a made-up language model says of `CHAIN`."""

    class Model:
        class config:  # noqa: N801
            hidden_size = 3

    vectors = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    monkeypatch.setattr(preparing, "open_model", lambda name, **_: Model)
    monkeypatch.setattr(preparing, "encode_texts", lambda texts, model, **_: vectors)
    return vectors


@pytest.mark.parametrize("control", ["real", "shuffled"])
def test_counted_words_stand_beside_the_language_model(encoder, control):
    config = from_dict({"text": {"features": control, "tfidf_dim": 4}})
    texts, vectors = preparing.encode_node_texts(config, texts_of(CHAIN))
    assert texts.texts == CHAIN
    np.testing.assert_array_equal(vectors, concat_normalized(encoder, tfidf_vectors(CHAIN, 4)))
    assert vectors.shape == (6, 3 + 4)
    assert np.array_equal(texts.user_texts, [0, 1, 2]) == (control == "real")


def test_without_counted_words_the_language_model_is_untouched(encoder, monkeypatch):
    monkeypatch.setattr(preparing, "concat_normalized", None)  # not to be called
    _, vectors = preparing.encode_node_texts(from_dict({"text": {"tfidf_dim": 0}}), texts_of(CHAIN))
    np.testing.assert_array_equal(vectors, encoder)


def test_a_variant_without_words_reads_none(monkeypatch):
    for name in ("open_model", "encode_texts", "tfidf_vectors", "concat_normalized"):
        monkeypatch.setattr(preparing, name, None)  # not to be called
    texts, vectors = preparing.encode_node_texts(from_dict({"model": {"variant": "graph"}}), texts_of(CHAIN))
    assert texts.texts == CHAIN
    assert len(vectors) == 6 and not vectors.any()
    assert Config().text.tfidf_dim  # though they are asked for
