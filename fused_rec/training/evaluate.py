"""Scorers of a trained model and of baselines, and their evaluation on a held-out split."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PyTree
from tqdm import tqdm

from fused_rec.baselines.inner_products import baseline_vectors
from fused_rec.baselines.neighbors import Interactions
from fused_rec.baselines.registry import BASELINES
from fused_rec.config import Config
from fused_rec.data.dataset import column
from fused_rec.data.splits import observe
from fused_rec.distributed.devices import AnyArray
from fused_rec.evaluation.item_sets import UserItemSets, item_sets
from fused_rec.evaluation.ranking import RankingSpec, Scorer, UserMetrics, evaluate, mean, users_per_batch
from fused_rec.evaluation.slices import Slices, bands, item_slices, user_slices
from fused_rec.graph.schema import ITEM, USER
from fused_rec.training.footprint import require_embedding
from fused_rec.training.inputs import ModelInputs, Prepared, prepare, with_pretrained_text
from fused_rec.training.sharding import parallel_embed_nodes, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, TrainState

LOG = logging.getLogger(__name__)
LARGE_ERROR = 0.05  # of the validation metric: a larger standard error is a warning


def evaluate_mean(prepared: Prepared, scorer: Scorer, split: str) -> dict[str, float]:
    """Averages `evaluate_users` over users (`fused_rec.evaluation.ranking.mean`)."""
    return mean(evaluate_users(prepared, scorer, split))


def evaluate_validation(prepared: Prepared, scorer: Scorer, metric: str) -> dict[str, float]:
    """Averages `evaluate_users` over validation users, and logs how precise the metric is that choices are made by.

    Args:
      prepared: tables and split.
      scorer: see `fused_rec.evaluation.ranking.Scorer`.
      metric: train.metric.

    Returns:
      The means of all metrics.
    """
    per_user = evaluate_users(prepared, scorer, "valid")
    found = mean(per_user)
    if metric in per_user.metrics:
        known = per_user.metrics[metric][~np.isnan(per_user.metrics[metric])]
        error = float(known.std()) / max(len(known) - 1, 1) ** 0.5
        level, remedy = logging.INFO, ""
        if error > LARGE_ERROR * found[metric]:
            level, remedy = logging.WARNING, "; with more validation users choices are more certain"
        LOG.log(
            level,
            "validation %s is %.4f, with a standard error of %.4f over %d users: settings and components whose values "
            "are closer may be chosen by chance%s",
            *(metric, found[metric], error, len(known), remedy),
        )
    return found


def evaluate_users(prepared: Prepared, scorer: Scorer, split: str) -> UserMetrics:
    """Evaluates full-catalogue rankings of the users with held-out items in a split.

    Args:
      prepared: tables and split.
      scorer: see `fused_rec.evaluation.ranking.Scorer`.
      split: "valid" or "test". Items that a user interacted with before it, also in rows that the split drops from
        training, are not ranked.

    Returns:
      Metrics per user; novelty counts the interactions of the training split.
    """
    dataset = prepared.dataset
    items = column(dataset.interactions, "item")[prepared.split.train]
    return evaluate(scorer, *held_out(prepared, split), item_counts=np.bincount(items, minlength=dataset.n_items))


def user_groups(prepared: Prepared) -> dict[str, dict[str, Bool[np.ndarray, "U"]]]:
    """Groups users by number of observed interactions, and by whether they have social edges.

    Args:
      prepared: tables, split and observed interactions. The ties are those of the tables also where a control trains on
        others, so that all variants are evaluated on the same groups.


    Returns:
      By "user_interactions" and "user_social_degree", a mask of users for each group.
    """
    dataset = prepared.dataset
    ties = observe(dataset, prepared.split, prepared.splits).ties
    tied = np.zeros(dataset.n_users, bool)
    tied[np.concatenate([column(ties, "source"), column(ties, "target")])] = True
    return {
        "user_interactions": bands(np.bincount(prepared.observed.user, minlength=dataset.n_users)),
        "user_social_degree": {"with": tied, "without": ~tied},
    }


def evaluate_slices(prepared: Prepared, scorer: Scorer, per_user: UserMetrics) -> dict[str, Slices]:
    """Divides the metrics of the test split by groups of users and by groups of held-out items.

    Args:
      prepared: tables, split and observed interactions.
      scorer: see `fused_rec.evaluation.ranking.Scorer`.
      per_user: of `evaluate_users` on the test split.

    Returns:
      Means over the users of each of `user_groups`, and under "item_interactions" means that count only the held-out
      items of a band, or of "1+", all but new items; empty slices are left out.
    """
    items = bands(np.bincount(prepared.observed.item, minlength=prepared.dataset.n_items))
    items["1+"] = ~items["0"]
    of_users = {name: user_slices(per_user, groups) for name, groups in user_groups(prepared).items()}
    return of_users | {"item_interactions": item_slices(scorer, items, *held_out(prepared, "test"))}


def held_out(prepared: Prepared, split: str) -> tuple[RankingSpec, UserItemSets]:
    """Returns what may be recommended when a split is evaluated, and its held-out items.

    Args:
      prepared: tables and split.
      split: "valid" or "test".
    """
    dataset, data_split = prepared.dataset, prepared.split
    users, items = (column(dataset.interactions, name) for name in ("user", "item"))
    rows = getattr(data_split, split)
    seen, truth = (item_sets(users[of], items[of], dataset.n_users) for of in (data_split.before(split), rows))
    candidates = data_split.valid_candidates if split == "valid" else data_split.test_candidates
    return RankingSpec(seen, dataset.n_items, candidates), truth


def scorer(config: Config, prepared: ModelInputs, state: TrainState) -> jax.tree_util.Partial:
    """Builds the scorer of a run's model.

    A user about whom the model knows nothing, so that all scores are equal, is scored by popularity, as by a
    `baseline`.

    Args:
      config: settings of the run.
      prepared: inputs of the model.
      state: unsharded.
    """
    if not config.model.is_trained:
        return state.params  # of `fused_rec.training.baseline_runs.fitted_state`
    return sharded_scorer(config, shard_graph_inputs(prepared.graph_inputs), shard_state(state.params, own=False))


def sharded_scorer(config: Config, graph_inputs: GraphInputs, params: PyTree) -> jax.tree_util.Partial:
    """Builds the same scorer from inputs and parameters that are sharded already."""
    return jax.tree_util.Partial(
        scores_of, *parallel_embed_nodes(config)(params, graph_inputs), graph_inputs.popularity
    )


def scores_of(
    users: Float32[AnyArray, "U D"],
    items: Float32[AnyArray, "I D"],
    popularity: Float32[AnyArray, "I"],
    batch: Int32[AnyArray, "B"],
) -> Float32[Array, "B I"]:
    """Computes the scores of `scorer` from embeddings.

    Args:
      users: embeddings of all users.
      items: embeddings of all items.
      popularity: interactions of each item, the scores of a user about whom nothing is known.
      batch: user rows.

    Returns:
      Scores of all items.
    """
    return _popularity_where_unscorable(lambda batch: users[batch] @ items.T, popularity, batch)


def user_item_vectors(
    config: Config, prepared: ModelInputs, state: TrainState
) -> tuple[Float32[np.ndarray, "U D"], Float32[np.ndarray, "I D"]]:
    """Computes vectors of all users and items, on the host, whose inner products are the scores of `scorer`.

    Branches and their weights, popularity and EASE are columns. Where there are users about whom the model knows
    nothing, one more column holds each item's popularity; such a user's vector is 1 there and 0 elsewhere.

    Args:
      config: settings of the run.
      prepared: inputs of the model.
      state: unsharded.

    Returns:
      User vectors and item vectors.

    Raises:
      ValueError: a vector is not finite, or those of a baseline are too wide.
      InsufficientMemoryError: the vectors do not fit.
    """
    if config.model.is_trained:
        require_embedding(config, prepared.graph_inputs, "lower model.dim, or set model.late_fusion to False")
        graph_inputs = shard_graph_inputs(prepared.graph_inputs)
        users, items = parallel_embed_nodes(config)(shard_state(state.params, own=False), graph_inputs)
    else:
        fitted, _ = state.params.args  # as `baseline` makes it
        users, items = baseline_vectors(config.model.method, fitted, prepared.dataset.n_users)
    rows = np.arange(len(users), dtype=np.int32)
    step = users_per_batch(len(items))
    unscorable = np.concatenate(
        [_unscorable_users(users, items, rows[first : first + step]) for first in range(0, len(rows), step)]
    )
    users, items = jax.device_get((users, items))
    for name, vectors in (("customer", users), ("product", items)):
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise ValueError(f"the vector of {name} {row} is not finite; train with a lower train.learning_rate")
    if not unscorable.any():
        return users, items
    column = unscorable[:, None].astype(np.float32)
    popularity = np.asarray(prepared.graph_inputs.popularity, np.float32)[:, None]
    return np.concatenate([users * (1 - column), column], axis=1), np.concatenate([items, popularity], axis=1)


@jax.jit
def _unscorable_users(
    users: Float32[AnyArray, "U D"], items: Float32[AnyArray, "I D"], batch: Int32[AnyArray, "B"]
) -> Bool[Array, "B"]:
    return _has_equal_scores(users[batch] @ items.T)[:, 0]


def choose_settings(name: str, prepared: Prepared, metric: str = "ndcg@10") -> dict[str, Any]:
    """Tunes a baseline on validation.

    Args:
      name: a key of `BASELINES`.
      prepared: inputs of the training split alone, texts and ties included.
      metric: name of the metric that decides.

    Returns:
      The best settings of the grid, the first of equal ones.

    Raises:
      NotApplicableError: the tables lack what the baseline needs.
      ValueError: `prepared` includes other splits.
    """
    if prepared.splits != ("train",):
        raise ValueError(
            f"settings are to be chosen on data prepared from {', '.join(prepared.splits)}; prepare the split train "
            "alone, or what is seen gives away what validation asks"
        )
    grid = BASELINES[name].grid
    if len(grid) == 1:
        return grid[0]
    values = [evaluate_mean(prepared, baseline(name, prepared, tried), "valid")[metric] for tried in grid]
    chosen = grid[int(np.argmax(values))]
    LOG.info("%s: validation chooses %s", name, chosen)
    return chosen


def baseline(name: str, prepared: ModelInputs, settings: Mapping[str, Any]) -> jax.tree_util.Partial:
    """Fits a baseline; a user about whom it knows nothing, so that all scores are equal, is scored by popularity.

    Otherwise a comparison would show for how many users a model ranks at all, not by how much it ranks better.

    Args:
      name: a key of `BASELINES`.
      prepared: observed interactions, text features and social edges.
      settings: an entry of the baseline's grid.

    Raises:
      NotApplicableError: the tables lack what the baseline needs.
    """
    return jax.tree_util.Partial(
        _popularity_where_unscorable,
        BASELINES[name].fit(interactions_of(prepared), **settings),
        jnp.asarray(prepared.graph_inputs.popularity),
    )


def evaluate_with_baselines(
    config: Config, prepared: Prepared, state: TrainState, split: str, baselines: Sequence[str] = ()
) -> dict[str, UserMetrics]:
    """Evaluates baselines, each tuned on validation, and a trained model on the same held-out split.

    Baselines use the text embeddings of the pretrained encoder, also where the model's encoder is fine-tuned.

    Args:
      config: settings of the run.
      prepared: inputs of the model, with text embeddings of its encoder.
      state: unsharded.
      split: "valid" or "test".
      baselines: names in `BASELINES`.

    Returns:
      Metrics per user by name; the model is the last, under the name of its method or variant.

    Raises:
      ValueError: an unknown baseline.
      NotApplicableError: the tables lack what a baseline needs.
    """
    if unknown := set(baselines) - set(BASELINES):
        raise ValueError(f"baselines are {sorted(unknown)}; they must be of {', '.join(BASELINES)}")
    pretrained = alone = with_pretrained_text(prepared)
    # The texts and ties of a refitted run include the validation split, on which settings are chosen.
    if baselines and len(prepared.observed.user) != len(prepared.split.train):
        alone = prepare(config, prepared.dataset, prepared.split, initial=prepared.initial)
    found = {}
    for name in tqdm(baselines, desc="baselines", disable=not baselines):
        fitted = baseline(name, pretrained, choose_settings(name, alone))
        found[name] = evaluate_users(prepared, fitted, split)
    return found | {config.model.name: evaluate_users(prepared, scorer(config, prepared, state), split)}


def _popularity_where_unscorable(scorer: Callable[..., Any], popularity: AnyArray, users: AnyArray) -> jax.Array:
    scores = scorer(users)
    return jnp.where(_has_equal_scores(scores), popularity[None, :], scores)


def _has_equal_scores(scores: Any) -> jax.Array:
    """Bool [B, 1]: whose scores are all the same."""
    return scores.max(axis=1, keepdims=True) == scores.min(axis=1, keepdims=True)


def interactions_of(prepared: ModelInputs) -> Interactions:
    """Returns the observed interactions, text features, terms and social edges, as the baselines take them."""
    dataset, observed, graph = prepared.dataset, prepared.observed, prepared.graph_inputs.graph
    text = (np.asarray(graph.text[node_type]) for node_type in (USER, ITEM))
    ties = (column(observed.ties, name) for name in ("source", "target"))
    pairs = observed.user, observed.item, dataset.n_users, dataset.n_items
    return Interactions(*pairs, *text, *ties, age=observed.age, item_terms=prepared.text.item_terms)
