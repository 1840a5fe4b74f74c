"""How good a scorer is on a held-out part of prepared tables."""

import functools
import logging
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

LOG = logging.getLogger(__name__)

NEIGHBOURS = tuple({"neighbours": n, "shrink": s} for n in (20, 100, 500) for s in (0.0, 10.0))
# Recommenders that need no training, each with the settings among which validation chooses.
BASELINES: dict[str, tuple[Callable[..., Scorer], tuple[dict[str, float], ...]]] = {
    "popularity": (baselines.popularity, ({},)),
    "item_knn": (baselines.item_knn, NEIGHBOURS),
    "user_knn": (baselines.user_knn, NEIGHBOURS),
    "ease": (baselines.ease, tuple({"l2": l2} for l2 in (10.0, 30.0, 100.0, 300.0, 1000.0))),
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
    """One of `BASELINES` on what may be seen; validation NDCG@10 of the training part chooses its settings."""
    make, settings = BASELINES[name]
    dataset, interactions = prepared.dataset, prepared.dataset.interactions.take(prepared.split.train)
    size = dataset.n_users, dataset.n_items
    chosen = settings[0]
    if len(settings) > 1:
        pairs = column(interactions, "user"), column(interactions, "item")
        values = [measure(prepared, make(*pairs, *size, **tried), "valid")["ndcg@10"] for tried in settings]
        chosen = settings[int(np.argmax(values))]
        LOG.info("%s: validation chooses %s", name, chosen)
    return make(prepared.observed.user, prepared.observed.item, *size, **chosen)
