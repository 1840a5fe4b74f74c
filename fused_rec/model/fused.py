"""The recommender: inputs from ids and words, coefficients from words and degrees, linear propagation, scores."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from fused_rec.config import ModelConfig
from fused_rec.graph.build import HELD_BY, HOLDS, ITEM, USER
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.graph.propagate import Adjacency
from fused_rec.model.fusion import Affinity, Gate, TextInput
from fused_rec.model.message_passing import Coefficients, propagate

LEFT_OUT = 1_000  # folded into the key; node types fold in their number


def heard_relations(config: ModelConfig, graph: HeteroGraph) -> list[Relation]:
    """The relations that a variant listens to.

    fused hears all, graph all but those made of words, and text only what a user holds: a user's words are then
    the words of the items they hold, as in a content-based recommender.
    """
    relations = [relation for relation, count in graph.relations if count]
    if config.variant == "text":
        return [relation for relation in relations if relation == HELD_BY]
    if config.variant == "graph":
        return [relation for relation in relations if relation.name != "similar_text"]
    return relations


class FusedRec(nn.Module):
    """Vectors of users and items; the score of a pair is their dot product (a cosine where config.score says so)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None = None
    ) -> tuple[Float32[Array, "U K"], Float32[Array, "I K"]]:
        ids, words = self.inputs(graph, dropout)
        coefficients = self.coefficients(graph, _leave_out(self.config.holding_dropout, adjacencies, dropout))
        both = {node_type: ids[node_type] + words[node_type] for node_type in ids}
        out = propagate(adjacencies, coefficients, both, words)
        if self.config.score == "dot":
            return out[USER], out[ITEM]
        return _unit(out[USER]), _unit(out[ITEM])

    def inputs(self, graph: HeteroGraph, dropout: PRNGKeyArray | None) -> tuple[dict[str, Array], dict[str, Array]]:
        """Id rows and projected words, by node type; zeros for the part that a variant does without."""
        config = self.config
        ids, words = {}, {}
        for number, (node_type, count) in enumerate(graph.node_types):
            shape = (count, config.dim)
            ids[node_type] = words[node_type] = jnp.zeros(shape)
            if config.variant != "text" and (node_type != USER or config.user_ids):
                rows = self.param(f"id_{node_type}", nn.initializers.normal(config.id_scale), shape)
                if dropout is not None and config.id_dropout:
                    kept = jax.random.bernoulli(jax.random.fold_in(dropout, number), 1 - config.id_dropout, (count, 1))
                    rows = rows * kept / (1 - config.id_dropout)
                ids[node_type] = rows
            if config.variant != "graph" and node_type in (USER, ITEM):
                project = TextInput(config.dim, config.id_scale, name=f"text_{node_type}")
                words[node_type] = project(graph.text(node_type))
        return ids, words

    def coefficients(self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency]) -> Coefficients:
        """Edge weights, gates and the readout's mix of the variant's relations."""
        config = self.config
        rounds = min(config.rounds, 1) if config.variant == "text" else config.rounds
        uses_words = config.variant == "fused"
        edge, gate, text_gate = {}, {}, {}
        for relation in heard_relations(config, graph):
            hears = adjacencies[relation]
            target = graph.text(relation.target) * uses_words
            edge[relation] = hears.weight
            if config.affinity and uses_words and {relation.source, relation.target} <= {USER, ITEM}:
                affinity = Affinity(name=f"affinity_{relation}")
                edge[relation] = hears.weight * affinity(hears, graph.text(relation.source), target)
            degree = jnp.diff(hears.receiver_start).astype(jnp.float32)
            gate[relation] = Gate(rounds, config.gates, name=f"gate_{relation}")(target, degree)
        if uses_words:
            for node_type in (USER, ITEM):
                text = graph.text(node_type)
                text_gate[node_type] = Gate(rounds, config.gates, name=f"gate_text_{node_type}")(
                    text, jnp.zeros(len(text))
                )
        mix = self.param("mix", nn.initializers.constant(1 / (rounds + 1)), (rounds + 1,))
        return Coefficients(edge, gate, text_gate, mix)


def _leave_out(
    share: float, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None
) -> Mapping[Relation, Adjacency]:
    """A random share of the holdings at weight 0, the same ones both ways, the rest scaled up to keep the mean."""
    if dropout is None or not share:
        return adjacencies
    heard, told = adjacencies[HELD_BY], adjacencies[HOLDS]
    kept = jax.random.bernoulli(jax.random.fold_in(dropout, LEFT_OUT), 1 - share, heard.weight.shape) / (1 - share)
    # HELD_BY ascends by (user, item), which is HOLDS taken by its senders: one draw serves both.
    kept_told = jnp.zeros_like(kept).at[told.by_sender].set(kept)
    return {
        **adjacencies,
        HELD_BY: dataclasses.replace(heard, weight=heard.weight * kept),
        HOLDS: dataclasses.replace(told, weight=told.weight * kept_told),
    }


def _unit(x: Float32[Array, "n K"]) -> Float32[Array, "n K"]:
    # The small term keeps the derivative finite for a node that has neither id, words nor neighbours.
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
