"""A score taken apart: what each thing that a user is, says, holds or is tied to adds to it.

A score is prior_i + sum over towers of <u / |u|, v_i>, where u is linear in id rows and words once the coefficients are
given (fused_rec/model/message_passing.py) and v_i already carries its own length and the tower's share; the closed-form
part, where there is one, is a tower of its own. So with the user's last hop written out,

    u = mix_0 x_u + sum_l mix_l (text_gate_l text_u + sum_r gate_r,l sum_{e = (s, u) in r} edge_e voice_s h^{l-1}_s)

each term's dot product with v_i over |u| is its part of the score, and the parts sum to it. Every h splits again into
what began as an id row and what began as words. Nothing is approximated: the parts differ from the score by rounding.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, PyTree

from fused_rec.config import Config
from fused_rec.graph.build import HELD_BY, ITEM, USER
from fused_rec.graph.hetero import Relation
from fused_rec.graph.propagate import Adjacency
from fused_rec.model.closed_form import Spectrum
from fused_rec.model.fused import LINEAR, Towers
from fused_rec.model.message_passing import Coefficients, readout, rounds
from fused_rec.train.step import Task, embed

TOWERS = ("main", "words")  # names of the parts of `Towers`, in the order of its results
Rounds = list[dict[str, Float32[np.ndarray, "_ K"]]]  # h^0 to h^L, by node type

OWN_ID, OWN_WORDS, HOLDING, LIKE_MINDED, POPULARITY = "own_id", "own_words", "holding", "similar_text", "popularity"
TIE = "tie:"  # before the names of the tables' own kinds of ties, which may be any


class Tower(NamedTuple):
    """One of the vectors that a score is a sum of. ids, words: what began as id rows, and what began as words.

    Rows of the spectrum are id rows too: they are all that it knows of an item, and come from who holds it.
    """

    ids: Rounds
    words: Rounds
    coefficients: Coefficients
    user_length: Float32[np.ndarray, "U"]  # |u|, 1 for dot products
    items: Float32[np.ndarray, "I K"]  # v_i


class Ledger(NamedTuple):
    """All that the scores of one trained model on one graph are made of, on the host."""

    towers: list[Tower]
    adjacencies: Mapping[Relation, Adjacency]
    users: Float32[np.ndarray, "U D"]  # as `embed` gives them
    items: Float32[np.ndarray, "I D"]
    prior: Float32[np.ndarray, "I"]
    popularity: Float32[np.ndarray, "I"]


class Parts(NamedTuple):
    """P parts of the scores of n items for one user. What `ids` and `words` lack of `value` began as neither.

    kind: `OWN_ID`, `OWN_WORDS`, `HOLDING`, `LIKE_MINDED` (heard for similar words), `POPULARITY`, or `TIE` and the kind
      of tie by which the user hears another.
    source: row of the item or user that is held or heard, -1 for the user's own and for popularity.
    """

    kind: list[str]
    source: Int[np.ndarray, "P"]
    value: Float[np.ndarray, "P n"]
    ids: Float[np.ndarray, "P n"]
    words: Float[np.ndarray, "P n"]


def ledger(config: Config, params: PyTree, task: Task) -> Ledger:
    """Opens the books of a model: parameters, whole, and the task it is asked about."""
    towers, (users, items) = jax.device_get(_towers(Config(model=config.model, train=config.train), params, task))
    prior = items[:, -1] if config.model.popularity else np.zeros(len(items), np.float32)
    books = [Tower(*tower) for tower in towers]
    if task.spectrum is not None and config.model.spectrum:
        books.append(_spectrum(task, task.spectrum, users, items, len(towers) * config.model.dim))
    return Ledger(books, task.adjacencies, users, items, prior, np.asarray(task.popularity))


def _spectrum(task: Task, spectrum: Spectrum, users: np.ndarray, items: np.ndarray, first: int) -> Tower:
    """The closed-form part as a tower of one round, in which a user is the sum of what they hold."""
    rows = np.asarray(spectrum.rows)
    columns = slice(first, first + rows.shape[1])
    silent = {t: np.broadcast_to(np.float32(0), (n, rows.shape[1])) for t, n in task.graph.node_types}
    plain = Coefficients(
        edge={HELD_BY: (np.asarray(task.adjacencies[HELD_BY].weight) > 0).astype(np.float32)},
        voice={HELD_BY: np.ones(len(items), np.float32)},
        gate={HELD_BY: np.ones((1, len(users)), np.float32)},
        text_gate={},
        mix=np.array([0, 1], np.float32),
    )
    held = [silent | {ITEM: rows}, silent | {USER: users[:, columns]}]
    return Tower(held, [silent, silent], plain, np.ones(len(users), np.float32), items[:, columns])


@functools.partial(jax.jit, static_argnums=0)
def _towers(config: Config, params: PyTree, task: Task) -> Any:
    seen: Any
    vectors, seen = Towers(config.model).apply(
        {"params": params}, task.graph, task.adjacencies, mutable=["intermediates"]
    )
    users, items = embed(config, params, task)
    towers = []
    for number, name in enumerate(TOWERS[: len(vectors)]):
        [(ids, words, coefficients)] = seen["intermediates"][name][LINEAR]
        silent = {node_type: 0 * x for node_type, x in words.items()}
        by_ids = rounds(task.adjacencies, coefficients, ids, silent)
        by_words = rounds(task.adjacencies, coefficients, words, words)
        out = readout(coefficients, by_ids)[USER] + readout(coefficients, by_words)[USER]
        cosine = config.model.score == "cosine"
        length = jnp.sqrt((out * out).sum(1) + 1e-12) if cosine else jnp.ones(len(out))  # as in `unit`
        columns = slice(number * config.model.dim, (number + 1) * config.model.dim)
        towers.append((by_ids, by_words, coefficients, length, items[:, columns]))
    return towers, (users, items)


def scores(book: Ledger, user: int) -> Float32[np.ndarray, "I"]:
    """What the model gives every item for one user, as `fused_rec.train.measure.scorer` does."""
    given = book.items @ book.users[user]
    return book.popularity if given.max() == given.min() else given


def parts(book: Ledger, user: int, items: Sequence[int] | Int[np.ndarray, "n"]) -> Parts:
    """The parts of these items' scores for one user; over the parts they sum to `scores`.

    A user of whom the model knows nothing gets what is popular, and that is the only part.
    """
    rows = np.asarray(items)
    given = book.items @ book.users[user]
    nothing = np.zeros((1, len(rows)))
    if given.max() == given.min():
        return Parts([POPULARITY], np.array([-1]), book.popularity[None, rows].astype(float), nothing, nothing)
    found: dict[tuple[str, int], Any] = {}
    for tower in book.towers:
        into = tower.items[rows].T.astype(np.float64) / tower.user_length[user]
        for key, ids, words in _terms(book, tower, user):
            before = found.get(key, (0, 0))
            found[key] = before[0] + ids @ into, before[1] + words @ into
    kinds, sources = zip(*found, strict=True)
    ids, words = (np.stack(column) for column in zip(*found.values(), strict=True))
    prior = book.prior[None, rows].astype(float)
    return Parts(
        [*kinds, POPULARITY],
        np.array([*sources, -1]),
        np.concatenate([ids + words, prior]),
        np.concatenate([ids, nothing]),
        np.concatenate([words, nothing]),
    )


def _terms(book: Ledger, tower: Tower, user: int) -> Any:
    """((kind, source), vector from ids, vector from words): the terms of u, in float64."""
    mix = tower.coefficients.mix.astype(np.float64)
    own, gates = tower.words[0][USER][user].astype(np.float64), tower.coefficients.text_gate
    again = mix[1:] @ gates[USER][:, user] if USER in gates else 0.0
    none = np.zeros_like(own)
    yield (OWN_ID, -1), mix[0] * tower.ids[0][USER][user], none
    yield (OWN_WORDS, -1), none, (mix[0] + again) * own
    for relation, edge in tower.coefficients.edge.items():
        if relation.target != USER or len(mix) == 1:
            continue
        hears = book.adjacencies[relation]
        at = slice(*hears.receiver_start[user : user + 2])
        senders = hears.senders[at]
        factors = mix[1:] * tower.coefficients.gate[relation][:, user]
        ids, words = (
            (edge[at] * tower.coefficients.voice[relation][senders])[:, None]
            * sum(f * h[relation.source][senders] for f, h in zip(factors, every, strict=False))
            for every in (tower.ids, tower.words)
        )
        kind = (
            HOLDING if relation == HELD_BY else relation.name if relation.name == LIKE_MINDED else TIE + relation.name
        )
        for sender, by_ids, by_words in zip(senders.tolist(), ids, words, strict=True):
            yield (kind, sender), by_ids, by_words


def modalities(book: Ledger, user: int, item: int) -> dict[str, float]:
    """One score over how it came: the user's own id and words, popularity, and by each relation ids and words apart.

    Keys such as "own_id", "holding/words", "tie:friend/id", "popularity"; the values sum to the score.
    """
    split = parts(book, user, [item])
    found: dict[str, float] = {}
    for number, kind in enumerate(split.kind):
        if kind in (OWN_ID, OWN_WORDS, POPULARITY):
            found[kind] = float(split.value[number, 0])
            continue
        for origin, values in (("id", split.ids), ("words", split.words)):
            found[f"{kind}/{origin}"] = found.get(f"{kind}/{origin}", 0.0) + float(values[number, 0])
    return found
