"""Text features: the columns of a text, the rows of nodes by hand, and what stays when the language model moves."""

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from pretrained import model_of_width

from fused_rec.config import TextConfig
from fused_rec.data.node_texts import ITEM, USER, NodeTextLinks, NodeTexts
from fused_rec.text import features as subject
from fused_rec.text.features import ColumnScales, encode_features, fit_features, rms_norm, without_tfidf
from fused_rec.text.tfidf import fit_tfidf

CHAIN = ["gold ore", "gold coin", "bank coin", "bank loan", "loan", "ore"]


def links_of(
    nodes: Sequence[int] | range, texts: Iterable[int], weights: Iterable[float] = (), n_nodes: int | None = None
) -> NodeTextLinks:
    """Links, each of weight 1 where none is given."""
    given = np.array(list(weights) or [1] * len(nodes), np.float32)
    return NodeTextLinks(np.array(nodes, np.int32), np.array(texts, np.int32), given, n_nodes or len(nodes))


def halves(texts: list[str]) -> NodeTexts:
    """Users have the first half of the texts, items the rest, one each."""
    half = len(texts) // 2
    links = {USER: links_of(range(half), range(half)), ITEM: links_of(range(half), range(half, len(texts)))}
    return NodeTexts(texts, links)


def rows_of(links: NodeTextLinks, vectors: np.ndarray) -> np.ndarray:
    """Features of nodes of one type, by vectors of the language model alone."""
    texts = NodeTexts([str(row) for row in range(len(vectors))], {USER: links})
    return without_tfidf(texts, vectors).node_rows()[USER].rows


# --- columns of a text ---------------------------------------------------------------------------------------------


def test_each_view_is_scaled_by_its_spread():
    lm = np.array([[3, 4], [-3, -4], [3, 4], [-3, -4]], np.float32)  # 5 from the mean, 0
    tfidf = np.array([[10], [14], [10], [14]], np.float32)  # 2 from the mean, 12, which stays in
    joined = ColumnScales(rms_norm(lm), rms_norm(tfidf)).concat(lm, tfidf)
    np.testing.assert_allclose(joined, [[0.6, 0.8, 5], [-0.6, -0.8, 7], [0.6, 0.8, 5], [-0.6, -0.8, 7]], rtol=1e-6)
    assert joined.dtype == np.float32


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equal_rows_are_not_blown_up(rows):
    """The mean of seven equal rows is off by a rounding error, which is no spread."""
    view = np.tile(np.array([[0.1, 0.3, 0.7]], np.float32), (rows, 1))
    assert rms_norm(view) == rms_norm(np.zeros_like(view)) == 1


@pytest.fixture
def lm(monkeypatch) -> np.ndarray:
    """What a made-up language model says of `CHAIN`."""
    vectors = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    monkeypatch.setattr(subject, "open_model", lambda name, **_: model_of_width(3))
    monkeypatch.setattr(subject, "encode_texts", lambda texts, model, **_: vectors)
    return vectors


@pytest.mark.parametrize("control", ["real", "shuffled"])
def test_tfidf_stands_beside_the_language_model(lm, control):
    found = encode_features(TextConfig(features=control, tfidf_dim=4), halves(CHAIN), seed=0)
    _, tfidf = fit_tfidf(CHAIN, 4)
    assert found.texts.texts == CHAIN
    np.testing.assert_array_equal(found.lm, lm)
    np.testing.assert_array_equal(found.tfidf.vectors, tfidf.vectors)
    expected = np.concatenate([lm / rms_norm(lm), tfidf.vectors / rms_norm(tfidf.vectors)], axis=1)
    np.testing.assert_array_equal(found.vectors(), expected)
    assert np.array_equal(found.texts.links[USER].texts, [0, 1, 2]) == (control == "real")


def test_without_tfidf_the_language_model_is_untouched(lm):
    found = encode_features(TextConfig(tfidf_dim=0), halves(CHAIN), seed=0)
    assert found.vectors() is lm
    assert found.fitted.scales == (1, 1)


def test_random_features_have_the_width_of_real_ones(lm, monkeypatch):
    monkeypatch.setattr(subject, "encode_texts", None)  # not to be called
    found = encode_features(TextConfig(features="random", tfidf_dim=4), halves(CHAIN), seed=0)
    assert found.vectors().shape == (6, 3 + 4)
    np.testing.assert_allclose(np.linalg.norm(found.vectors(), axis=1), 1, atol=1e-6)


def test_other_vectors_of_the_language_model_meet_what_was_fitted(lm):
    """Scales and whitening stay those of the first vectors; so do the TF-IDF columns."""
    first = fit_features(halves(CHAIN), lm, *fit_tfidf(CHAIN, 2))
    other = first.with_lm(2 * lm + 1)
    assert other.fitted is first.fitted
    np.testing.assert_array_equal(other.vectors()[:, 3:], first.vectors()[:, 3:])
    for node_type, nodes in other.node_rows().items():
        by = first.fitted.whitening[node_type]
        assert by is not None
        moved = (other.vectors()[first.texts.links[node_type].texts] - by.center) @ by.matrix
        np.testing.assert_allclose(nodes.norms, np.linalg.norm(moved, axis=1), rtol=1e-5)
        np.testing.assert_allclose(nodes.rows, moved / nodes.norms[:, None], rtol=1e-5, atol=1e-6)
    anew = fit_features(halves(CHAIN), 2 * lm + 1, *fit_tfidf(CHAIN, 2))
    assert np.abs(anew.node_rows()[USER].rows - other.node_rows()[USER].rows).max() > 0.1


# --- rows of nodes -------------------------------------------------------------------------------------------------


def test_node_rows_by_hand():
    # One direction: nodes 0, 1, 3 stand at 0, 2 and 4 (the mean of 2 and 6), so around 2 they are at -2, 0, 2.
    vectors = np.array([[0], [2], [6]], np.float32)
    links = links_of([0, 1, 3, 3], [0, 1, 1, 2], [1, 1, 0.5, 0.5], n_nodes=5)
    assert rows_of(links, vectors).tolist() == [[-1], [0], [0], [1], [0]]


def test_term_rows_by_hand():
    """Unit means of TF-IDF rows over all terms, zero for a node without text; without terms there is no column."""
    texts = NodeTexts(CHAIN, {ITEM: links_of([0, 2, 2], [0, 1, 3], [1, 0.25, 0.75], n_nodes=4)})
    model, tfidf = fit_tfidf(CHAIN, 1)
    found = fit_features(texts, np.ones((6, 3), np.float32), model, tfidf).item_terms.toarray()
    rows = tfidf.weights.toarray()
    mean = 0.25 * rows[1] + 0.75 * rows[3]
    assert found.shape == (4, len(model.terms))
    np.testing.assert_allclose(found, [rows[0], 0 * mean, mean / np.linalg.norm(mean), 0 * mean], rtol=1e-6)
    assert without_tfidf(texts, np.ones((6, 3), np.float32)).item_terms.shape == (4, 0)


def test_whitening_evens_out_the_directions():
    # Around their mean (5, 5) the nodes stand at (+-2, +-1): variances 16/3 and 4/3 (n - 1 = 3), 10/3 on average.
    vectors = 5 + np.array([[2, 1], [-2, 1], [2, -1], [-2, -1]], np.float32)
    step = np.array([2 / np.sqrt(16 / 3 + 10 / 3), 1 / np.sqrt(4 / 3 + 10 / 3)])
    expected = np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]]) * step / np.linalg.norm(step)
    np.testing.assert_allclose(rows_of(links_of(range(4), range(4)), vectors), expected, rtol=1e-5)


def test_rows_are_unit_and_textless_nodes_zero():
    vectors = np.random.default_rng(0).normal(2, 1, size=(6, 3)).astype(np.float32)
    out = rows_of(links_of([0, 2, 3, 4, 4], [0, 1, 2, 3, 5], [1, 1, 1, 0.3, 0.7], n_nodes=6), vectors)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), [1, 0, 1, 1, 1, 0], rtol=1e-5)


@pytest.mark.parametrize("rows", [[], [2]])
def test_too_few_words_to_compare_are_none(rows):
    assert not rows_of(links_of(rows, rows, n_nodes=4), np.ones((3, 2), np.float32)).any()


def test_words_that_all_nodes_share_say_nothing():
    vector = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    for nodes in (2, 3, 7, 100):
        assert not rows_of(links_of(range(nodes), [0] * nodes), vector).any()


def test_vectors_do_not_depend_on_the_signs_of_the_directions(monkeypatch):
    """LAPACK may turn an eigenvector round; the parameters of a checkpoint must meet the same words again."""
    vectors = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
    every = links_of(range(8), range(8))
    here = rows_of(every, vectors)
    eigh = np.linalg.eigh

    def elsewhere(matrix):
        variance, directions = eigh(matrix)
        return variance, directions * np.array([[-1, 1, -1]])

    monkeypatch.setattr(np.linalg, "eigh", elsewhere)
    np.testing.assert_allclose(rows_of(every, vectors), here, atol=1e-6)
