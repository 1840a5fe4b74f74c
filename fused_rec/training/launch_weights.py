"""Weights of the launch prior (`fused_rec.baselines.launch`), chosen on the validation split.

New items are few, and so is their part of NDCG: forward selection by NDCG cannot see them. The prior is therefore
chosen after it and by another rule: of the weights with which NDCG@10 and recall@20, of all held-out items and of the
known ones, lose at most model.launch_cost, it takes those with the highest recall@20 of the new items.
"""

import dataclasses
import itertools
import logging
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from fused_rec.baselines.launch import TASTE, Launch, expected_popularity, launch_parts, new_items
from fused_rec.config import Config
from fused_rec.distributed import processes
from fused_rec.model.late_fusion import LateFusion, active_share
from fused_rec.training.component_weights import (
    Candidate,
    ValidationUsers,
    ndcg_of_lists,
    standardized_scores,
    user_batches,
)
from fused_rec.training.evaluate import interactions_of
from fused_rec.training.inputs import Prepared
from fused_rec.training.late_fusion import closed_form, user_rows, validation_users
from fused_rec.training.sharding import parallel_embed_nodes, shard_graph_inputs, shard_state
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)

DEPTH = 20  # the cutoff of recall
LEVELS = np.arange(-2, 6.01, 0.25)  # scores of a component of weight 1 have standard deviation 1
SLOPES = (0.0, 0.25, 0.5, 1.0, 2.0)
TASTES = (0.0, 0.25, 0.5, 1.0, 2.0)


class Quality(NamedTuple):
    """Validation metrics of one choice.

    Attributes:
      ndcg, recall: NDCG@10 and recall@20.
      known_ndcg, known_recall: the same, counting only held-out items with training interactions.
      new_recall: recall@20 that counts only the others.
    """

    ndcg: float
    recall: float
    known_ndcg: float
    known_recall: float
    new_recall: float


def select_launch(config: Config, prepared: Prepared, state: TrainState) -> Launch | None:
    """Chooses the launch prior on validation.

    Args:
      config: all settings; train.seed decides which users are ranked where there are many.
      prepared: of the training split alone, with the components of the score.
      state: the trained state, unsharded.

    Returns:
      The prior, the same in all processes; None where none finds more held-out new items.
    """
    users, items = jax.device_get(
        parallel_embed_nodes(config)(shard_state(state.params, own=False), shard_graph_inputs(prepared.graph_inputs))
    )
    found = None
    if processes.is_primary():
        on, interactions = validation_users(config, prepared), interactions_of(prepared)
        taste = None
        for part in launch_parts(interactions, Launch(level=1.0, taste=1.0)):
            if part.name == TASTE:
                rows = user_rows(closed_form(*part), prepared.graph_inputs.graph, on.users)
                taste = Candidate(part.name, {"weight": part.weight}, rows, part.factors.target, trained=False)
        share = _active_share(prepared.graph_inputs.fusion, users[on.users])
        score = Candidate("sum", {"share": share}, users[on.users], items, trained=False)
        found = best_launch(
            score, taste, new_items(interactions), expected_popularity(interactions), on, config.model.launch_cost
        )
        found = found and dataclasses.asdict(found)
    found = processes.broadcast_json(found)
    return found and Launch(**found)


def best_launch(
    score: Candidate,
    taste: Candidate | None,
    new: Bool[np.ndarray, "I"],
    popularity: Float[np.ndarray, "I"],
    on: ValidationUsers,
    cost: float,
) -> Launch | None:
    """Chooses level, slope and taste.

    Args:
      score: vectors of the score without a prior; settings["share"], float32 [V], multiplies the prior of each user.
      taste: of the component `TASTE`, whose standardized scores settings["weight"] multiplies; None: no text.
      new: the new items.
      popularity: their expected popularity.
      on: validation users.
      cost: model.launch_cost.

    Returns:
      As `select_launch`.
    """
    if not new.any() or new.all():
        return None
    choices = list(
        itertools.product(SLOPES if popularity.any() else SLOPES[:1], TASTES if taste is not None else TASTES[:1])
    )
    lists = _Lists.of(score, taste, new, popularity, on, choices)
    if not lists.n_new.any() or not lists.n_known.any():
        return None
    before = lists.quality(0, 0.0)  # without slope and taste
    best: tuple[float, float, Launch] | None = None
    for number, (slope, taste_weight) in enumerate(choices):
        for level in LEVELS:
            found = lists.quality(number, level)
            ndcg, recall, *known = (now >= (1 - cost) * then for now, then in zip(found[:4], before[:4], strict=True))
            if not all(known):
                break  # a higher level costs more
            if not (ndcg and recall):
                continue
            rank = found.new_recall, found.ndcg
            if found.new_recall > before.new_recall and (best is None or rank > best[:2]):
                best = *rank, Launch(float(level), slope, taste_weight)
    LOG.info("launch prior: %s, validation recall@20 of new items %.4f", best and best[2], best[0] if best else 0)
    return best and best[2]


@dataclasses.dataclass(frozen=True)
class _Lists:
    """The best known items of V users, and their best new items by each of C choices of slope and taste.

    A level moves all new items together, so that more than the `DEPTH` best of each are never among the first `DEPTH`.

    Attributes:
      known, of_choices: float32 [V, K] and [C, V, M], scores; -inf for items that are not ranked.
      known_hits, hits: bool of the same shapes, which of them are held out.
      n_known, n_new: [V], held-out items.
      share: float32 [V, 1], a factor of the level.
    """

    known: Float32[np.ndarray, "V K"]
    known_hits: Bool[np.ndarray, "V K"]
    of_choices: Float32[np.ndarray, "C V M"]
    hits: Bool[np.ndarray, "C V M"]
    n_known: Int[np.ndarray, "V"]
    n_new: Int[np.ndarray, "V"]
    share: Float32[np.ndarray, "V 1"]

    @classmethod
    def of(cls, score, taste, new, popularity, on: ValidationUsers, choices) -> "_Lists":
        """Ranks known and new items apart, for the arguments of `best_launch` and (slope, taste) of each choice."""
        parts: list[tuple[np.ndarray, ...]] = []
        for rows, masked, truth in user_batches(on, 2):
            scores = np.where(masked, -np.inf, score.users[rows] @ score.items.T).astype(np.float32)
            share, liking = score.settings["share"][rows, None], np.float32(0)
            if taste is not None:
                liking = (taste.settings["weight"] * standardized_scores(taste, rows))[:, new].astype(np.float32)
            of_choices = [
                _best(
                    scores[:, new]
                    + share * (np.float32(slope) * popularity[new].astype(np.float32) + np.float32(t) * liking),
                    truth[:, new],
                )
                for slope, t in choices
            ]
            stacked = (np.stack(column) for column in zip(*of_choices, strict=True))
            known = _best(scores[:, ~new], truth[:, ~new])
            parts.append((*known, *stacked, truth[:, ~new].sum(1), truth[:, new].sum(1), share))
        axes = 0, 0, 1, 1, 0, 0, 0
        return cls(*(np.concatenate(column, axis) for column, axis in zip(zip(*parts, strict=True), axes, strict=True)))

    def quality(self, choice: int, level: float) -> Quality:
        """Measures one choice of slope and taste at a level."""
        scores = np.concatenate([self.known, self.of_choices[choice] + np.float32(level) * self.share], axis=1)
        hits = np.concatenate([self.known_hits, self.hits[choice]], axis=1)
        is_new = np.broadcast_to(np.arange(hits.shape[1]) >= self.known.shape[1], hits.shape)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        hits, is_new, scores = (np.take_along_axis(x, order, axis=1) for x in (hits, is_new, scores))
        n_all = self.n_known + self.n_new
        return Quality(
            _mean(ndcg_of_lists(scores, hits, n_all), n_all),
            _mean(hits.sum(1) / np.maximum(n_all, 1), n_all),
            _mean(ndcg_of_lists(scores, hits & ~is_new, self.n_known), self.n_known),
            _mean((hits & ~is_new).sum(1) / np.maximum(self.n_known, 1), self.n_known),
            _mean((hits & is_new).sum(1) / np.maximum(self.n_new, 1), self.n_new),
        )


def _active_share(fusion: LateFusion | None, users: Float32[np.ndarray, "V D"]) -> Float32[np.ndarray, "V"]:
    """Computes `active_share` from the user vectors of the score, in which a component without a say is 0."""
    assert fusion is not None
    widths = [part.target.shape[1] for part in fusion.closed]
    blocks = np.split(users, np.cumsum([users.shape[1] - sum(widths), *widths])[:-1], axis=1)
    # All trained components include the popularity bias: they vary for the same users.
    trained = np.asarray(sum(fusion.trained.values(), np.float32(0)), np.float32)
    weights = [trained, *(np.asarray(part.weight) for part in fusion.closed)]
    return np.asarray(active_share([(w, np.asarray(block.any(1))) for w, block in zip(weights, blocks, strict=True)]))


def _best(scores: Float32[np.ndarray, "V N"], truth: Bool[np.ndarray, "V N"]) -> tuple[np.ndarray, np.ndarray]:
    """The `DEPTH` best scores of each row, and which of them are held out."""
    first = np.argpartition(-scores, min(DEPTH, scores.shape[1]) - 1, axis=1)[:, :DEPTH]
    return np.take_along_axis(scores, first, axis=1), np.take_along_axis(truth, first, axis=1)


def _mean(values: Float[np.ndarray, "V"], n_truth: Int[np.ndarray, "V"]) -> float:
    """The mean over users with a held-out item."""
    return float(values[n_truth > 0].mean()) if n_truth.any() else 0.0
