"""A market small enough to reason about, shared by the tests of the model and of its training.

7 users, 6 items and 2 sectors. User 6 and item 5 have neither words nor edges; sector 1 has no edge.
"""

import numpy as np
from scipy.sparse import csr_matrix

from fused_rec.baselines.factors import COMPONENTS, Evidence
from fused_rec.baselines.launch import Launch, launch_parts
from fused_rec.baselines.neighbors import Interactions
from fused_rec.graph.build import bidirectional_edges, text_knn_edges
from fused_rec.graph.device_graph import DeviceGraph, device_graph
from fused_rec.graph.hetero import HostGraph, hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Edges, Relation
from fused_rec.model.late_fusion import ClosedForm, LateFusion
from fused_rec.training.late_fusion import closed_form as closed_form_of

COUNTS = {USER: 7, ITEM: 6, "sector": 2}
WIDTH = 5  # of a text vector
TRUSTS = Relation(USER, "trusts", USER)
SIMILAR = Relation(ITEM, "similar_text", ITEM)
IN_SECTOR = Relation(ITEM, "in_sector", "sector"), Relation("sector", "sector_of", ITEM)

# user    0  0  0  1  1  2  2  3  3  3  4  5
HOLDER = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 5], np.int32)
HELD = np.array([0, 1, 2, 0, 3, 1, 4, 2, 3, 4, 0, 4], np.int32)


def words(seed: int = 0) -> np.ndarray:
    """float32 [15, 5]: unit rows of users and items; zero for user 6, item 5 and the sectors."""
    drawn = np.random.default_rng(seed).normal(size=(15, WIDTH)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn[[6, 12, 13, 14]] = 0
    return drawn


def relations(text: np.ndarray) -> dict[Relation, Edges]:
    """Holdings and sectors both ways, three ties, the two items of nearest words."""
    return {
        **bidirectional_edges(INTERACTS, INTERACTED_BY, HOLDER, HELD, COUNTS),
        TRUSTS: Edges(np.array([1, 2, 0]), np.array([0, 0, 4]), np.array([0.5, 0.5, 1], np.float32)),
        SIMILAR: text_knn_edges(text[7:13], 2),
        **bidirectional_edges(*IN_SECTOR, np.array([0, 1, 3]), np.array([0, 0, 0]), COUNTS),
    }


def graph(text: np.ndarray | None = None) -> HostGraph:
    """The market as a graph; `text` takes the place of its words, but not of the relation made of them."""
    return hetero_graph(COUNTS, relations(words()), words() if text is None else text)


def whole(text: np.ndarray | None = None) -> DeviceGraph:
    """`graph` as the model reads it."""
    return device_graph(graph(text))


def evidence() -> Evidence:
    """Interactions, text and ties as closed-form recommenders take them."""
    text = words()
    ties = np.array([0, 0, 4]), np.array([1, 2, 0])
    pairs = HOLDER, HELD, COUNTS[USER], COUNTS[ITEM]
    terms = csr_matrix(np.abs(text[7:13]))
    ages = np.arange(12, dtype=np.float32)
    return Evidence(Interactions(*pairs, text[:7], text[7:13], *ties, age=ages, item_terms=terms))


SETTINGS = {
    "ease": {"l2": 1.0},
    "text_ease": {"l2": 1.0, "l2_text": 2.0, "l2_words": 1.0},
    "term_ease": {"l2": 2.0, "l2_text": 1.0, "l2_words": 1.5},
    "gf_cf": {"rank": 2, "alpha": 0.3},
    "item_knn": {"num_neighbors": 3, "shrink": 1.0},
    "popularity": {"half_life": 0.0},
    "recent_popularity": {"half_life": 3.0},
    "social_ease": {"l2": 1.0, "weight": 2.0},
}


def closed_form(name: str, weight: float) -> ClosedForm:
    """A closed-form component of this market."""
    made = COMPONENTS[name].make(evidence(), **SETTINGS.get(name, {}))
    return closed_form_of(name, weight, made, COMPONENTS[name].user_source)


def launch_prior() -> tuple[ClosedForm, ...]:
    """A launch prior of this market when items 3 to 5 were new."""
    before = HELD < 3
    data = evidence().interactions._replace(
        user=HOLDER[before], item=HELD[before], age=np.arange(before.sum(), dtype=np.float32)
    )
    parts = launch_parts(data, Launch(level=1.0, slope=0.5, taste=0.7))
    return tuple(closed_form_of(*part) for part in parts)


def late_fusion() -> LateFusion:
    """Every component, with different weights."""
    weights = {"model": 1.0, "graph_branch": 0.3, "text_branch": 0.2}
    trained = {name: np.array(weight, np.float32) for name, weight in weights.items()}
    closed = tuple(closed_form(name, 0.4 + n / 10) for n, name in enumerate(COMPONENTS))
    return LateFusion(trained, closed + launch_prior())
