"""Baselines by name, each with the settings among which validation chooses."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.tree_util import Partial

from fused_rec.baselines import linear, neighbors
from fused_rec.baselines.factors import Evidence
from fused_rec.baselines.neighbors import Interactions, NotApplicableError


class Baseline(NamedTuple):
    """Recommender without gradient training.

    Attributes:
      fit: function (interactions, **settings) -> scorer.
      grid: settings that are tried on validation; at most 8, so that no baseline is better for having been tuned more.
      needs: what the tables must have, "text" or "ties".
    """

    fit: Callable[..., Partial]
    grid: tuple[dict[str, Any], ...]
    needs: tuple[str, ...] = ()


def _over_terms(name: str, fit: Callable[..., Partial]) -> Callable[..., Partial]:
    """Returns a method with TF-IDF rows over all terms in place of the text features of items."""

    def fitted(interactions: Interactions, **settings: Any) -> Partial:
        evidence = Evidence(interactions)
        if not evidence.has("item_terms"):
            raise NotApplicableError(
                f"{name} needs TF-IDF terms of items, and there are none; set text.tfidf_dim above 0, or leave it out "
                "for these tables, or for a variant that reads no text"
            )
        return fit(interactions._replace(item_text=evidence.term_rows, user_text=None), **settings)

    return fitted


_ALS_GRID = tuple(
    {"factors": k, "regularization": r, "alpha": a, "seed": 0}
    for k in (32, 64)
    for r in (10.0, 100.0)
    for a in (10.0, 40.0)
)
_TEXT_GCN_GRID = tuple({"num_layers": n, "user_mean": mean} for n in (1, 2, 3, 4) for mean in (True, False))
_TEXT_EASE_GRID = tuple(
    {"l2": l2, "l2_text": t, "l2_words": w} for l2 in (30.0, 300.0) for t in (30.0, 300.0) for w in (10.0, 100.0)
)
_TERM_EASE_GRID = tuple(
    {"l2": l2, "l2_text": t, "l2_words": w} for l2 in (30.0, 300.0) for t in (300.0, 1000.0) for w in (3.0, 10.0)
)
BASELINES: dict[str, Baseline] = {
    "popularity": Baseline(
        neighbors.popularity, tuple({"half_life": days} for days in (0.0, 365.0, 180.0, 90.0, 30.0))
    ),
    "item_knn": Baseline(neighbors.item_knn, neighbors.NEIGHBOR_GRID),
    "user_knn": Baseline(neighbors.user_knn, neighbors.NEIGHBOR_GRID),
    "friends_mean": Baseline(neighbors.friends_mean, ({},), needs=("ties",)),
    "text_mean": Baseline(neighbors.text_mean, tuple({"own": w} for w in (0.0, 0.25, 0.5, 1.0, 2.0)), needs=("text",)),
    "text_gcn": Baseline(neighbors.text_gcn, _TEXT_GCN_GRID, needs=("text",)),
    "als": Baseline(neighbors.als, _ALS_GRID),
    "gf_cf": Baseline(linear.gf_cf, tuple({"rank": k, "alpha": a} for k in (16, 128) for a in (0.1, 0.3, 1.0, 3.0))),
    "ease": Baseline(linear.ease, tuple({"l2": l2} for l2 in (10.0, 30.0, 100.0, 300.0, 1000.0))),
    "text_ease": Baseline(linear.text_ease, _TEXT_EASE_GRID, needs=("text",)),
    "tfidf_mean": Baseline(_over_terms("tfidf_mean", neighbors.text_mean), ({"own": 0.0},), needs=("text",)),
    "term_ease": Baseline(_over_terms("term_ease", linear.text_ease), _TERM_EASE_GRID, needs=("text",)),
}
