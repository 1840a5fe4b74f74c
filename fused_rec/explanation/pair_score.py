"""The score of a user and an item as a function of the text features of both, exactly and without the whole graph.

Propagation is linear (`fused_rec.model.propagation`), and the text of a node s enters its input, its gates and its text
gates alone. Another text changes row s of h^0, and in every later layer row s by what its gates let through:

    h'^l - h^l = sum_{s, j <= l} C_s^{j,l} r_s^j,    C_s^{j,l} = M_l ... M_{j+1} e_s

The columns C depend on the graph alone; the rows r_s^j [K] are functions of the two texts and of what node s receives.
A score and its derivative thus take a product with the items' embeddings, where the graph model sums over all edges.

I items, K columns of an embedding, L layers, D text features. Of two nodes the first is the user.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from fused_rec.config import Config, ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.branches import Branch, branches
from fused_rec.graph.schema import INTERACTS, ITEM, USER
from fused_rec.model.late_fusion import GRAPH_BRANCH, MIN_VARIANCE, MODEL, TEXT_BRANCH
from fused_rec.model.text_fusion import Gate, TextInput, TextMLP
from fused_rec.training.train_step import BRANCHES, GraphInputs

SIDES = (USER, ITEM)
POINTS = 5  # that are scored together: each number is a compilation
KEPT = 1 << 28  # bytes of the columns of nodes that are kept
TINY = 1e-12  # as in `fused_rec.model.losses.unit`


class _Node(NamedTuple):
    """Of a node in a branch, columns [n, l + 1] by layer l and node type, and what gates and text gates weigh."""

    columns: list[dict[str, np.ndarray]]
    items: np.ndarray  # [L + 1, I], columns of the items in the output
    received: dict[str, dict[str, Any]]  # by relation: messages [L, K], gates [L], standardized log degree


class Pair(NamedTuple):
    """A pair, for `PairScorer.scores_and_slopes`: arrays of each branch, the item, and the rest of the score."""

    branches: list[dict[str, Any]]
    text: Float32[np.ndarray, "2 D"]
    item: int
    rest: float


class PairScorer:
    """Scores of pairs as functions of their text features; a node without text stays without, others keep some.

    Args:
      config: settings of the run, with `model.local_text`.
      params: parameters, not sharded.
      graph_inputs: of the whole graph, on the host.
    """

    def __init__(self, config: Config, params: PyTree, graph_inputs: GraphInputs):
        graph, fusion = graph_inputs.graph, graph_inputs.fusion
        self.graph, self.branches = graph, branches(config, params, graph)
        self.configs = tuple(branch.config for branch in self.branches)
        count = np.diff(np.asarray(graph.adjacencies[INTERACTS].receiver_start)).astype(np.float32)
        factor = config.model.popularity_weight * config.train.temperature
        shared = {
            "branches": [
                {"params": params.get(name, {}), "items": branch.out[ITEM]}
                for name, branch in zip(BRANCHES, self.branches, strict=False)
            ],
            "share": count / (count + 1),
            "bias": factor * np.log1p(np.asarray(graph_inputs.popularity)),
            "trained": None if fusion is None else dict(fusion.trained),
            "by_text": [(part.weight, part.target) for part in fusion.closed if part.user_source == "text"]
            if fusion
            else [],
        }
        self.shared: Any = jax.device_put(shared)
        width = sum(len(branch.layers) ** 2 for branch in self.branches)
        nodes = sum(size for _, size in graph.node_types)
        self.node = functools.lru_cache(maxsize=max(2, KEPT // (2 * nodes * width)))(self._node)

    def pair(self, user: int, item: int, score: float) -> Pair:
        """Prepares a pair of a user and an item row with their score."""
        rows = (user, item)
        found = [self._branch_pair(place, rows) for place in range(len(self.branches))]
        text = np.stack([np.asarray(self.graph.text[side])[row] for side, row in zip(SIDES, rows, strict=True)])
        pair = Pair(found, text, item, 0.0)
        [own], _ = self.scores_and_slopes(pair, text[None])
        return pair._replace(rest=score - float(own))

    def scores_and_slopes(
        self, pair: Pair, text: Float32[np.ndarray, "n 2 D"]
    ) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "n 2 D"]]:
        """Computes the score with other text features, and its derivatives.

        Args:
          pair: of `pair`.
          text: n times the features of both nodes.

        Returns:
          The scores and their gradients.
        """
        padded = np.pad(text, ((0, -len(text) % POINTS), (0, 0), (0, 0)), mode="edge")
        scores, slopes = jax.device_get(_scores_and_slopes(self.configs, self.shared, pair, padded))
        return scores[: len(text)], slopes[: len(text)]

    def _node(self, place: int, side: str, row: int) -> _Node:
        """Propagates the unit column of a node."""
        branch, graph = self.branches[place], self.branches[place].graph
        columns: list[dict[str, np.ndarray]] = []
        for level in range(len(branch.layers)):
            found: dict[str, np.ndarray] = {}
            for relation, matrix in branch.matrices.items() if level else ():
                if relation.source in columns[-1]:
                    gate = np.asarray(branch.weights.gate[relation])[level - 1][:, None]
                    message = gate * (matrix @ columns[-1][relation.source])
                    found[relation.target] = found.get(relation.target, 0) + message
            found.setdefault(side, np.zeros((graph.count(side), level), np.float32))
            found = {kind: np.pad(column, ((0, 0), (0, 1))) for kind, column in found.items()}
            found[side][row, level] = 1
            columns.append(found)
        received = {}
        for relation, matrix in branch.matrices.items():
            if relation.target == side:
                messages = [(matrix[[row]] @ layer[relation.source])[0] for layer in branch.layers[:-1]]
                gate = np.asarray(branch.weights.gate[relation])[:, row]
                degree = np.asarray(graph.adjacencies[relation].degrees.log_in_degree)[row]
                shape = len(messages), branch.config.dim
                received[str(relation)] = {
                    "messages": np.array(messages, np.float32).reshape(shape),
                    "gate": gate,
                    "degree": degree,
                }
        return _Node(columns, self._outputs(branch, columns, ITEM, slice(None)), received)

    def _outputs(self, branch: Branch, columns: list[dict[str, np.ndarray]], side: str, rows: Any) -> np.ndarray:
        """The columns [L + 1, n] of these rows in the output."""
        out = np.zeros((len(columns), len(np.arange(branch.graph.count(side))[rows])), np.float32)
        for weight, layer in zip(np.asarray(branch.weights.layer_weights), columns, strict=True):
            if side in layer:
                own = layer[side][rows]
                out[: own.shape[1]] += weight * own.T
        return out

    def _branch_pair(self, place: int, rows: tuple[int, int]) -> dict[str, Any]:
        """The arrays of a branch for a pair."""
        branch = self.branches[place]
        nodes = [self.node(place, side, row) for side, row in zip(SIDES, rows, strict=True)]
        height = len(branch.layers)
        received: list[dict[str, Any]] = []
        for node, side, row in zip(nodes, SIDES, rows, strict=True):
            found = {}
            for relation, matrix in branch.matrices.items():
                if relation.target == side:
                    # By how much a row r_s^j changes the messages of a layer.
                    change = np.zeros((height - 1, 2, height), np.float32)
                    for level in range(height - 1):
                        for number, other in enumerate(nodes):
                            if relation.source in (column := other.columns[level]):
                                change[level, number, : level + 1] = (matrix[[row]] @ column[relation.source])[0]
                    found[str(relation)] = node.received[str(relation)] | {"change": change}
            received.append(found)
        own = slice(rows[0], rows[0] + 1)
        return {
            "received": received,
            "items": np.stack([node.items for node in nodes]),
            "user": branch.out[USER][rows[0]],
            "user_change": np.stack([self._outputs(branch, node.columns, USER, own)[:, 0] for node in nodes]),
        }


@functools.partial(jax.jit, static_argnums=0)
def _scores_and_slopes(
    configs: tuple[ModelConfig, ...], shared: dict[str, Any], pair: Pair, text: Float32[AnyArray, "n 2 D"]
) -> tuple[Float32[Array, "n"], Float32[Array, "n 2 D"]]:
    return jax.lax.map(jax.value_and_grad(lambda own: _score(configs, shared, pair, own)), jnp.asarray(text))


def _score(
    configs: tuple[ModelConfig, ...], shared: dict[str, Any], pair: Pair, text: Float32[Array, "2 D"]
) -> Float32[Array, ""]:
    parts = [
        _branch_scores(config, own, arrays, jnp.asarray(pair.text), text)
        for config, own, arrays in zip(configs, shared["branches"], pair.branches, strict=True)
    ]
    joined = parts[0] if len(parts) == 1 else shared["share"] * parts[0] + (1 - shared["share"]) * parts[1]
    if shared["trained"] is None:
        return joined[pair.item] + shared["bias"][pair.item] + pair.rest
    names = (MODEL, GRAPH_BRANCH, TEXT_BRANCH)
    by_name = dict(zip(names, (joined, *parts), strict=False))
    found = [(weight, by_name[name] + shared["bias"]) for name, weight in shared["trained"].items()]
    found += [(weight, target @ text[0]) for weight, target in shared["by_text"]]
    return sum((weight * _standardized(scores)[pair.item] for weight, scores in found), jnp.asarray(pair.rest))


def _standardized(scores: Float32[Array, "I"]) -> Float32[Array, "I"]:
    """Divides scores by their standard deviation; zero where all are equal but for rounding."""
    variance = scores.var()
    varies = variance > MIN_VARIANCE * (scores * scores).mean()
    return jnp.where(varies, scores / jnp.sqrt(jnp.where(varies, variance, 1)), 0)


def _branch_scores(
    config: ModelConfig, shared: dict[str, Any], pair: dict[str, Any], before: Array, text: Array
) -> Float32[Array, "I"]:
    """Scores of all items in one branch with other texts of the user and the item."""
    rows = _changed_rows(config, shared["params"], pair["received"], before, text)
    user = pair["user"] + jnp.einsum("sj,sjk->k", pair["user_change"], rows)
    items, columns = shared["items"], jnp.reshape(pair["items"], (-1, len(shared["items"])))
    rows = rows.reshape(len(columns), -1)
    if config.score != "cosine":
        return items @ user + columns.T @ (rows @ user)
    user = user / jnp.sqrt((user * user).sum() + TINY)
    cross = ((items @ rows.T) * columns.T).sum(1)
    size = (items * items).sum(1) + 2 * cross + ((columns.T @ (rows @ rows.T)) * columns.T).sum(1)
    return (items @ user + columns.T @ (rows @ user)) / jnp.sqrt(jnp.maximum(size, 0) + TINY)


def _changed_rows(
    config: ModelConfig, params: PyTree, received: list[dict[str, Any]], before: Array, text: Array
) -> Float32[Array, "2 L K"]:
    """The rows r_s^j of both nodes."""
    with_text = (ITEM,) if not config.user_text_input or config.users_start_as_items else SIDES
    inputs = [
        [
            projected(config, params, side, own[number][None])[0] * (config.uses_text and side in with_text)
            for own in (before, text)
        ]
        for number, side in enumerate(SIDES)
    ]

    levels = config.effective_layers

    def gate(name: str, own: Array, degree: Array) -> Array:
        if config.layer_combination != "learned":
            return jnp.ones(levels)
        made: Any = Gate(levels, config.relation_gates)
        return made.apply({"params": params[name]}, own[None], jnp.reshape(degree, 1))[:, 0]

    # Of all layers at once: the part of a row that needs no other rows, and what it takes of each.
    constant, taken = [], []
    for number, side in enumerate(SIDES):
        rows, factors = jnp.zeros((levels, config.dim)), jnp.zeros((levels, 2, levels + 1))
        for relation, part in received[number].items() if config.fuses_text else ():
            grown = gate(f"gate_{relation}", text[number], part["degree"]) - part["gate"]
            rows, factors = rows + grown[:, None] * part["messages"], factors + grown[:, None, None] * part["change"]
        if config.fuses_text and side in with_text:
            old, after = (gate(f"gate_text_{side}", own[number], jnp.zeros(())) for own in (before, text))
            rows = rows + jnp.outer(after, inputs[number][1]) - jnp.outer(old, inputs[number][0])
        constant.append(rows)
        taken.append(factors)
    found = [jnp.stack([after - old for old, after in inputs])]
    for level in range(levels):
        others = jnp.einsum("noj,ojk->nk", jnp.stack(taken)[:, level, :, : level + 1], jnp.stack(found, axis=1))
        found.append(jnp.stack(constant)[:, level] + others)
    return jnp.stack(found, axis=1)


def projected(config: ModelConfig, params: PyTree, side: str, text: Float32[AnyArray, "n D"]) -> Float32[Array, "n K"]:
    """Computes text inputs of nodes.

    Args:
      config: settings of the branch.
      params: its parameters.
      side: type of the nodes.
      text: their text features.

    Returns:
      The inputs; zero where the branch has none.
    """
    if f"text_{side}" not in params:
        return jnp.zeros((len(text), config.dim))
    made: Any = TextMLP(config.dim) if config.text_projection == "mlp" else TextInput(config.dim, config.id_init_std)
    return made.apply({"params": params[f"text_{side}"]}, text)
