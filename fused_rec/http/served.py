"""The model that the HTTP server answers with: a finished run with its rules, and answers as JSON values."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import fused_rec as fr
from fused_rec.data.dataset import Dataset, digest
from fused_rec.evaluation.filters import Column, Refuse, Require, Rule, Side, apply
from fused_rec.evaluation.suitability import suitable
from fused_rec.explanation.catalogs import SOURCE, open_catalog
from fused_rec.http.requests import RecommendRequest, RequestError
from fused_rec.run import Run
from fused_rec.serving.recommender import FEW, find_rows, held_items, model_digest, read_served_tables
from fused_rec.serving.write_rankings import read_rules


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model, its tables and its rules are read, each time anew.

    Attributes:
      workdir: folder of the run, or a link to it.
      history: as of `fused_rec.load`.
      tables: folder of tables to serve in place of those of the training; None = those.
      rules: file of suitability rules; None = none.
      data_path: as of `fused_rec.load`.
      cache: as of `fused_rec.load`.
      language: of the sentences, as of `Run.explain`.
    """

    workdir: Path
    history: str = "all"
    tables: Path | None = None
    rules: Path | None = None
    data_path: Path | None = None
    cache: Path | None = None
    language: str = SOURCE


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A loaded run with its rules; it does not change.

    Attributes:
      run: the run.
      model: SHA-256 of the parameters.
      tables: SHA-256 of the tables.
      history: what of the tables the model uses.
      rules: suitability rules, which hold for every answer.
      rules_digest: SHA-256 of their file; None without rules.
      refused: items that the rules refuse to all users.
      loaded: time of loading, UTC.
      language: of the sentences.
    """

    run: Run
    model: str
    tables: str
    history: str
    rules: tuple[Rule, ...]
    rules_digest: str | None
    refused: frozenset[str]
    loaded: datetime.datetime
    language: str

    def recommend(self, request: RecommendRequest) -> dict[str, Any]:
        """Recommends items to users.

        Args:
          request: the users and what may be recommended.

        Returns:
          `recommendations`: for each user once, in the order of the request, `user_id` and `items`, best first, with
          `item_id`, `rank`, `score` and, where items have one, `name`.

        Raises:
          RequestError: an id is unknown (404), or the condition does not fit the items (400).
        """
        users = list(dict.fromkeys(request.users))
        self._require("user", users)
        self._require("item", list(request.items or ()))
        if request.include_seen and self._refuses_seen:
            raise RequestError(400, "include_seen is true, and the rules of the server refuse seen items; leave it out")
        settings = {"where": request.where, "items": request.items, "include_seen": request.include_seen}
        found: dict[str, list[dict[str, Any]]] = {user: [] for user in users}
        for start in range(0, len(users), FEW):  # so many are ranked without compiling for their number
            few = users[start : start + FEW]
            try:
                ranked = self.run.recommend(few, request.k, rules=self.rules, progress=False, **settings)
            except ValueError as error:  # ids and numbers have been checked: it is the condition
                raise RequestError(400, str(error)) from error
            for row in ranked.to_pylist():
                found[row.pop("user_id")].append(row)
        return self._answer(recommendations=[{"user_id": user, "items": rows} for user, rows in found.items()])

    def explain(self, user: str, item: str, k: int | None = None) -> dict[str, Any]:
        """Explains the score of an item for a user.

        Args:
          user: user id.
          item: item id.
          k: length of the list whose counterfactual set is given; None = no set.

        Returns:
          `explanation`, as of `Run.explain`, with `set` if there is a `k`; no other user is named.

        Raises:
          RequestError: an id is unknown (404), the rules refuse the item to the user (403), or the model is a baseline,
            which is not explained, or the item has no set (400).
        """
        self._require("user", [user])
        self._require("item", [item])
        asked = {"items": [item], "include_seen": not self._refuses_seen, "progress": False}
        if self.rules and not self.run.recommend([user], 1, rules=self.rules, **asked).num_rows:
            raise RequestError(403, "the rules of the server refuse this item to this user; ask for another item")
        try:
            [explanation] = self.run.explain(user, [item], language=self.language)
            if k is not None:
                given = {"rules": self.rules, "language": self.language}
                explanation["set"] = self.run.counterfactual_set(user, item, k, **given)
        except ValueError as error:  # ids have been checked: it is the model, or the item is held
            raise RequestError(400, str(error)) from error
        return self._answer(explanation=explanation)

    def similar_items(self, item: str, k: int) -> dict[str, Any]:
        """Finds similar items, without those that the rules refuse to all users.

        Args:
          item: item id.
          k: number of other items.

        Returns:
          `items`, best first, with `item_id`, `rank`, `score` and, where items have one, `name`.

        Raises:
          RequestError: the id is unknown (404), or the vectors of a baseline are too wide (400).
        """
        self._require("item", [item])
        try:
            similar = self.run.similar_items(item, k + len(self.refused)).to_pylist()
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        kept = [row for row in similar if row["item_id"] not in self.refused][:k]
        return self._answer(item_id=item, items=[row | {"rank": rank} for rank, row in enumerate(kept, start=1)])

    def warm_up(self) -> None:
        """Answers one request of each kind, so that none of a client has to wait for compilation."""
        dataset = self.run.prepared.dataset
        user, item = dataset.users["user_id"][0].as_py(), dataset.items["item_id"][0].as_py()
        self.recommend(RecommendRequest((user,), items=(item,)))
        self.recommend(RecommendRequest((user,)))
        if self.run.config.model.is_trained:
            self.run.explain(user, [item])
            self.similar_items(item, 1)

    @property
    def _refuses_seen(self) -> bool:
        return any(isinstance(rule, Refuse) and rule.held for rule in self.rules)

    def _answer(self, **values: Any) -> dict[str, Any]:
        return {"model": self.model, "tables": self.tables} | values

    def _require(self, side: Side, ids: Sequence[str]) -> None:
        """Refuses unknown ids; the message has one that the request gave."""
        try:
            find_rows(self.run.prepared.dataset, side, ids)
        except ValueError as error:
            raise RequestError(404, f"{error}; give ids of the tables that are served") from error


def load_served(source: Source) -> ServedModel:
    """Loads a model and prepares it for its first request.

    Args:
      source: where to read it.

    Returns:
      The model.

    Raises:
      ValueError: settings, rules or tables do not fit.
      OSError: a file cannot be read.
      CheckpointError: the selected checkpoint is damaged.
    """
    open_catalog(source.language)  # a fault is found before the run is loaded
    workdir = source.workdir.resolve()  # a link may change while it is read
    rules, rules_digest = read_rules(source.rules) if source.rules else ((), None)
    other = read_served_tables(workdir, source.tables) if source.tables else None
    folders = {"data_path": source.data_path, "cache": source.cache}
    run = fr.load(workdir, history=source.history, dataset=other, **folders)
    dataset = run.prepared.dataset
    served = ServedModel(
        run,
        model_digest(workdir),
        digest(dataset),
        source.history,
        rules,
        rules_digest,
        _refused_to_all(dataset, rules),
        datetime.datetime.now(datetime.UTC),
        source.language,
    )
    served.warm_up()
    return served


def _refused_to_all(dataset: Dataset, rules: Sequence[Rule]) -> frozenset[str]:
    """Returns the ids of items that rules about items alone refuse."""
    of_items = [
        rule
        for rule in rules
        if (isinstance(rule, Refuse) and rule.items)
        or (isinstance(rule, Require) and rule.left.side == "item" and not isinstance(rule.right, Column))
    ]
    tests = apply(of_items, dataset.users, dataset.items, held_items(dataset))
    passes = suitable(tests, np.array([0]), np.arange(dataset.n_items)[None])[0]
    return frozenset(dataset.items["item_id"].filter(pa.array(~passes)).to_pylist())
