"""TF-IDF vectors of texts small enough to count by hand."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from fused_rec.text.tfidf import apply_tfidf, fit_tfidf

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


def tfidf_vectors(texts: list[str], dims: int) -> np.ndarray:
    _, found = fit_tfidf(texts, dims)
    return found.vectors


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


def test_vectors_are_weights_in_the_directions_of_the_model():
    model, found = fit_tfidf(CHAIN, 3)
    assert (model.directions.shape, found.weights.shape) == ((len(model.terms), 3), (6, 5))
    np.testing.assert_allclose(found.weights @ model.directions, found.vectors, atol=1e-6)


def test_terms_are_found_at_their_characters():
    """A capital İ is two characters in lower case, the second of which ends a word."""
    texts = ["Red_fox and İstanbul fox", "red_fox istanbul", "fox İstanbul and", "x", "y", "z"]
    model, _ = fit_tfidf(texts, 8)
    places = list(model.occurrences(texts[0]))
    assert [texts[0][start:end] for start, end, _ in places] == ["Red_fox", "and", "stanbul", "fox"]


def test_a_model_without_terms_finds_none():
    model, found = fit_tfidf(CHAIN, 0)
    assert list(model.occurrences(CHAIN[0])) == []
    assert found.weights[2].toarray().shape == (1, 0) == (1, len(model.directions))


def test_a_text_has_the_same_vector_whatever_other_texts_there_are():
    model, found = fit_tfidf(CHAIN, 3)
    again = apply_tfidf(model, CHAIN)
    np.testing.assert_allclose(again.vectors, found.vectors, atol=1e-6)
    np.testing.assert_allclose(again.weights.toarray(), found.weights.toarray(), atol=1e-12)
    others = ["zebra", CHAIN[1].upper(), f"{CHAIN[1]} zebra"]
    vectors = apply_tfidf(model, others).vectors
    assert vectors.dtype == np.float32 and not vectors[0].any()
    np.testing.assert_allclose(vectors[1:], np.stack([again.vectors[1]] * 2), atol=1e-7)
    assert apply_tfidf(fit_tfidf(CHAIN, 0)[0], CHAIN).vectors.shape == (6, 0)
    assert apply_tfidf(model, []).vectors.shape == (0, 3)
