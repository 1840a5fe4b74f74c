"""The recommendation model: inputs, propagation over the heterogeneous graph, and the score of a user and an item.

The score of user u and item i sums dot products of the final embeddings of two branches and a popularity bias:

    logit(u, i) = (g_i <z^graph_u, z^graph_i> + (1 - g_i) <z^text_u, z^text_i>) / tau + beta log(1 + n_i)
    g_i = n_i / (n_i + 1)

n_i is the number of training interactions of item i (in the bias older ones may count less, see
model.popularity_half_life), tau is train.temperature and beta is model.popularity_weight.
With model.score = cosine each branch's embeddings have unit length.

Within a branch every node v starts from h^0_v = e_v + W t_v, its learned ID embedding plus its projected text
embedding, and one layer is

    h^l_v = sum_r gamma^l_{r,v} sum_{u in N_r(v)} s_{r,u} h^{l-1}_u / sqrt(d_u d_v) + gamma^l_{text,v} W t_v
    s_{r,u} = (1 + d_u)^{a_r} / (geometric mean of (1 + d)^{a_r} over the sources of r)
    z_v = sum_{l=0}^{L} alpha_l h^l_v

- 1 / sqrt(d_u d_v): symmetric normalization by the degrees in relation r, as in LightGCN (He et al., 2020,
  arXiv 2002.02126); text-kNN edges have normalized cosines in its place.
- a_r: learned exponent of the source's degree, which strengthens or weakens the down-weighting of popular sources.
- gamma: relation gates, functions of the target's text embedding and degree (`fused_rec.model.text_fusion`).
- alpha: layer combination, learned or fixed (model.layer_combination).

Neither gates nor scales read a hidden state, so z is linear in the inputs.

Parts, and where they are:

- graph branch: the first `Branch`, of the configured variant. Variant fused uses IDs and text over all relations,
  graph uses IDs only, text uses text only.
- text branch: in variant fused a second `Branch`, of the variant text. It represents items with few or no
  interactions. Each branch has a loss of its own: a loss of the sum leaves the text branch untrained wherever IDs
  explain the interactions, and a new item has nothing but text.
- AlphaRec (Sheng et al., ICLR 2025, arXiv 2407.05441) is a text branch alone, with model.text_projection = mlp and
  model.text_propagation = both_ways: `TextMLP` projects items and users, who start as `mean_item_text`.
- popularity bias: `append_popularity_bias`, beta log(1 + n_i).
- late fusion: at ranking time the logit is one component of a weighted sum (`fused_rec.model.late_fusion`), if
  model.late_fusion is set.

`fused_rec.model.reference` has the same model in plain jraph, slow and short. This one shards nodes over devices, runs
on sampled subgraphs, and calls sparse kernels.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from fused_rec.config import ComputeDtype, ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.hetero import HostGraph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, SIMILAR_TEXT, USER, Relation
from fused_rec.graph.spmm import neighbor_sum
from fused_rec.model.losses import unit
from fused_rec.model.propagation import Noise, PropagationWeights, combine_layers, propagate_layers
from fused_rec.model.text_fusion import (
    Gate,
    GateWeights,
    TextInput,
    TextMLP,
    TextPrediction,
    gate_values,
    products,
)
from fused_rec.rng import Stream

Vectors = tuple[Float32[Array, "U _"], Float32[Array, "I _"]]

ID_EMBEDDING = "id_"  # prefix of parameters with one row a node
# Entries of the collection "intermediates":
FIRST_LAYER = "first_layer"  # embeddings of this device's users and items after one layer
ALIGNED_TEXT = "aligned_text"  # their projected text, to which model.text_alignment draws embeddings
RECONSTRUCTED = "reconstructed"  # `Reconstruction` of users and of items
LINEAR = "linear"  # (ID embeddings, text inputs, `PropagationWeights`); the output is linear in the first two


def active_relations(config: ModelConfig, graph: HostGraph | DeviceGraph) -> list[Relation]:
    """Lists the relations with edges that a variant propagates over.

    Variant fused uses all of them and graph all except text-kNN. Variant text uses only the edges from items to users:
    a user's text is then the mean of their items' text, as in a content-based recommender. With
    model.text_propagation = both_ways it uses the interactions in both directions.

    Args:
      config: the model's settings, of which `variant` and `text_propagation` count.
      graph: the graph with its relations and their edge counts.

    Returns:
      Relations in the order of the graph.
    """
    relations = [relation for relation, count in graph.relations if count]
    if not config.uses_ids:
        directions = (INTERACTED_BY, INTERACTS) if config.users_start_as_items else (INTERACTED_BY,)
        return [relation for relation in relations if relation in directions]
    if not config.uses_text:
        return [relation for relation in relations if relation.name != SIMILAR_TEXT]
    return relations


class Reconstruction(NamedTuple):
    """Text features of a device's nodes of a type, predicted from final embeddings, and what they are compared with.

    Attributes:
      predicted: float32 [n, D].
      text: float32 [n, D], the features.
      masked: bool [n], nodes whose ID embedding is dropped in this step.
    """

    predicted: Float32[Array, "n D"]
    text: Float32[Array, "n D"]
    masked: Bool[Array, "n"]


class FusedModel(nn.Module):
    """All branches of a variant: [(user embeddings [U, K], item embeddings [I, K]), ...], float32, of a device's rows.

    The graph branch comes first. Variant fused adds the text branch where items have text. Of users [B], on one device,
    only their rows [B, K] are computed where a layer allows: a loss reads no others.

    Attributes:
      config: the model's settings.
      compute_dtype: the type of products and of embeddings sent between devices; parameters, sums and outputs are
        float32.
    """

    config: ModelConfig
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(
        self, graph: DeviceGraph, dropout: PRNGKeyArray | None = None, users: Int32[Array, "B"] | None = None
    ) -> list[Vectors]:
        branches = [Branch(self.config, self.compute_dtype, name="main")(graph, dropout, users)]
        if self.config.fuses_text and graph.text[ITEM].shape[1] > NO_TEXT_DIM:
            text_config = self.config.text_branch()
            branches.append(Branch(text_config, self.compute_dtype, name="words")(graph, dropout, users))
        return branches


def concat_branches(branches: list[Vectors], count: Float32[Array, "I"]) -> Vectors:
    """Concatenates branches so that one dot product gives the weighted mean of their scores.

    Args:
      branches: `FusedModel`'s output, one or two pairs of embeddings.
      count: float32 [I], training interactions of each item, n_i of the module's formula.

    Returns:
      User embeddings [U, 2K] and item embeddings [I, 2K], item columns scaled by g_i and 1 - g_i; a single branch
      comes back unchanged.
    """
    if len(branches) == 1:
        return branches[0]
    share = (count / (count + 1))[:, None]
    (users, items), (users_by_text, items_by_text) = branches
    return (
        jnp.concatenate([users, users_by_text], axis=1),
        jnp.concatenate([share * items, (1 - share) * items_by_text], axis=1),
    )


def append_popularity_bias(vectors: Vectors, prior: Float32[Array, "I"]) -> Vectors:
    """Appends a column so that every dot product with item i grows by prior[i].

    Args:
      vectors: user embeddings [U, D] and item embeddings [I, D].
      prior: float32 [I], the bias of each item.

    Returns:
      User embeddings [U, D + 1] with a column of ones, item embeddings [I, D + 1] with the column `prior`.
    """
    users, items = vectors
    return jnp.concatenate([users, jnp.ones((len(users), 1))], axis=1), jnp.concatenate([items, prior[:, None]], axis=1)


class Branch(nn.Module):
    """One branch: user embeddings [U, K] and item embeddings [I, K], float32, on several devices the rows of each.

    The score of a pair is the dot product of its embeddings; with model.score = cosine they have unit length.

    Attributes:
      config: the model's settings; `variant` decides which inputs and relations the branch uses.
      compute_dtype: as of `FusedModel`.
    """

    config: ModelConfig
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(
        self, graph: DeviceGraph, dropout: PRNGKeyArray | None = None, users: Int32[Array, "B"] | None = None
    ) -> Vectors:
        text, gates = self.text_terms(graph)
        ids = self.id_embeddings(graph, dropout)
        # The ID embedding of an item without interactions, or of a user without neighbors, is untrained noise.
        ids[ITEM] = ids[ITEM] * (item_degree(graph) > 0)[:, None]
        in_degrees = [
            graph.adjacencies[r].degrees.in_degree for r in active_relations(self.config, graph) if r.target == USER
        ]
        ids[USER] = ids[USER] * (sum(in_degrees, jnp.zeros(len(ids[USER]))) > 0)[:, None]
        weights = self.weights(_drop_interactions(self.config.edge_dropout, graph, dropout), gates)
        self.sow("intermediates", LINEAR, (ids, text, weights))
        both = {node_type: ids[node_type] + text[node_type] for node_type in ids if self.has_input(graph, node_type)}
        noise = None
        if dropout is not None and self.config.embedding_noise:
            numbers = {t: graph.global_ids(t, jnp.arange(graph.rows(t))) for t in ids}
            noise = Noise(self.config.embedding_noise, jax.random.fold_in(dropout, Stream.EMBEDDING_NOISE), numbers)
        layers = propagate_layers(graph, weights, both, text, noise, self.compute_dtype, users)
        rows = {USER: graph.rows(USER) if users is None else len(users), ITEM: graph.rows(ITEM)}
        zeros = {t: jnp.zeros((count, self.config.dim)) for t, count in rows.items()}  # of types without any input
        if len(layers) > 1:
            first = zeros | layers[1]
            self.sow("intermediates", FIRST_LAYER, (first[USER], first[ITEM]))
        if self.config.text_alignment:
            project = TextMLP(self.config.dim, self.compute_dtype, name="alignment")
            self.sow("intermediates", ALIGNED_TEXT, (project(mean_item_text(graph)), project(graph.text[ITEM])))
        out = zeros | combine_layers(weights, layers)
        if self.config.text_reconstruction:
            self.sow("intermediates", RECONSTRUCTED, self.reconstructions(graph, out, dropout))
        if self.config.score == "cosine":
            out = {t: unit(x) for t, x in out.items()}
        return out[USER], out[ITEM]

    @property
    def text_node_types(self) -> tuple[str, ...]:
        """Node types whose own text is an input feature."""
        own = self.config.user_text_input and not self.config.users_start_as_items
        return (USER, ITEM) if own else (ITEM,)

    def has_input(self, graph: DeviceGraph, node_type: str) -> bool:
        """Returns whether any node of the type has an ID embedding or text as input; if not, its input is zero."""
        config = self.config
        if config.uses_ids and (node_type != USER or config.user_id_embedding):
            return True
        if node_type == USER and config.users_start_as_items:
            return True
        return config.uses_text and node_type in self.text_node_types and node_type not in graph.textless

    def id_embeddings(self, graph: DeviceGraph, dropout: PRNGKeyArray | None) -> dict[str, AnyArray]:
        """Looks up ID embeddings.

        Args:
          graph: the graph, of which the numbers of rows count.
          dropout: key of the ID dropout; None: no dropout.

        Returns:
          float32 [rows, K] by node type; zeros where the variant does not use them.
        """
        config = self.config
        keep_rate, mask_row = 1 - config.id_embedding_dropout, jnp.zeros((1, config.dim))
        if config.text_reconstruction:
            mask_row = self.param("mask_row", nn.initializers.zeros, (1, config.dim))
        ids = {}
        for node_type, _ in graph.node_types:
            shape = (graph.rows(node_type), config.dim)
            ids[node_type] = jnp.zeros(shape)
            if config.uses_ids and (node_type != USER or config.user_id_embedding):
                rows = self.param(ID_EMBEDDING + node_type, nn.initializers.normal(config.id_init_std), shape)
                if dropout is not None and config.id_embedding_dropout:
                    kept = self.kept_ids(graph, node_type, dropout)[:, None]
                    rows = jnp.where(kept, rows, mask_row) if config.text_reconstruction else rows * kept / keep_rate
                ids[node_type] = rows
        return ids

    def text_terms(self, graph: DeviceGraph) -> tuple[dict[str, AnyArray], dict[str, Array]]:
        """Computes all that depends on text embeddings: text inputs, and gates by one product for each node type.

        Args:
          graph: the graph with the text embedding of each node.

        Returns:
          Text inputs by node type, float32 [rows, K], zeros for types without; learned gates by name, float32
          [L, rows].
        """
        config = self.config
        inputs: dict[str, AnyArray] = {t: jnp.zeros((graph.rows(t), config.dim)) for t, _ in graph.node_types}
        values = {}
        for node_type, _ in graph.node_types:
            text, gates = graph.text[node_type], self.gates(graph, node_type)
            read = config.uses_text and node_type in self.text_node_types
            projection = self.text_projection(node_type) if read else None
            no_text = node_type in graph.textless  # parameters are the same: other tables may have texts
            matrices = {name: gate.by_text for name, (gate, _) in gates.items() if config.fuses_text and not no_text}
            logits = products(text, {k: v for k, v in matrices.items() if v is not None}, self.compute_dtype)
            if projection is not None:
                projected = projection(text[:0] if no_text else text)
                inputs[node_type] = inputs[node_type] if no_text else projected
                if config.users_start_as_items:
                    inputs[USER] = projection(mean_item_text(graph))
            has_text = jnp.abs(text).sum(axis=1) > 0
            for name, (gate, log_degree) in gates.items():
                values[name] = gate_values(gate, logits.get(name), has_text, log_degree)
        return inputs, values

    def gates(self, graph: DeviceGraph, node_type: str) -> dict[str, tuple[GateWeights, Array]]:
        """Returns parameters and log degrees of the learned gates of a type's nodes, by name."""
        config = self.config
        if config.layer_combination != "learned":
            return {}
        degrees = {
            f"gate_{relation}": jnp.asarray(graph.adjacencies[relation].degrees.log_in_degree)
            for relation in active_relations(config, graph)
            if relation.target == node_type
        }
        if config.fuses_text and node_type in self.text_node_types:
            degrees[f"gate_text_{node_type}"] = jnp.zeros(graph.rows(node_type))
        width, levels = graph.text[node_type].shape[1], config.effective_layers
        return {
            name: (Gate(levels, config.relation_gates, name=name).weights(width), log_degree)
            for name, log_degree in degrees.items()
        }

    def kept_ids(self, graph: DeviceGraph, node_type: str, dropout: PRNGKeyArray) -> Bool[Array, "n"]:
        """Draws which rows keep their ID embedding in a step, bool [rows]."""
        index = [name for name, _ in graph.node_types].index(node_type)
        numbers = graph.global_ids(node_type, jnp.arange(graph.rows(node_type)))
        return _row_keep_mask(jax.random.fold_in(dropout, index), self.config.id_embedding_dropout, numbers)

    def reconstructions(
        self, graph: DeviceGraph, out: dict[str, Array], dropout: PRNGKeyArray | None
    ) -> tuple[Reconstruction, Reconstruction]:
        """Predicts text features of users and items from their final embeddings.

        Args:
          graph: the graph with the text embedding of each item.
          out: final embeddings by node type, float32 [rows, K].
          dropout: key of the ID dropout; None: no node is masked.

        Returns:
          Predictions and features of this device's users, whose feature is `mean_item_text`, and items.
        """
        found = []
        predict = TextPrediction(graph.text[ITEM].shape[1], self.compute_dtype, name="reconstruction")
        for node_type, text in ((USER, mean_item_text(graph)), (ITEM, jnp.asarray(graph.text[ITEM]))):
            masked = jnp.zeros(len(text), bool) if dropout is None else ~self.kept_ids(graph, node_type, dropout)
            found.append(Reconstruction(predict(out[node_type]), text, masked))
        return found[0], found[1]

    def text_projection(self, node_type: str) -> TextInput | TextMLP:
        """Builds the projection of a type's text embeddings to the model's dimension."""
        config, name = self.config, f"text_{node_type}"
        if config.text_projection == "mlp":
            return TextMLP(config.dim, self.compute_dtype, name=name)
        return TextInput(config.dim, config.id_init_std, self.compute_dtype, name=name)

    def weights(self, graph: DeviceGraph, gates: Mapping[str, Float32[Array, "L _"]]) -> PropagationWeights:
        """Computes edge weights, source scales and layer weights of the variant's relations.

        Args:
          graph: the graph: edges with their normalized weights, and the degrees of the whole graph.
          gates: learned gates by name; ones where the config fixes all factors.

        Returns:
          The coefficients of `propagate_layers`, of `effective_layers` layers.
        """
        config = self.config
        levels = config.effective_layers

        def gate(name: str, node_type: str) -> Float32[Array, "L _"]:
            return gates[name] if name in gates else jnp.ones((levels, graph.rows(node_type)))

        edge, source_scale, relation_gates = {}, {}, {}
        for relation in active_relations(config, graph):
            adjacency = graph.adjacencies[relation]
            edge[relation] = adjacency.weight
            source_scale[relation] = self.source_scale(f"source_scale_{relation}", adjacency.degrees.log_out_degree)
            relation_gates[relation] = gate(f"gate_{relation}", relation.target)
        own = [t for t in self.text_node_types if config.fuses_text and t not in graph.textless]
        text_gate = {node_type: gate(f"gate_text_{node_type}", node_type) for node_type in own}
        if config.layer_combination == "mean_without_input":
            layer_weights = jnp.full(levels + 1, 1 / levels).at[0].set(0)
        elif config.layer_combination == "mean":
            layer_weights = jnp.full(levels + 1, 1 / (levels + 1))
        else:
            # Positive: an item without neighbors is its own input, and a negative weight would flip its direction.
            layer_weights = jnp.exp(self.param("layer_weights", nn.initializers.zeros, (levels + 1,))) / (levels + 1)
        return PropagationWeights(edge, source_scale, relation_gates, text_gate, layer_weights)

    def source_scale(self, name: str, log_out_degree: Float32[AnyArray, "n"]) -> Float32[Array, "n"]:
        """Computes (1 + degree)^a over the geometric mean of it, with a learned exponent a, for all source nodes.

        Symmetric normalization down-weights popular items. Variant text starts at a = 1/2, where a user is the mean of
        their items' text, which undoes the down-weighting; other variants start at a = 0.

        Args:
          name: the parameter's name.
          log_out_degree: float32 [n], log(1 + out-degree) less its mean over the type's nodes.

        Returns:
          float32 [n]; ones where the config fixes all factors.
        """
        if self.config.layer_combination != "learned" or not self.config.relation_gates:
            return jnp.ones(len(log_out_degree))
        exponent = self.param(name, nn.initializers.constant(0.5 * (not self.config.uses_ids)), ())
        return jnp.exp(exponent * log_out_degree)


def item_degree(graph: DeviceGraph) -> Float32[Array, "I"]:
    """Returns the number of training interactions of each item of this device, float32 [rows]."""
    return jnp.asarray(graph.adjacencies[INTERACTS].degrees.in_degree)


def mean_item_text(graph: DeviceGraph) -> Float32[Array, "U D"]:
    """Averages the text embeddings of each user's items, in the graph or in a sample of it.

    Args:
      graph: the graph: text embeddings of items and edges from items to users.

    Returns:
      float32 [rows, D]; zeros for a user without interactions.
    """
    interacted_by = graph.adjacencies[INTERACTED_BY]
    text = jnp.asarray(graph.text[ITEM])
    rows = graph.shards.all_gather(jnp.concatenate([text, jnp.ones((len(text), 1))], axis=1))  # last column: counts
    present = (interacted_by.weight != 0).astype(jnp.float32)  # padded and removed edges weigh 0
    sums = neighbor_sum(interacted_by, present, rows)
    return sums[:, :-1] / jnp.maximum(sums[:, -1:], 1)


def _drop_interactions(share: float, graph: DeviceGraph, dropout: PRNGKeyArray | None) -> DeviceGraph:
    """Drops a random share of the interactions, the same ones in both directions, and scales up the rest."""
    if dropout is None or not share:
        return graph
    interacted_by, interacts = graph.adjacencies[INTERACTED_BY], graph.adjacencies[INTERACTS]
    kept_by_item = edge_keep_mask(
        dropout,
        share,
        graph.global_ids(USER, interacted_by.receivers),
        graph.global_ids_of_all(ITEM, interacted_by.senders),
    )
    kept_by_user = edge_keep_mask(
        dropout, share, graph.global_ids(USER, interacts.senders), graph.global_ids_of_all(ITEM, interacts.receivers)
    )
    return graph.with_adjacencies(
        {
            INTERACTED_BY: interacted_by.with_weight(interacted_by.weight * kept_by_item),
            INTERACTS: interacts.with_weight(interacts.weight * kept_by_user),
        }
    )


def edge_keep_mask(
    dropout: PRNGKeyArray, share: float, user: Int32[AnyArray, "E"], item: Int32[AnyArray, "E"]
) -> Float32[Array, "E"]:
    """Draws which interactions edge dropout keeps in a step, the same on any device.

    Args:
      dropout: the random key of the step.
      share: model.edge_dropout.
      user: int32 [E], users of the interactions.
      item: int32 [E], their items.

    Returns:
      float32 [E], 0 with probability `share`, else 1 / (1 - share): a function of the key and the pair.
    """
    key = jax.random.fold_in(dropout, Stream.EDGE_DROPOUT)
    pairs = jnp.concatenate([user, item]).astype(jnp.uint32)  # one block of Threefry per pair: 32 bits each
    bits = threefry_2x32(jax.random.key_data(key), pairs)[: len(user)]
    return (bits >= jnp.uint32(share * 2**32)) / jnp.float32(1 - share)


def _row_keep_mask(key: PRNGKeyArray, share: float, numbers: Int32[AnyArray, "n"]) -> Bool[Array, "n"]:
    """The entries `numbers` of `jax.random.bernoulli(key, 1 - share, (nodes,))`, without drawing the others."""
    bits = threefry_2x32(jax.random.key_data(key), jnp.stack([jnp.zeros_like(numbers), numbers]).astype(jnp.uint32))
    uniform = (bits[0] ^ bits[1]) >> 9  # 23 bits, the mantissa of a float32
    return uniform.astype(jnp.float32) * jnp.float32(2**-23) < jnp.float32(1 - share)
