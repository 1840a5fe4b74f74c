"""The recommender: inputs from ids and words, coefficients from words and degrees, linear propagation, scores.

Three parts make a logit. `FusedRec` of the chosen variant; beside the fused one a second tower, `FusedRec` of the
variant text, for items that few hold or nobody yet; and how popular the item is, which no tower has to learn then:

    logit(u, i) = (g_i main(u, i) + (1 - g_i) words(u, i)) / temperature + popularity * log(1 + n_i),
    g_i = n_i / (n_i + 1), n_i the observed holders of i.

What is ranked is that times the temperature and, where the config says so, a fourth part that nothing trains
(`with_spectrum`). Each tower is trained by its own loss. One that learns from the sum leaves the words untrained
wherever ids explain the holdings, and they are all that a new product has.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray

from fused_rec.config import Compute, ModelConfig
from fused_rec.devices import AnyArray
from fused_rec.graph.build import HELD_BY, HOLDS, ITEM, USER, WORDLESS
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.graph.propagate import Adjacency, neighbour_sum
from fused_rec.model.closed_form import Spectrum
from fused_rec.model.fusion import Affinity, Gate, TextInput
from fused_rec.model.losses import unit
from fused_rec.model.message_passing import Coefficients, Noise, readout, rounds

Vectors = tuple[Float32[Array, "U _"], Float32[Array, "I _"]]

LEFT_OUT, NOISE = 1_000, 1_001  # folded into the key; node types fold in their number
ID_ROWS = "id_"  # how the names of parameters begin that have one row a node
# Of the collection "intermediates":
FIRST_ROUND = "first_round"  # vectors of users and items after one round
LINEAR = "linear"  # (id rows, words, `Coefficients`): in the first two, which come by node type, the rest is linear


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


class Towers(nn.Module):
    """`FusedRec`, and beside the fused variant its text variant: [(vectors of users, vectors of items), ...].

    compute: the type of what is multiplied and sent; parameters, sums and vectors are float32.
    """

    config: ModelConfig
    compute: Compute = "float32"

    @nn.compact
    def __call__(
        self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None = None
    ) -> list[Vectors]:
        towers = [FusedRec(self.config, self.compute, name="main")(graph, adjacencies, dropout)]
        if self.config.variant == "fused" and graph.text(ITEM).shape[1] > WORDLESS:
            words = dataclasses.replace(self.config, variant="text", spectrum=0.0)
            towers.append(FusedRec(words, self.compute, name="words")(graph, adjacencies, dropout))
        return towers


def joined(towers: list[Vectors], count: Float32[Array, "I"]) -> Vectors:
    """One vector a user and an item, whose dot product is the towers' mean weighed by the item's `count` of holders."""
    if len(towers) == 1:
        return towers[0]
    share = (count / (count + 1))[:, None]
    (users, items), (users_by_words, items_by_words) = towers
    return (
        jnp.concatenate([users, users_by_words], axis=1),
        jnp.concatenate([share * items, (1 - share) * items_by_words], axis=1),
    )


def with_prior(vectors: Vectors, prior: Float32[Array, "I"]) -> Vectors:
    """Vectors one column wider, so that every dot product with item i is higher by prior[i]."""
    users, items = vectors
    return jnp.concatenate([users, jnp.ones((len(users), 1))], axis=1), jnp.concatenate([items, prior[:, None]], axis=1)


def with_spectrum(
    vectors: Vectors,
    spectrum: Spectrum,
    graph: HeteroGraph,
    adjacencies: Mapping[Relation, Adjacency],
    weight: float,
) -> Vectors:
    """Vectors R columns wider: every item that a user does not hold gets `weight` times EASE's score more.

    One that they hold gets what its own row adds besides, weight |S_i|^2 / (1 - |S_i|^2): no dot product could tell.
    """
    users, items = vectors
    heard = adjacencies[HELD_BY]
    padded = jnp.pad(jnp.asarray(spectrum.rows), ((0, graph.rows(ITEM) * graph.shards.count - len(items)), (0, 0)))
    sums = graph.whole(USER, neighbour_sum(heard, _ones(heard.weight), padded))
    return (
        jnp.concatenate([users, sums], axis=1),
        jnp.concatenate([items, weight * spectrum.rows / spectrum.rest[:, None]], axis=1),
    )


def _ones(weight: Float32[AnyArray, "E"]) -> Float32[Array, "E"]:
    """1 for every edge, 0 for those that fill up; gradient x input of a weight is as if it were a factor of the 1."""
    there = jnp.asarray(weight) > 0
    return jnp.where(there, weight / jax.lax.stop_gradient(jnp.where(there, weight, 1)), 0)


class FusedRec(nn.Module):
    """Vectors of users and items; the score of a pair is their dot product (a cosine where config.score says so)."""

    config: ModelConfig
    compute: Compute = "float32"

    @nn.compact
    def __call__(
        self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None = None
    ) -> Vectors:
        ids, words = self.inputs(graph, dropout)
        # Nothing has trained the row of an item that nobody holds, or of a user who hears nobody: it would be noise.
        ids[ITEM] = ids[ITEM] * (holders(adjacencies) > 0)[:, None]
        heard = [adjacencies[r].degrees.heard for r in heard_relations(self.config, graph) if r.target == USER]
        ids[USER] = ids[USER] * (sum(heard, jnp.zeros(len(ids[USER]))) > 0)[:, None]
        hears = _leave_out(self.config.holding_dropout, graph, adjacencies, dropout)
        coefficients = self.coefficients(graph, hears)
        self.sow("intermediates", LINEAR, (ids, words, coefficients))
        both = {node_type: ids[node_type] + words[node_type] for node_type in ids}
        noise = None
        if dropout is not None and self.config.noise:
            numbers = {t: graph.numbers(t, jnp.arange(graph.rows(t))) for t in both}
            noise = Noise(self.config.noise, jax.random.fold_in(dropout, NOISE), numbers)
        every = rounds(adjacencies, coefficients, both, words, noise, graph.shards, self.compute)
        if len(every) > 1:
            self.sow("intermediates", FIRST_ROUND, tuple(graph.whole(t, every[1][t]) for t in (USER, ITEM)))
        out = readout(coefficients, every)
        if self.config.score == "cosine":
            out = {t: unit(x) for t, x in out.items()}
        return graph.whole(USER, out[USER]), graph.whole(ITEM, out[ITEM])

    @property
    def worded(self) -> tuple[str, ...]:
        """Node types whose words are an input."""
        return (USER, ITEM) if self.config.user_words else (ITEM,)

    def inputs(
        self, graph: HeteroGraph, dropout: PRNGKeyArray | None
    ) -> tuple[dict[str, AnyArray], dict[str, AnyArray]]:
        """Id rows and projected words, by node type; zeros for the part that a variant does without."""
        config = self.config
        ids, words = {}, {}
        for place, (node_type, _) in enumerate(graph.node_types):
            shape = (graph.rows(node_type), config.dim)
            ids[node_type] = words[node_type] = jnp.zeros(shape)
            if config.variant != "text" and (node_type != USER or config.user_ids):
                rows = self.param(ID_ROWS + node_type, nn.initializers.normal(config.id_scale), shape)
                if dropout is not None and config.id_dropout:
                    numbers = graph.numbers(node_type, jnp.arange(len(rows)))
                    kept = _kept_rows(jax.random.fold_in(dropout, place), config.id_dropout, numbers)
                    rows = rows * kept[:, None] / (1 - config.id_dropout)
                ids[node_type] = rows
            if config.variant != "graph" and node_type in self.worded:
                project = TextInput(config.dim, config.id_scale, self.compute, name=f"text_{node_type}")
                words[node_type] = project(graph.text(node_type))
        return ids, words

    def coefficients(self, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency]) -> Coefficients:
        """Edge weights, gates and the readout's mix of the variant's relations."""
        config = self.config
        levels = min(config.rounds, 1) if config.variant == "text" else config.rounds
        uses_words = config.variant == "fused"
        edge, voice, gate, text_gate = {}, {}, {}, {}
        for relation in heard_relations(config, graph):
            hears = adjacencies[relation]
            target = graph.text(relation.target) * uses_words
            edge[relation] = hears.weight
            if config.affinity and uses_words and {relation.source, relation.target} <= {USER, ITEM}:
                affinity = Affinity(name=f"affinity_{relation}")
                edge[relation] = hears.weight * affinity(hears, graph.text(relation.source), target, graph.shards)
            voice[relation] = self.voice(f"voice_{relation}", hears.degrees.log_told)
            gate[relation] = self.gate(f"gate_{relation}", levels, target, jnp.asarray(hears.degrees.log_heard))
        if uses_words:
            for node_type in self.worded:
                text = graph.text(node_type)
                text_gate[node_type] = self.gate(f"gate_text_{node_type}", levels, text, jnp.zeros(len(text)))
        if config.readout == "heard":
            mix = jnp.full(levels + 1, 1 / levels).at[0].set(0)
        elif config.readout == "even":
            mix = jnp.full(levels + 1, 1 / (levels + 1))
        else:
            # Above 0: an item that hears nobody is its own input, whose direction a change of sign would turn round.
            mix = jnp.exp(self.param("mix", nn.initializers.zeros, (levels + 1,))) / (levels + 1)
        return Coefficients(edge, voice, gate, text_gate, mix)

    def voice(self, name: str, log_told: Float32[AnyArray, "n"]) -> Float32[Array, "n"]:
        """(1 + degree)^a for each of all source nodes, over the geometric mean of 1 + degree to the a; a is learned.

        Edges of 1 / sqrt(degree degree) hush what many hold; where a user's words are the words of what they hold, a
        starts from 1/2, which gives all holdings nearly the same say, else from 0.
        """
        if self.config.readout != "learned" or not self.config.gates:
            return jnp.ones(len(log_told))
        exponent = self.param(name, nn.initializers.constant(0.5 * (self.config.variant == "text")), ())
        return jnp.exp(exponent * log_told)

    def gate(self, name: str, levels: int, text: AnyArray, log_degree: Array) -> Float32[Array, "L n"]:
        """The learned `Gate` of that name, or ones where the config fixes all factors."""
        if self.config.readout != "learned":
            return jnp.ones((levels, len(text)))
        return Gate(levels, self.config.gates, name=name)(text, log_degree)


def holders(adjacencies: Mapping[Relation, Adjacency]) -> Float32[Array, "I"]:
    """How many users are seen to hold each item of this device."""
    return jnp.asarray(adjacencies[HOLDS].degrees.heard)


def _leave_out(
    share: float, graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], dropout: PRNGKeyArray | None
) -> Mapping[Relation, Adjacency]:
    """A random share of the holdings at weight 0, the same ones both ways, the rest scaled up to keep the mean."""
    if dropout is None or not share:
        return adjacencies
    heard, told = adjacencies[HELD_BY], adjacencies[HOLDS]
    key = jax.random.fold_in(dropout, LEFT_OUT)
    kept_heard = _kept(key, share, graph.numbers(USER, heard.receivers), graph.numbers_of_all(ITEM, heard.senders))
    kept_told = _kept(key, share, graph.numbers_of_all(USER, told.senders), graph.numbers(ITEM, told.receivers))
    return {
        **adjacencies,
        HELD_BY: dataclasses.replace(heard, weight=heard.weight * kept_heard),
        HOLDS: dataclasses.replace(told, weight=told.weight * kept_told),
    }


def _kept(
    key: PRNGKeyArray, share: float, user: Int32[AnyArray, "E"], item: Int32[AnyArray, "E"]
) -> Float32[Array, "E"]:
    """0 with probability `share`, else 1 / (1 - share): a function of the key and the pair, wherever it is drawn."""
    pairs = jnp.concatenate([user, item]).astype(jnp.uint32)  # one block of Threefry a pair: 32 bits of each
    drawn = threefry_2x32(jax.random.key_data(key), pairs)[: len(user)]
    return (drawn >= jnp.uint32(share * 2**32)) / jnp.float32(1 - share)


def _kept_rows(key: PRNGKeyArray, share: float, numbers: Int32[AnyArray, "n"]) -> Bool[Array, "n"]:
    """What `jax.random.bernoulli(key, 1 - share, (nodes,))` says of the nodes of these numbers, and draws no others."""
    drawn = threefry_2x32(jax.random.key_data(key), jnp.stack([jnp.zeros_like(numbers), numbers]).astype(jnp.uint32))
    uniform = (drawn[0] ^ drawn[1]) >> 9  # of 23 bits, as many as a float32 between 1 and 2 has
    return uniform.astype(jnp.float32) * jnp.float32(2**-23) < jnp.float32(1 - share)
