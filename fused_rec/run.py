"""A finished run as an object: recommendations, similar nodes, scores, explanations, vectors, evaluation and export.

U users, I items, D columns of a vector, P pairs.
"""

import dataclasses
import functools
import logging
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64

from fused_rec.config import Config
from fused_rec.data.dataset import Dataset
from fused_rec.data.io.tables import with_interactions
from fused_rec.distributed.devices import computes
from fused_rec.evaluation.filters import Refuse, Require, Rule, Side
from fused_rec.evaluation.item_sets import UserItemSets
from fused_rec.evaluation.ranking import CandidateFilter, RankingSpec, mean
from fused_rec.evaluation.suitability import suitable
from fused_rec.evaluation.top_k import random_order
from fused_rec.explanation.catalogs import SOURCE, open_catalog
from fused_rec.explanation.counterfactual import CounterfactualEffect, counterfactual_effect, counterfactual_sets
from fused_rec.explanation.explained_model import ExplainedModel, explained_model
from fused_rec.explanation.reasons import Content, add_words, record, set_record
from fused_rec.explanation.token_attribution import Attributor, attributor
from fused_rec.serving import export_bundle, recommender
from fused_rec.serving.recommender import (
    FEW,
    as_pairs,
    as_texts,
    candidate_filter,
    candidate_items,
    find_rows,
    held_items,
    ranking_table,
    user_rows,
)
from fused_rec.serving.update import with_dataset
from fused_rec.serving.vectors import ScoreCorrelation, best_items, pair_scores
from fused_rec.serving.write_rankings import Rules, read_rules
from fused_rec.training.baseline_runs import fitted_state
from fused_rec.training.evaluate import evaluate_with_baselines, scorer, user_item_vectors
from fused_rec.training.inputs import ModelInputs, Prepared
from fused_rec.training.late_fusion import selection_of
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """Finished run, ready to rank. It does not change, and keeps what it has computed once.

    Attributes:
      workdir: folder of the run.
      config: settings of the training.
      prepared: tables, and the graph of what the model uses of them.
      state: parameters of the selected step.
      results: content of `results.json`, with the metrics of each split.

    Example:
      run = fr.load("runs/first")
      run.results["test"]["ndcg@10"]
    """

    workdir: Path
    config: Config
    prepared: ModelInputs
    state: TrainState
    results: Mapping[str, Any]

    def __repr__(self) -> str:
        metric = self.config.train.metric
        measured = ", ".join(f"{split} {metric} {self.results[split][metric]:.4f}" for split in ("valid", "test"))
        return f"Run({str(self.workdir)!r}: {self.prepared.dataset.name}, {self.config.model.name}, {measured})"

    @computes
    def recommend(
        self,
        users: Any = None,
        k: int = 10,
        *,
        rules: Rules | tuple[Rule, ...] | None = None,
        include_seen: bool = False,
        items: Any = None,
        where: str | None = None,
        progress: bool = True,
    ) -> pa.Table:
        """Recommends the k best items to each user.

        Args:
          users: user ids, as text or integers, in a list, an array or a column of a data frame; None = all users.
          k: items per user.
          rules: suitability rules (`docs/SUITABILITY.md`): a JSON file, its content, the list of rules, or rules
            that `fused_rec.evaluation.filters.parse` returned.
          include_seen: also recommend items that the user has interacted with.
          items: ids of the items that may be recommended, as `users`; None = all items.
          where: condition on columns of the items that may be recommended, such as `"type == 'fund'"`: comparisons
            (==, !=, <, <=, >, >=, in [...], not in [...]) joined by and, or and not. An item with a missing value in
            a comparison does not match.
          progress: show a progress bar.

        Returns:
          A table with the columns user_id, rank (from 1), item_id, score and, if items have one, name. A user with
          fewer than k candidates has fewer rows.

        Raises:
          ValueError: an id is unknown, empty or of another type, or rules or condition do not fit the tables.

        Example:
          run.recommend(["C0001", "C0002"], k=5).to_pandas()
          run.recommend(["C0001"], where="sector == 'energy' and risk_band <= 3", progress=False)
          run.recommend(rules=[{"name": "closed", "refuse": {"items": ["P007"]}}], items=["P003", "P007", "P012"])
        """
        _require_k(k)
        dataset = self.prepared.dataset
        among = candidate_items(dataset, items, where)
        rows = user_rows(dataset, users)
        given = self._candidates(_as_rules(rules), include_seen)
        candidates = dataclasses.replace(given, items=among)
        few = len(rows) <= FEW and self.config.model.is_trained
        if few and (found := self._best(rows, k, candidates)):
            return ranking_table(dataset, rows, *found)
        recommender.require_table(dataset, len(rows), k)
        chunks = recommender.rank_chunks(self._scorer, dataset, candidates, rows, k, progress=progress)
        return pa.concat_tables([chunk.table for chunk in chunks])

    def _best(
        self, rows: Int64[np.ndarray, "B"], k: int, candidates: CandidateFilter
    ) -> tuple[Int32[np.ndarray, "B k"], Float32[np.ndarray, "B k"]] | None:
        """Ranks a few users on the host; None where `rank` has to say what is wrong."""
        users, vectors, popularity = self._embedded
        scores = users[rows] @ vectors.T
        if not np.isfinite(scores).all():
            return None
        equal = scores.max(1, keepdims=True) == scores.min(1, keepdims=True)
        scores = np.where(equal, popularity, scores)  # as `scores_of`
        eligible = np.full(scores.shape, candidates.items is None)
        if candidates.items is not None:
            eligible[:, candidates.items] = True
        for user, row in enumerate(rows):
            for test in candidates.tests:  # one user at a time: each shape would be compiled
                eligible[user] &= np.asarray(test(jnp.asarray(rows[user : user + 1], jnp.int32)))[0]
            for excluded in candidates.excluded:
                eligible[user, excluded.items[slice(*excluded.indptr[row : row + 2])]] = False
        return best_items(scores, eligible, self._places, min(k, len(vectors)))

    @computes
    def similar_items(self, item: Any, k: int = 10) -> pa.Table:
        """Finds the items whose scores are most like an item's.

        The score of two items is the cosine of their scores over all users, each score less the user's mean over all
        items: 1 where the same users like both as much, 0 where they have nothing in common. It depends on the scores
        alone, and not on how their vectors are scaled.

        Args:
          item: item id, as text or integer.
          k: number of other items.

        Returns:
          A table with the columns item_id, rank (from 1), score and, if items have one, name.

        Raises:
          ValueError: the id is unknown, empty or of another type.

        Example:
          run.similar_items("P007", k=3).to_pandas()
        """
        return self._similar("item", item, k)

    @computes
    def similar_users(self, user: Any, k: int = 10) -> pa.Table:
        """Finds the users whose scores are most like a user's.

        The score of two users is the correlation of their scores over all items, of those they hold too.

        Args:
          user: user id, as text or integer.
          k: number of other users.

        Returns:
          A table with the columns user_id, rank (from 1) and score.

        Raises:
          ValueError: the id is unknown, empty or of another type.

        Example:
          run.similar_users("C0001", k=3).to_pandas()
        """
        return self._similar("user", user, k)

    def _similar(self, side: Side, given: Any, k: int) -> pa.Table:
        _require_k(k)
        dataset = self.prepared.dataset
        rows, scores = self._correlation.nearest(side, self._row(side, given), k)
        ids = (dataset.users if side == "user" else dataset.items)[f"{side}_id"].combine_chunks().take(pa.array(rows))
        ranks = pa.array(np.arange(1, len(rows) + 1), pa.int32())
        table = pa.table({f"{side}_id": ids, "rank": ranks, "score": pa.array(scores, pa.float32())})
        if side == "user" or "name" not in dataset.items.column_names:
            return table
        return table.append_column("name", dataset.items["name"].combine_chunks().take(pa.array(rows)))

    @computes
    def score(self, pairs: Any) -> Float32[np.ndarray, "P"]:
        """Scores pairs of users and items, whether the user has interacted with the item or not.

        Args:
          pairs: a list of (user id, item id); or a tuple of two columns, user ids and item ids; or a data frame or
            Arrow table with the columns user_id and item_id.

        Returns:
          Float32 [P]: the scores, in the order of the pairs. Those of one user can be compared, as in a ranking.

        Raises:
          ValueError: an id is unknown, empty or of another type, or the columns differ in length.

        Example:
          run.score([("C0001", "P007"), ("C0001", "P012")])
          run.score((["C0001", "C0002"], ["P007", "P007"]))
        """
        users, items = as_pairs(pairs)
        dataset = self.prepared.dataset
        return pair_scores(*self._vectors, find_rows(dataset, "user", users), find_rows(dataset, "item", items))

    @property
    def user_vectors(self) -> Float32[np.ndarray, "U D"]:
        """Vectors of all users, in the order of `run.prepared.dataset.users`.

        `run.user_vectors @ run.item_vectors.T` are the scores. A part of the score of every component of late fusion
        has columns of its own (`docs/MODEL.md`).

        Example:
          run.user_vectors[0] @ run.item_vectors.T
        """
        return self._vectors[0]

    @property
    def item_vectors(self) -> Float32[np.ndarray, "I D"]:
        """Vectors of all items, in the order of `run.prepared.dataset.items`; see `user_vectors`.

        Example:
          run.item_vectors.shape
        """
        return self._vectors[1]

    @computes
    def explain(
        self,
        user: Any,
        items: Any = None,
        k: int = 5,
        *,
        language: str | os.PathLike[str] = SOURCE,
        sets: bool = False,
        words: bool = False,
        user_ids: bool = False,
    ) -> list[dict[str, Any]]:
        """Explains scores by an exact decomposition into contributions (`docs/EXPLANATIONS.md`).

        Args:
          user: user id, as text or integer.
          items: item ids, as text or integers; None = the k items that are recommended.
          k: number of recommended items to explain, without `items`.
          language: of the sentences: "en", "de", "fr", or the path of a compiled catalog (.mo).
          sets: also give the counterfactual set of each item, of the k best.
          words: also give the words of the user's and the item's texts with the largest attributions.
          user_ids: name other users in `parts` by their ids, for readers who may see them.

        Returns:
          One dictionary per item with `user_id`, `item_id`, `score`, `parts` (contributions that sum to the score,
          those without which it would change most first) and `reasons` (a code and a sentence each, strongest first);
          with `sets` also `set`, as of `counterfactual_set`; with `words` also `words` (`side`, `word`, `value`).

        Raises:
          ValueError: an id is unknown, empty or of another type, or the language is not known; or the
            model uses no text, and `words` are asked for.

        Example:
          [row] = run.explain("C0001", k=1)
          [reason["text"] for reason in row["reasons"]]
        """
        _require_k(k)
        dataset = self.prepared.dataset
        content = Content(open_catalog(language), user_ids, k if sets else 0, candidate_filter(dataset))
        row = self._row("user", user)
        wanted = self.recommend([user], k, progress=False)["item_id"] if items is None else items
        rows = find_rows(dataset, "item", as_texts(wanted, "items"))
        if not len(rows):
            return []
        found = record(self._explained, row, rows.tolist(), content)
        if words:
            add_words(found, self._attributor, [(row, item) for item in rows.tolist()])
        return found

    @computes
    def counterfactual(self, user: Any, item: Any, without: Any) -> CounterfactualEffect:
        """Recomputes an item's score and rank as if one interaction of the user had not happened.

        Args:
          user: user id, as text or integer.
          item: id of the item whose score and rank are compared.
          without: id of the item whose interaction with the user is removed from the graph; parameters stay.

        Returns:
          Score and rank (from 1, among unseen items) before and after.

        Raises:
          ValueError: an id is unknown, or the interaction is not in the model's graph.

        Example:
          [best] = run.explain("C0001", k=1)
          held = [part["source"] for part in best["parts"] if part["kind"] == "interaction" and part["source"]]
          effect = run.counterfactual("C0001", best["item_id"], without=held[0])
          effect.rank, effect.rank_after
        """
        dataset = self.prepared.dataset
        row, of, removed = self._row("user", user), self._row("item", item), self._row("item", without)
        candidates = suitable(candidate_filter(dataset), np.array([row]), np.arange(dataset.n_items)[None])[0]
        candidates[of] = True
        return counterfactual_effect(self.config, self.state.params, self.prepared, row, of, removed, candidates)

    @computes
    def counterfactual_set(
        self,
        user: Any,
        item: Any,
        k: int = 10,
        *,
        rules: Rules | tuple[Rule, ...] | None = None,
        language: str | os.PathLike[str] = SOURCE,
    ) -> dict[str, Any] | None:
        """Finds the smallest set of a user's sources without which an item leaves the k best, or enters them.

        Sources are interactions, reviews, social edges and users with similar text. The ranking without them is
        recomputed. A review is text of the user and of the item, and is removed apart from the interaction.

        Args:
          user: user id, as text or integer.
          item: id of an item that the user may be recommended.
          k: length of the list.
          rules: as of `recommend`.
          language: of the sentence, as of `explain`.

        Returns:
          `sources` (`kind` and `item_id` of each; None where it is another user), `smallest` (False where too many sets
          would have had to be tested, and sources were removed one by one), `rank`, `rank_after`, `entering` and
          `leaving` (ids of the items that enter and leave the list, one of them this item; `entering` is None if none
          is left) and `text`, a sentence. None if the item stays where it is without any source.

        Raises:
          ValueError: an id is unknown, the item is no candidate, or the model is a baseline.

        Example:
          [best] = run.explain("C0001", k=1)
          found = run.counterfactual_set("C0001", best["item_id"], k=1)
          tenth = run.recommend(["C0001"], k=10)["item_id"][9]
          found = run.counterfactual_set("C0001", tenth.as_py(), k=3)  # what keeps it from the best three
        """
        _require_k(k)
        dataset = self.prepared.dataset
        row, of = self._row("user", user), self._row("item", item)
        candidates = self._candidates(_as_rules(rules), False)
        eligible = suitable(candidates, np.array([row]), np.arange(dataset.n_items)[None])[0]
        if not eligible[of]:
            raise ValueError(f"item {item} is no candidate of user {user}: it is held or refused; give another item")
        [found] = counterfactual_sets(self._explained.leave_one_out, self.prepared, row, [of], k, eligible)
        return found and set_record(dataset, found, open_catalog(language))

    @computes
    def evaluate(self, split: str = "valid", baselines: Sequence[str] = ()) -> dict[str, dict[str, float]]:
        """Evaluates the run, and optional baselines, on a held-out split by full-catalogue ranking.

        The tables of the training are prepared again without held-out rows, whatever history and tables the run was
        opened with, and the model is the one that `run.results` has the metrics of.

        Args:
          split: "valid" or "test". Use "test" once, after all choices are made.
          baselines: names in `fused_rec.baselines.registry.BASELINES`; each is tuned on the validation split.

        Returns:
          Metrics, means over users, by name of the recommender; the run's own under the name of its method or variant.

        Raises:
          ValueError: an unknown split or baseline.
          NotApplicableError: the tables lack what a baseline needs.

        Example:
          metrics = run.evaluate("test", baselines=["popularity", "ease"])
          metrics["fused"]["ndcg@10"] - metrics["ease"]["ndcg@10"]
        """
        if split not in ("valid", "test"):
            raise ValueError(f"split is {split!r}; it must be valid or test")
        folders = {"data_path": self.config.data.path or None, "cache": self.config.text.cache}
        measured = recommender.load_measured(self.workdir, split, **folders)
        found = evaluate_with_baselines(*measured, split, baselines)
        return {name: mean(per_user) for name, per_user in found.items()}

    @computes
    def update(self, interactions: Any) -> "Run":
        """Folds new interactions of known users and items in, without reading tables or encoding texts again.

        The result equals `fr.load(workdir, dataset=...)` with these rows at the end of the interactions: in the graph,
        popularity, the closed-form components of late fusion and the exclusion of seen items. Of rows with the same
        pair, old ones among them, the earliest is kept. Parameters and text features stay; new users, items, texts and
        ties are served by `fr.load(workdir, dataset=...)`.

        Args:
          interactions: a data frame, Arrow table or dictionary of columns: user_id, item_id and, as in the tables,
            timestamp, value.

        Returns:
          A run with them; this one stays as it is.

        Raises:
          DataError: lists all faults, unknown ids and bad times among them, with row and remedy.
          TypeError: `interactions` is no table.
          ValueError: the run was opened with the history "train".

        Example:
          bought = {"user_id": ["C0001", "C0002"], "item_id": ["P007", "P012"]}
          today = run.update(bought)
          today.recommend(["C0001"], k=5)
        """
        if isinstance(self.prepared, Prepared):
            raise ValueError('history is "train", which new rows do not belong to; open the run by fr.load(workdir)')
        dataset = with_interactions(self.prepared.dataset, interactions, self.config.data.min_value)
        if (untimed := _untimed(dataset)) > _untimed(self.prepared.dataset) == 0:
            LOG.warning("%d new interactions have no timestamp, and all others have one; give the column", untimed)
        if not self.config.model.is_trained:
            inputs = with_dataset(self.config, self.prepared, dataset, None)
            state = fitted_state(self.config, inputs, self.results["settings"])
            return dataclasses.replace(self, prepared=inputs, state=state)
        inputs = with_dataset(self.config, self.prepared, dataset, selection_of(self.results))
        return dataclasses.replace(self, prepared=inputs)

    @computes
    def save(self, out: str | os.PathLike[str], *, faiss: bool = False) -> Path:
        """Saves the run to a folder that is readable without this package, in the layout of the Hugging Face Hub.

        The folder holds user and item vectors whose inner products are the scores, a compiled scoring program,
        parameters, settings and a model card (`docs/INTEROP.md`).

        Args:
          out: a new or empty folder.
          faiss: also write a Faiss index of the items; needs the extra `faiss`.

        Returns:
          The folder.

        Raises:
          FileExistsError: `out` is a file or a folder that is not empty.
          ImportError: `faiss` is asked for but not installed.
          ValueError: a vector is not finite.
          SaveError: the folder cannot be written.

        Example:
          run.save("exported/first")
        """
        export_bundle.export_bundle(Path(out), *self.model, self.results, faiss=faiss)
        return Path(out)

    @property
    def model(self) -> tuple[Config, ModelInputs, TrainState]:
        """Settings, inputs and state, as the functions of `fused_rec.training.evaluate` take them.

        Example:
          config, inputs, state = run.model
        """
        return self.config, self.prepared, self.state

    @functools.cached_property
    @computes
    def _scorer(self) -> jax.tree_util.Partial:
        return scorer(*self.model)

    @functools.cached_property
    def _embedded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings of users and items and the items' popularity, on the host."""
        users, items, popularity = self._scorer.args
        return np.asarray(users), np.asarray(items), np.asarray(popularity, np.float32)

    @functools.cached_property
    def _held(self) -> UserItemSets:
        return held_items(self.prepared.dataset)

    @functools.cached_property
    def _places(self) -> Int32[np.ndarray, "I"]:
        n_items = self.prepared.dataset.n_items
        return np.asarray(random_order(n_items, RankingSpec.seed).places(n_items))

    @functools.cached_property
    def _candidates(self) -> Callable[[tuple[Rule, ...], bool], CandidateFilter]:
        """Compiles rules for (rules, include_seen), and keeps the last ones: a server asks with the same each time."""

        @functools.lru_cache(maxsize=4)
        def compiled(rules: tuple[Rule, ...], include_seen: bool) -> CandidateFilter:
            return candidate_filter(self.prepared.dataset, rules, include_seen=include_seen, held=self._held)

        return compiled

    @functools.cached_property
    @computes
    def _explained(self) -> ExplainedModel:
        return explained_model(self.config, self.state.params, self.prepared)

    @functools.cached_property
    @computes
    def _attributor(self) -> Attributor:
        return attributor(self.config, self.state.params, self.prepared)

    @functools.cached_property
    @computes
    def _vectors(self) -> tuple[Float32[np.ndarray, "U D"], Float32[np.ndarray, "I D"]]:
        return user_item_vectors(*self.model)

    @functools.cached_property
    def _correlation(self) -> ScoreCorrelation:
        return ScoreCorrelation(*self._vectors)

    def _row(self, side: Side, given: Any) -> int:
        return int(find_rows(self.prepared.dataset, side, as_texts([given], f"{side}s"))[0])


def _as_rules(rules: Rules | tuple[Rule, ...] | None) -> tuple[Rule, ...]:
    if rules is None:
        return ()
    if isinstance(rules, tuple) and (parsed := tuple(rule for rule in rules if isinstance(rule, Refuse | Require))):
        return parsed
    return read_rules(rules)[0]  # pyright: ignore[reportArgumentType]


def _untimed(dataset: Dataset) -> int:
    """Counts the interactions without a time, in tables that have times."""
    rows = dataset.interactions
    return rows["timestamp"].null_count if "timestamp" in rows.column_names else 0


def _require_k(k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, numbers.Integral):
        raise ValueError(f"k is {k!r} of type {type(k).__name__}; it must be an integer of at least 1")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
