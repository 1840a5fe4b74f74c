"""Words of a score: the values add up, each is what its word's derivative says, and places are those of the text."""

import dataclasses
import functools
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest

from fused_rec.config import Config, ModelConfig, TextConfig, from_dict
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.explanation import token_attribution as subject
from fused_rec.explanation.token_attribution import (
    Attributor,
    TokenAttribution,
    attribute_tokens,
    attributor,
    largest_words,
)
from fused_rec.graph.schema import ITEM, USER
from fused_rec.text.encode import Tokens, tokens
from fused_rec.text.pretrained import MINILM, MINILM_PACKAGE, open_model
from fused_rec.text.tfidf import fit_tfidf
from fused_rec.training.inputs import Prepared, init_state, prepare, with_finetuned_text
from fused_rec.training.train_step import embed_nodes, init

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
SCRIPTS = "Straße in İSTANBUL: naïve 東京 don't, 🙂 gold"
FUSED = Config(model=ModelConfig(dim=6, num_layers=2), text=TextConfig(model=TINY, tfidf_dim=8, cache="unused"))


def config_of(name: str) -> Config:
    """The fused model; words alone, none counted; as another node says; with the true encoder."""
    changes = {
        "fused": {},
        "text": {"model": {"variant": "text"}, "text": {"tfidf_dim": 0}},
        "shuffled": {"text": {"features": "shuffled"}},
        "minilm": {"text": {"model": MINILM}},
    }[name]
    sections = {part: dataclasses.replace(getattr(FUSED, part), **settings) for part, settings in changes.items()}
    return dataclasses.replace(FUSED, **sections)


@functools.cache
def market():
    """40 users and 24 items; user 0 says something in many scripts, user 1 and item 2 say nothing."""
    made = make_synthetic(0, n_users=40, n_items=24)
    user_texts = made.users.column("text").to_pylist()
    user_texts[0], user_texts[1] = SCRIPTS, None
    item_texts = made.items.column("text").to_pylist()
    item_texts[2] = None
    about = [table.set_column(table.column_names.index("text"), "text", pa.array(text))
             for table, text in ((made.users, user_texts), (made.items, item_texts))]  # fmt: skip
    isolated = (made.reviews.column("user").to_numpy() != 1) & (made.reviews.column("item").to_numpy() != 2)
    return dataclasses.replace(made, users=about[0], items=about[1], reviews=made.reviews.filter(pa.array(isolated)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(folder):
    """(config, prepared, reader) of a model with parameters as after some training, by name."""

    @functools.cache
    def opened(name: str) -> tuple[Config, Prepared, Attributor]:
        config = config_of(name)
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, cache=str(folder)))
        prepared = prepare(config, market(), split(market(), config.split))
        leaves, tree = jax.tree.flatten(init(config, prepared.graph_inputs).params)
        rng = np.random.default_rng(0)
        leaves = [leaf + rng.normal(size=leaf.shape).astype(np.float32) / 3 for leaf in leaves]
        params = jax.tree.unflatten(tree, leaves)
        return config, prepared, attributor(config, params, prepared)

    return opened


def features(read: Attributor, means: np.ndarray) -> np.ndarray:
    """Text features of a user and an item, both with text, of their mean text vectors."""
    found = []
    for side, mean in zip((USER, ITEM), means, strict=True):
        whitening = read.features.fitted.whitening[side]
        assert whitening is not None
        whitened = (mean - whitening.center) @ whitening.matrix
        found.append(whitened / np.linalg.norm(whitened))
    return np.stack(found).astype(np.float32)


def score(config: Config, read: Attributor, user: int, item: int) -> float:
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, read.params, read.graph_inputs)
    return float(users[user] @ items[item])


def attribute(read: Attributor, user: int, item: int, **settings: Any) -> TokenAttribution:
    [found] = attribute_tokens(read, [(user, item)], **settings)
    assert found is not None
    return found


def total(found: TokenAttribution) -> float:
    return sum(word.value for word in found.tokens)


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="requirements-minilm.txt is not installed"
)


@pytest.mark.parametrize("name", ["fused", "text", "shuffled", pytest.param("minilm", marks=needs_minilm)])
def test_words_add_up_to_what_the_texts_add(opened, name):
    config, _, read = opened(name)
    for user, item in ((0, 3), (5, 7)):
        found = attribute(read, user, item, limit=2)
        assert found.score == pytest.approx(score(config, read, user, item), rel=1e-5, abs=1e-6)  # a sum of terms of 1
        assert abs(found.score - found.baseline) > 1e-3
        assert total(found) == pytest.approx(found.score - found.baseline, rel=0.0101)
        assert found.error <= 0.01


def test_places_are_those_of_the_text(opened):
    _, _, read = opened("fused")
    found = attribute(read, 0, 3)
    assert [text.side for text in found.texts] == sorted((text.side for text in found.texts), reverse=True)
    assert all(word.token == found.texts[word.text].text[word.start : word.end] for word in found.tokens)
    assert all(word.side == found.texts[word.text].side for word in found.tokens)
    order = [(word.text, word.start, word.end) for word in found.tokens]
    assert order == sorted(order)
    assert all(one[:1] != other[:1] or one[2] <= other[1] for one, other in zip(order, order[1:], strict=False))
    [own] = [number for number, text in enumerate(found.texts) if text.text == SCRIPTS]
    user_texts = [word.token for word in found.tokens if word.text == own]
    assert user_texts == [*"Straße in İSTANBUL : naïve 東 京 don ' t , 🙂 gold".split()]


def test_a_word_is_worth_its_derivative_along_the_way(opened):
    """Each value by its definition, with differences for derivatives: the integral of dF / d(its own share)."""
    _, _, read = opened("fused")
    user, item = 0, 3
    found = attribute(read, user, item)
    sides = [text.side for text in found.texts]
    [of_user] = [place for place, text in enumerate(found.texts) if text.text == SCRIPTS]
    of_item = sides.index(ITEM)
    texts = np.array([read.features.texts.texts.index(text.text) for text in found.texts])
    embedded = subject._embed_tokens(read, texts.tolist())
    moved = [embedded[text] for text in texts.tolist()]
    shares = np.array([[text.weight * (text.side == side) for text in found.texts] for side in (USER, ITEM)])
    own = np.stack([read.means[USER][user], read.means[ITEM][item]])
    rest = own - shares @ read.vectors[texts]
    scales, tfidf = read.features.fitted.scales, read.features.fitted.tfidf
    weights, directions = read.features.tfidf.weights[texts].toarray(), tfidf.directions

    def at(share: float, place: int, token: int, term: int, step: float) -> float:
        vectors = []
        for number, text in enumerate(moved):
            factors = np.where(text.moves, share, 1.0)
            counts = share * weights[number]
            if number == place:
                factors[token] += step * (token >= 0)
                counts[term] += step * weights[number, term] * (term >= 0)
            embeddings = (factors[:, None] * text.embeddings).astype(np.float32)
            model = read.model
            encoded = subject._encode(read.weights, embeddings[None], text.mask, subject._encoder(model))
            vectors.append(np.concatenate([np.asarray(encoded)[0] / scales.lm, counts @ directions / scales.tfidf]))
        settings = subject.compile_key(read.config)
        rows = np.array([user, item], np.int32)
        of_nodes = features(read, rest + shares @ np.stack(vectors))
        return float(subject._score(settings, read.params, read.graph_inputs, rows, of_nodes)[0])

    def value(place: int, token: int = -1, term: int = -1) -> float:
        nodes, parts = np.polynomial.legendre.leggauss(16)
        step = 0.03
        slopes = [
            (at((node + 1) / 2, place, token, term, step) - at((node + 1) / 2, place, token, term, -step)) / (2 * step)
            for node in nodes
        ]
        return float(parts @ np.array(slopes)) / 2

    # "naïve": one word of the user's text that is counted nowhere else; its tokens alone.
    cut = moved[of_user].tokens
    [naive] = [word for word in found.tokens if word.token == "naïve"]
    tokens_of = [n for n, (start, end) in enumerate(cut.spans) if naive.start <= start < end <= naive.end]
    assert sum(value(of_user, token=n) for n in tokens_of) == pytest.approx(naive.value, rel=0.03, abs=2e-5)
    # A counted term of the item's text: its share of the words that it stands in is what its tokens leave.
    start, end, row = next(iter(tfidf.occurrences(found.texts[of_item].text)))
    [counted] = [word for word in found.tokens if word.text == of_item and word.start == start]
    assert counted.end == end
    often = sum(row == other for *_, other in tfidf.occurrences(found.texts[of_item].text))
    tokens_of = [n for n, span in enumerate(moved[of_item].tokens.spans) if start <= span[0] < span[1] <= end]
    by_hand = sum(value(of_item, token=n) for n in tokens_of) + value(of_item, term=row) / often
    assert by_hand == pytest.approx(counted.value, rel=0.03, abs=2e-5)


def test_a_node_without_words_has_none(opened):
    _, _, read = opened("fused")
    found = attribute(read, 1, 3)
    assert {word.side for word in found.tokens} == {ITEM}
    found = attribute(read, 1, 2)
    assert (found.tokens, found.texts, found.left_out, found.error) == ([], [], 0, 0)
    assert found.baseline == found.score


def test_the_texts_that_change_most_are_split(opened):
    _, prepared, read = opened("fused")
    count = np.bincount(read.features.texts.links[ITEM].nodes)
    item = int(count.argmax())
    assert count[item] > 3
    few, more = attribute(read, 0, item, limit=2), attribute(read, 0, item, limit=100)
    assert (few.left_out + len(few.texts), more.left_out) == (len(more.texts), 0)
    assert len(few.texts) < len(more.texts)
    assert {text.text for text in few.texts} < {text.text for text in more.texts}
    assert few.score == more.score
    assert sum(text.weight for text in more.texts if text.side == ITEM) == pytest.approx(1)


def test_what_cannot_be_split_is_refused(opened):
    config, prepared, read = opened("fused")
    for changes in ({"model": {"variant": "graph"}}, {"text": {"features": "random"}}):
        with pytest.raises(ValueError, match="token attribution needs a variant that uses text"):
            attributor(from_dict(changes), None, prepared)


@pytest.mark.parametrize("name", ["fused", "text", "shuffled"])
def test_the_two_nodes_start_at_their_rows_of_the_graph(opened, name):
    _, prepared, read = opened(name)
    for rows in ((0, 3), (5, 7), (1, 2)):  # user 1 and item 2 have no text
        own = np.stack([read.means[side][row] for side, row in zip((USER, ITEM), rows, strict=True)])
        given: list[np.ndarray] = []

        def scored(text: np.ndarray, given: list[np.ndarray] = given) -> tuple[np.ndarray, np.ndarray]:
            given.append(text)
            return np.zeros(1), 0 * text

        subject._scored(read, rows, scored, own[None].astype(np.float64))
        graph = prepared.graph_inputs.graph
        expected = [graph.text[side][row] for side, row in zip((USER, ITEM), rows, strict=True)]
        np.testing.assert_allclose(given[0][0], expected, atol=1e-5)


def test_pairs_together_are_as_alone(opened):
    """They share texts, of which some have more gradients than a call takes."""
    _, _, read = opened("fused")
    pairs = [(0, 3), (0, 7), (5, 3), (1, 2), *((0, item) for item in range(8, 24))]
    finished: list[int] = []
    together = attribute_tokens(read, pairs, limit=2, done=finished.append)
    assert sum(finished) == len(pairs)
    for pair, found in zip(pairs, together, strict=True):
        alone = attribute(read, *pair, limit=2)
        assert found is not None and (found.texts, found.left_out) == (alone.texts, alone.left_out)
        assert [word[:5] for word in found.tokens] == [word[:5] for word in alone.tokens]
        np.testing.assert_allclose([w.value for w in found.tokens], [w.value for w in alone.tokens], atol=1e-6)


def test_only_the_panel_with_the_largest_error_is_divided():
    """The score grows evenly; one panel has too large values, two others have errors that nearly cancel."""
    nothing = np.zeros((2, 1))
    rows = {"rows": (0, 0), "texts": np.zeros(1, int), "sides": np.zeros(1, int), "shares": np.ones(1, np.float32)}
    path = subject._Path(slopes=abs, score=1.0, weight=nothing, rest=nothing, count=1, **rows)  # pyright: ignore
    one = subject._PathSum(path)
    panels = one.wanted()
    assert panels == list(itertools.pairwise(subject.PANELS))
    one.scores.update((end, end) for end in subject.PANELS)
    wrong = {panels[0]: 0.031, panels[2]: 0.05, panels[4]: -0.03}
    one.parts.update((at, subject._Part([np.array([at[1] - at[0] + wrong.get(at, 0)])], [])) for at in panels)
    for expected in (panels[2], panels[0], panels[4]):
        assert not one.precise() and one.integral() is None
        (low, middle), (other, high) = halves = one.wanted()
        assert (low, high) == expected and middle == other == (low + high) / 2
        one.scores[middle] = middle
        one.parts.update((at, subject._Part([np.array([at[1] - at[0]])], [])) for at in halves)
    whole = one.integral()
    assert one.wanted() == [] and whole is not None
    assert whole.by_token[0].tolist() == pytest.approx([1.0])
    assert whole.baseline == 0


def test_long_texts_are_encoded_one_point_at_a_time(opened, monkeypatch):
    _, _, read = opened("fused")
    [together] = attribute_tokens(read, [(0, 3)], limit=1)
    monkeypatch.setattr(subject, "GROUP_TOKENS", 1)
    [alone] = attribute_tokens(read, [(0, 3)], limit=1)
    assert together is not None and alone is not None
    np.testing.assert_allclose([w.value for w in alone.tokens], [w.value for w in together.tokens], atol=1e-6)


def test_where_no_number_of_points_suffices(opened, monkeypatch, caplog):
    _, _, read = opened("fused")
    monkeypatch.setattr(subject, "TOLERANCE", -1.0)
    monkeypatch.setattr(subject, "MOST_POINTS", 40)
    assert attribute_tokens(read, [(0, 3)], limit=1) == [None]
    assert "words of user 0 and item 3 miss the score by more than -1" in caplog.text


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_fine_tuned_encoder(folder, training):
    """Words add up to what the texts add, by the encoder as trained."""
    text = dataclasses.replace(FUSED.text, cache=str(folder), finetune=training, lora_rank=2)
    config = dataclasses.replace(FUSED, text=text)
    prepared = prepare(config, market(), split(market(), config.split))
    state = init_state(config, prepared)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 10, jax.device_get(state.params))
    tuned = with_finetuned_text(config, prepared, dataclasses.replace(state, params=params))
    read = attributor(config, params, tuned)
    for side in (USER, ITEM):
        rows = read.features.node_rows()[side].rows
        np.testing.assert_allclose(rows, np.asarray(tuned.graph_inputs.graph.text[side]), atol=1e-5)
    found = attribute(read, 0, 3, limit=2)
    assert total(found) == pytest.approx(found.score - found.baseline, rel=0.0101)
    assert found.score == pytest.approx(score(config, read, 0, 3), rel=1e-4)
    assert np.abs(read.features.lm - prepared.text.lm).max() > 0.01


def test_words_of_other_languages_are_not_listed(opened, monkeypatch):
    """The tokenizer of the tests splits all words; of this text alone the language is said not to be read."""
    _, _, read = opened("fused")
    assert not largest_words(attribute(read, 0, 3))
    monkeypatch.setattr(subject, "foreign_texts", lambda texts, _: [False for _ in texts])
    found = attribute(read, 0, 3)
    assert {word["side"] for word in largest_words(found)} == {USER, ITEM}
    monkeypatch.setattr(subject, "foreign_texts", lambda texts, _: [text == SCRIPTS for text in texts])
    foreign = attribute(read, 0, 3)
    assert [text.foreign for text in foreign.texts] == [text.text == SCRIPTS for text in foreign.texts]
    assert total(foreign) == pytest.approx(total(found), rel=1e-5)
    own = [word.token for word in foreign.tokens if foreign.texts[word.text].text == SCRIPTS]
    listed = {word["word"] for word in largest_words(foreign) if word["side"] == USER}
    assert listed and not listed & {"straße", "naïve", "東"} and "naïve" in own


def test_a_model_with_a_prompt_is_refused(opened, monkeypatch):
    config, prepared, _ = opened("fused")
    prompted = dataclasses.replace(open_model(TINY), prompt="query: ")
    monkeypatch.setattr(subject, "open_language_model", lambda _: prompted)
    with pytest.raises(ValueError, match=r"tiny_bert prepends the prompt 'query: ' to each text; token attribution"):
        attributor(config, None, prepared)


# --- words and terms -----------------------------------------------------------------------------------------------


def test_parts_of_words_are_merged():
    model = open_model(TINY)
    [cut] = tokens([SCRIPTS], model)
    assert cut.special.tolist() == [True, *[False] * (len(cut.ids) - 2), True]
    assert len(cut.ids) > len(set(cut.words))  # some word has several tokens
    spans = subject._spans(cut, np.arange(float(len(cut.ids))))
    assert sum(value for *_, value in spans) == sum(range(1, len(cut.ids) - 1))
    assert "İSTANBUL" in [SCRIPTS[start:end] for start, end, _ in spans]


def test_terms_are_added_to_the_words_they_stand_in():
    texts = ["Red_fox and İstanbul fox", "red_fox istanbul", "fox İstanbul and", "x", "y", "z"]
    found, _ = fit_tfidf(texts, 8)
    places = list(found.occurrences(texts[0]))
    values = np.zeros(len(found.terms))
    values[[row for *_, row in places]] = 7, 10, 20, 30
    # As BERT splits it, cut after "and": red _ fox and
    spans = [(0, 3, 1.0), (3, 4, 2.0), (4, 7, 3.0), (8, 11, 4.0)]
    assert subject._with_terms(spans, found, texts[0], dict(enumerate(values.tolist()))) == [
        (0, 3, 1 + 3), (3, 4, 2 + 1), (4, 7, 3 + 3), (8, 11, 14), (13, 20, 20), (21, 24, 30),
    ]  # fmt: skip


def test_what_a_term_is_worth_is_shared_by_its_occurrences():
    found, _ = fit_tfidf(["gold and gold", "gold", "and", "x", "y"], 2)
    values = np.zeros(len(found.terms))
    values[found.terms["gold"]] = 1
    assert subject._with_terms([], found, "gold and gold", dict(enumerate(values.tolist()))) == [
        (0, 4, 0.5),
        (5, 8, 0.0),
        (9, 13, 0.5),
    ]


def test_tokens_stop_at_the_limit():
    [cut] = tokens([SCRIPTS], open_model(TINY), max_tokens=5)
    assert isinstance(cut, Tokens) and len(cut.ids) == 5
