"""How good a scorer is on a held-out part of prepared tables."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from fused_rec.config import Config
from fused_rec.data.dataset import column
from fused_rec.evaluate.ranking import Scorer, evaluate, item_sets, mean
from fused_rec.model import baselines
from fused_rec.train.prepare import Prepared
from fused_rec.train.step import Task, TrainState, embed

BASELINES: dict[str, Callable[..., Scorer]] = {
    "popularity": baselines.popularity,
    "item_knn": baselines.item_knn,
    "user_knn": baselines.user_knn,
    "ease": baselines.ease,
}


def measure(prepared: Prepared, scorer: Scorer, part: str) -> dict[str, float]:
    """Ranks the whole catalogue for the users with held-out items in `part`, items known before it left out."""
    dataset, parts_of = prepared.dataset, prepared.split
    users, items = (column(dataset.interactions, name) for name in ("user", "item"))
    rows = getattr(parts_of, part)
    known = parts_of.train if part == "valid" else np.concatenate([parts_of.train, parts_of.valid])
    per_user = evaluate(
        scorer,
        truth=item_sets(users[rows], items[rows], dataset.n_users),
        seen=item_sets(users[known], items[known], dataset.n_users),
        n_items=dataset.n_items,
        item_counts=np.bincount(items[parts_of.train], minlength=dataset.n_items),
        candidates=parts_of.valid_candidates if part == "valid" else parts_of.test_candidates,
    )
    return mean(per_user)


def scorer(config: Config, prepared: Prepared, state: TrainState) -> jax.tree_util.Partial:
    """Scores of the whole catalogue for a batch of users, as `fused_rec.evaluate.ranking` takes it."""
    users, items = _embed(config, state.params, prepared.task)
    return jax.tree_util.Partial(_dot, users, items)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: Config, params: PyTree, task: Task) -> tuple[jax.Array, jax.Array]:
    return embed(config, params, task)


def _dot(users: jax.Array, items: jax.Array, batch: jax.Array) -> jax.Array:
    return users[batch] @ items.T


def baseline(name: str, prepared: Prepared) -> Scorer:
    """A recommender that needs no training, at its defaults, from the interactions that may be seen."""
    observed, dataset = prepared.observed, prepared.dataset
    return BASELINES[name](observed.user, observed.item, dataset.n_users, dataset.n_items)
