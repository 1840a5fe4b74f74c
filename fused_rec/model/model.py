"""The recommender: inputs from ids and words, coefficients from words and degrees, linear propagation, scores.

Three parts make a logit. `Branch` of the chosen variant; beside the fused one a second tower, `Branch` of the
variant text, for items that few hold or nobody yet; and how popular the item is, which no tower has to learn then:

    logit(u, i) = (g_i main(u, i) + (1 - g_i) words(u, i)) / temperature + popularity * log(1 + n_i),
    g_i = n_i / (n_i + 1), n_i the observed holders of i.

What is ranked is that times the temperature and, where the config says so, a fourth part that nothing trains
(`append_ease`). Each tower is trained by its own loss. One that learns from the sum leaves the words untrained
wherever ids explain the holdings, and they are all that a new product has.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from fused_rec.baselines.linear import LowRankEase
from fused_rec.config import ComputeDtype, ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.adjacency import Adjacency, neighbor_sum
from fused_rec.graph.build import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.model.losses import unit
from fused_rec.model.propagation import Noise, PropagationWeights, combine_layers, propagate_layers
from fused_rec.model.text_fusion import Affinity, Gate, TextInput

Vectors = tuple[Float32[Array, "U _"], Float32[Array, "I _"]]

EDGE_DROPOUT_STREAM, NOISE_STREAM = 1_000, 1_001  # folded into the key; node types fold in their number
ID_EMBEDDING = "id_"  # how the names of parameters begin that have one row a node
# Of the collection "intermediates":
FIRST_LAYER = "first_layer"  # vectors of users and items after one round
# (id rows, words, `PropagationWeights`): in the first two, which come by node type, the rest is linear
LINEAR = "linear"


def active_relations(config: ModelConfig, graph: HeteroGraph) -> list[Relation]:
    """The relations that a variant listens to.

    fused hears all, graph all but those made of words, and text only what a user holds: a user's words are then
    the words of the items they hold, as in a content-based recommender.
    """
    relations = [relation for relation, count in graph.relations if count]
    if config.variant == "text":
        return [relation for relation in relations if relation == INTERACTED_BY]
    if config.variant == "graph":
        return [relation for relation in relations if relation.name != "similar_text"]
    return relations


class FusedModel(nn.Module):
    """`Branch`, and beside the fused variant its text variant: [(vectors of users, vectors of items), ...].

    compute_dtype: the type of what is multiplied and sent; parameters, sums and vectors are float32.
    """

    config: ModelConfig
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(
        self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None = None
    ) -> list[Vectors]:
        branches = [Branch(self.config, self.compute_dtype, name="main")(graph, adjacencies, dropout)]
        if self.config.variant == "fused" and graph.text(ITEM).shape[1] > NO_TEXT_DIM:
            text_config = dataclasses.replace(self.config, variant="text", ease_weight=0.0)
            branches.append(Branch(text_config, self.compute_dtype, name="words")(graph, adjacencies, dropout))
        return branches


def concat_branches(branches: list[Vectors], count: Float32[Array, "I"]) -> Vectors:
    """One vector a user and an item, whose dot product is the towers' mean weighed by the item's `count` of holders."""
    if len(branches) == 1:
        return branches[0]
    share = (count / (count + 1))[:, None]
    (users, items), (users_by_text, items_by_text) = branches
    return (
        jnp.concatenate([users, users_by_text], axis=1),
        jnp.concatenate([share * items, (1 - share) * items_by_text], axis=1),
    )


def append_popularity_bias(vectors: Vectors, prior: Float32[Array, "I"]) -> Vectors:
    """Vectors one column wider, so that every dot product with item i is higher by prior[i]."""
    users, items = vectors
    return jnp.concatenate([users, jnp.ones((len(users), 1))], axis=1), jnp.concatenate([items, prior[:, None]], axis=1)


def append_ease(
    vectors: Vectors,
    ease: LowRankEase,
    graph: HeteroGraph,
    adjacencies: Mapping[Relation, Adjacency],
    weight: float,
) -> Vectors:
    """Vectors R columns wider: every item that a user does not hold gets `weight` times EASE's score more.

    One that they hold gets what its own row adds besides, weight |S_i|^2 / (1 - |S_i|^2): no dot product could tell.
    """
    users, items = vectors
    interacted_by = adjacencies[INTERACTED_BY]
    padded = jnp.pad(jnp.asarray(ease.rows), ((0, graph.rows(ITEM) * graph.shards.count - len(items)), (0, 0)))
    sums = graph.all_gather(USER, neighbor_sum(interacted_by, _ones(interacted_by.weight), padded))
    return (
        jnp.concatenate([users, sums], axis=1),
        jnp.concatenate([items, weight * ease.rows / ease.one_minus_norm[:, None]], axis=1),
    )


def _ones(weight: Float32[AnyArray, "E"]) -> Float32[Array, "E"]:
    """1 for every edge, 0 for those that fill up; gradient x input of a weight is as if it were a factor of the 1."""
    there = jnp.asarray(weight) > 0
    return jnp.where(there, weight / jax.lax.stop_gradient(jnp.where(there, weight, 1)), 0)


class Branch(nn.Module):
    """Vectors of users and items; the score of a pair is their dot product (a cosine where config.score says so)."""

    config: ModelConfig
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(
        self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None = None
    ) -> Vectors:
        ids, text = self.inputs(graph, dropout)
        # Nothing has trained the row of an item that nobody holds, or of a user who hears nobody: it would be noise.
        ids[ITEM] = ids[ITEM] * (item_degree(adjacencies) > 0)[:, None]
        in_degrees = [
            adjacencies[r].degrees.in_degree for r in active_relations(self.config, graph) if r.target == USER
        ]
        ids[USER] = ids[USER] * (sum(in_degrees, jnp.zeros(len(ids[USER]))) > 0)[:, None]
        kept_adjacencies = _drop_interactions(self.config.edge_dropout, graph, adjacencies, dropout)
        weights = self.weights(graph, kept_adjacencies)
        self.sow("intermediates", LINEAR, (ids, text, weights))
        both = {node_type: ids[node_type] + text[node_type] for node_type in ids}
        noise = None
        if dropout is not None and self.config.embedding_noise:
            numbers = {t: graph.global_ids(t, jnp.arange(graph.rows(t))) for t in both}
            noise = Noise(self.config.embedding_noise, jax.random.fold_in(dropout, NOISE_STREAM), numbers)
        layers = propagate_layers(adjacencies, weights, both, text, noise, graph.shards, self.compute_dtype)
        if len(layers) > 1:
            self.sow("intermediates", FIRST_LAYER, tuple(graph.all_gather(t, layers[1][t]) for t in (USER, ITEM)))
        out = combine_layers(weights, layers)
        if self.config.score == "cosine":
            out = {t: unit(x) for t, x in out.items()}
        return graph.all_gather(USER, out[USER]), graph.all_gather(ITEM, out[ITEM])

    @property
    def text_node_types(self) -> tuple[str, ...]:
        """Node types whose words are an input."""
        return (USER, ITEM) if self.config.user_text_input else (ITEM,)

    def inputs(
        self, graph: HeteroGraph, dropout: PRNGKeyArray | None
    ) -> tuple[dict[str, AnyArray], dict[str, AnyArray]]:
        """Id rows and projected words, by node type; zeros for the part that a variant does without."""
        config = self.config
        ids, text = {}, {}
        for place, (node_type, _) in enumerate(graph.node_types):
            shape = (graph.rows(node_type), config.dim)
            ids[node_type] = text[node_type] = jnp.zeros(shape)
            if config.variant != "text" and (node_type != USER or config.user_id_embedding):
                rows = self.param(ID_EMBEDDING + node_type, nn.initializers.normal(config.id_init_std), shape)
                if dropout is not None and config.id_embedding_dropout:
                    numbers = graph.global_ids(node_type, jnp.arange(len(rows)))
                    kept = _row_keep_mask(jax.random.fold_in(dropout, place), config.id_embedding_dropout, numbers)
                    rows = rows * kept[:, None] / (1 - config.id_embedding_dropout)
                ids[node_type] = rows
            if config.variant != "graph" and node_type in self.text_node_types:
                project = TextInput(config.dim, config.id_init_std, self.compute_dtype, name=f"text_{node_type}")
                text[node_type] = project(graph.text(node_type))
        return ids, text

    def weights(self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency]) -> PropagationWeights:
        """Edge weights, gates and the readout's mix of the variant's relations."""
        config = self.config
        levels = min(config.num_layers, 1) if config.variant == "text" else config.num_layers
        uses_text = config.variant == "fused"
        edge, source_scale, gate, text_gate = {}, {}, {}, {}
        for relation in active_relations(config, graph):
            adjacency = adjacencies[relation]
            target = graph.text(relation.target) * uses_text
            edge[relation] = adjacency.weight
            if config.affinity and uses_text and {relation.source, relation.target} <= {USER, ITEM}:
                affinity = Affinity(name=f"affinity_{relation}")
                edge[relation] = adjacency.weight * affinity(
                    adjacency, graph.text(relation.source), target, graph.shards
                )
            source_scale[relation] = self.source_scale(f"source_scale_{relation}", adjacency.degrees.log_out_degree)
            gate[relation] = self.gate(f"gate_{relation}", levels, target, jnp.asarray(adjacency.degrees.log_in_degree))
        if uses_text:
            for node_type in self.text_node_types:
                text = graph.text(node_type)
                text_gate[node_type] = self.gate(f"gate_text_{node_type}", levels, text, jnp.zeros(len(text)))
        if config.layer_combination == "mean_without_input":
            layer_weights = jnp.full(levels + 1, 1 / levels).at[0].set(0)
        elif config.layer_combination == "mean":
            layer_weights = jnp.full(levels + 1, 1 / (levels + 1))
        else:
            # Above 0: an item that hears nobody is its own input, whose direction a change of sign would turn round.
            layer_weights = jnp.exp(self.param("layer_weights", nn.initializers.zeros, (levels + 1,))) / (levels + 1)
        return PropagationWeights(edge, source_scale, gate, text_gate, layer_weights)

    def source_scale(self, name: str, log_out_degree: Float32[AnyArray, "n"]) -> Float32[Array, "n"]:
        """(1 + degree)^a for each of all source nodes, over the geometric mean of 1 + degree to the a; a is learned.

        Edges of 1 / sqrt(degree degree) hush what many hold; where a user's words are the words of what they hold, a
        starts from 1/2, which gives all holdings nearly the same say, else from 0.
        """
        if self.config.layer_combination != "learned" or not self.config.relation_gates:
            return jnp.ones(len(log_out_degree))
        exponent = self.param(name, nn.initializers.constant(0.5 * (self.config.variant == "text")), ())
        return jnp.exp(exponent * log_out_degree)

    def gate(self, name: str, levels: int, text: AnyArray, log_degree: Array) -> Float32[Array, "L n"]:
        """The learned `Gate` of that name, or ones where the config fixes all factors."""
        if self.config.layer_combination != "learned":
            return jnp.ones((levels, len(text)))
        return Gate(levels, self.config.relation_gates, name=name)(text, log_degree)


def item_degree(adjacencies: Mapping[Relation, Adjacency]) -> Float32[Array, "I"]:
    """How many users are seen to hold each item of this device."""
    return jnp.asarray(adjacencies[INTERACTS].degrees.in_degree)


def _drop_interactions(
    share: float, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None
) -> Mapping[Relation, Adjacency]:
    """A random share of the holdings at weight 0, the same ones both ways, the rest scaled up to keep the mean."""
    if dropout is None or not share:
        return adjacencies
    interacted_by, interacts = adjacencies[INTERACTED_BY], adjacencies[INTERACTS]
    key = jax.random.fold_in(dropout, EDGE_DROPOUT_STREAM)
    kept_by_item = _edge_keep_mask(
        key,
        share,
        graph.global_ids(USER, interacted_by.receivers),
        graph.global_ids_of_all(ITEM, interacted_by.senders),
    )
    kept_by_user = _edge_keep_mask(
        key, share, graph.global_ids_of_all(USER, interacts.senders), graph.global_ids(ITEM, interacts.receivers)
    )
    return {
        **adjacencies,
        INTERACTED_BY: dataclasses.replace(interacted_by, weight=interacted_by.weight * kept_by_item),
        INTERACTS: dataclasses.replace(interacts, weight=interacts.weight * kept_by_user),
    }


def _edge_keep_mask(
    key: PRNGKeyArray, share: float, user: Int32[AnyArray, "E"], item: Int32[AnyArray, "E"]
) -> Float32[Array, "E"]:
    """0 with probability `share`, else 1 / (1 - share): a function of the key and the pair, wherever it is drawn."""
    pairs = jnp.concatenate([user, item]).astype(jnp.uint32)  # one block of Threefry a pair: 32 bits of each
    drawn = threefry_2x32(jax.random.key_data(key), pairs)[: len(user)]
    return (drawn >= jnp.uint32(share * 2**32)) / jnp.float32(1 - share)


def _row_keep_mask(key: PRNGKeyArray, share: float, numbers: Int32[AnyArray, "n"]) -> Bool[Array, "n"]:
    """What `jax.random.bernoulli(key, 1 - share, (nodes,))` says of the nodes of these numbers, and draws no others."""
    drawn = threefry_2x32(jax.random.key_data(key), jnp.stack([jnp.zeros_like(numbers), numbers]).astype(jnp.uint32))
    uniform = (drawn[0] ^ drawn[1]) >> 9  # of 23 bits, as many as a float32 between 1 and 2 has
    return uniform.astype(jnp.float32) * jnp.float32(2**-23) < jnp.float32(1 - share)
