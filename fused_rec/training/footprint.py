"""Memory estimates of training and evaluation, from the sizes of graph and config; too large ones are refused early.

N nodes, U users, I items, E directed edges over all relations, W columns of text embeddings, K dimensions, L layers,
P devices, B branches. Numbers are float32 or int32: 4 bytes.
"""

import jax

from fused_rec.config import Config
from fused_rec.distributed.devices import select_devices
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import ITEM, NO_TEXT_DIM, USER
from fused_rec.memory import require_device_memory
from fused_rec.model.late_fusion import LateFusion
from fused_rec.model.model import active_relations
from fused_rec.training.finetune import EncoderData
from fused_rec.training.train_step import GraphInputs, reads_batch_users_only

NUMBER = 4  # bytes
EDGE = 5 * NUMBER  # stored in two orders, by receiver and by sender
FIXED_LAYERS = 4  # rows of each node that both passes of propagation have at a time, where no factor is learned
REMEDY = "lower train.batch_size or model.dim, sample neighbors (docs/SCALE.md), raise data.k_core, or use more devices"


def _num_branches(config: Config, graph: DeviceGraph) -> int:
    return 2 if config.model.fuses_text and graph.text[ITEM].shape[1] > NO_TEXT_DIM else 1


def task_bytes(config: Config, graph: DeviceGraph, devices: int) -> int:
    """Returns the bytes of one device's text embeddings and edges, or of the edge weights that edge dropout changes.

    One CPU device reads those of the host in place.
    """
    n_edges = sum(count for _, count in graph.relations)
    if devices == 1 and jax.default_backend() == "cpu":
        return EDGE * n_edges if config.model.edge_dropout else 0
    width = max(rows.shape[1] for rows in graph.text.values())
    rows = sum(count for _, count in graph.node_types)
    return (NUMBER * rows * width + EDGE * n_edges) // devices


def review_bytes(graph: DeviceGraph, num_reviews: int, devices: int) -> int:
    """Returns the bytes of one device's inputs of review dropout, and of three rows of each node while it runs.

    Vectors, indices, row starts and degrees of reviews are on every device.
    """
    if not num_reviews:
        return 0
    width = graph.text[ITEM].shape[1]
    rows = graph.count(USER) + graph.count(ITEM)
    replicated = NUMBER * (num_reviews * (width + 7) + 2 * width * (width + 1))
    return replicated + (2 * EDGE * num_reviews + NUMBER * rows * (3 * width + 3)) // devices


def state_bytes(config: Config, graph: DeviceGraph, devices: int) -> int:
    """Returns the bytes of one device's ID embeddings, their gradient and AdamW's two moments."""
    if not config.model.uses_ids:
        return 0
    rows = sum(count for node_type, count in graph.node_types if node_type != USER or config.model.user_id_embedding)
    return 4 * NUMBER * rows * config.model.dim // devices


def rounds_bytes(config: Config, graph: DeviceGraph, devices: int) -> int:
    """Returns the bytes of all layers of all branches on one device, and of one layer gathered from other devices.

    Rows of users are gathered for edges between users only (`Relation.by_sender`); sums over those of a device take
    the place of gathered rows.
    """
    rows = sum(count for _, count in graph.node_types)
    layers = rows * _num_branches(config, graph) * (config.model.num_layers + 1) // devices
    return NUMBER * config.model.dim * (layers + _gathered_rows(config, graph, devices))


def _gathered_rows(config: Config, graph: DeviceGraph, devices: int) -> int:
    """How many rows of one layer a device has from others, and of partial sums; one device: of the next layer."""
    sources = {relation.source for relation in active_relations(config.model, graph) if not relation.by_sender}
    nodes = [count if devices == 1 else 2 * count * (name in sources) for name, count in graph.node_types]
    return sum(nodes)


def backward_bytes(config: Config, graph: DeviceGraph, devices: int) -> int:
    """Returns the bytes of the layers on one device in both passes of a step.

    Where gates, source scales and layer weights are learned, their derivatives need the rows and the sums of every
    layer of the first branch, and so do noise and a loss of the first layer; the text branch, of one layer, takes the
    place of rows that are no longer needed. The last layer is that of the batch's users where `reads_batch_users_only`.
    Where no factor is learned, no layer is kept: there are one and the next, their sum and its derivative, whatever
    the number of layers.
    """
    model, gathered = config.model, _gathered_rows(config, graph, devices) if devices > 1 else 0
    nodes = sum(count for _, count in graph.node_types)
    if model.layer_combination == "learned" or model.embedding_noise or config.train.contrastive_weight:
        rows = nodes if model.uses_ids or model.users_start_as_items else graph.count(ITEM)
        layers = model.effective_layers + (1 if reads_batch_users_only(config, devices) else 2)
        return 2 * NUMBER * model.dim * (rows * layers // devices + gathered)
    rows = FIXED_LAYERS * nodes * _num_branches(config, graph)
    return NUMBER * model.dim * (rows // devices + gathered)


def loss_bytes(config: Config, graph: DeviceGraph, devices: int) -> int:
    """Returns the bytes of one device's scores in the loss and their gradient, for one branch at a time."""
    users = -(-min(config.train.batch_size, graph.count(USER)) // devices)
    scored = {
        "softmax": graph.count(ITEM),
        "sampled_softmax": config.train.batch_size * config.train.num_negatives,
        "bpr": config.train.positives_per_user * config.model.dim,
    }
    return 2 * NUMBER * users * scored[config.train.loss]


def vector_bytes(config: Config, graph: DeviceGraph, fusion: LateFusion | None = None) -> int:
    """Returns the bytes of the embeddings of all users and items, replicated on every device."""
    columns = _num_branches(config, graph) * config.model.dim + 1
    if fusion is not None:
        columns = columns * len(fusion.trained) + sum(part.target.shape[1] for part in fusion.closed)
    return NUMBER * (graph.count(USER) + graph.count(ITEM)) * columns


def encoder_bytes(config: Config, words: EncoderData, devices: int) -> int:
    """Returns the bytes of a trained text encoder: weights, with gradient and moments if full, and one chunk of texts.

    Backpropagation keeps about eight hidden rows, two intermediate rows and two attention rows per layer and token.
    """
    model, length = words.model.config, int(words.bucket_length.max())
    weights = sum(leaf.size for leaf in jax.tree.leaves(words.model.params))
    tokens = length * min(
        max(1, config.text.batch_tokens // length), -(-config.text.finetune_texts_per_step // devices)
    )
    of_token = 8 * model.hidden_size + 2 * model.intermediate_size + 2 * model.num_attention_heads * length
    copies = 4 if config.text.finetune == "full" else 1
    return NUMBER * (copies * weights + model.num_hidden_layers * tokens * of_token)


def require_step(
    config: Config, graph_inputs: GraphInputs, words: EncoderData | None = None, num_reviews: int = 0
) -> None:
    """Checks that a training step on the whole graph fits on each device.

    Args:
      config: all settings.
      graph_inputs: of the whole graph.
      words: texts and encoder, if the encoder is trained.
      num_reviews: reviews that edge dropout drops too (`fused_rec.training.inputs.dropped_reviews`).

    Raises:
      InsufficientMemoryError: it does not fit.
    """
    graph, devices = graph_inputs.graph, len(select_devices(None))
    need = task_bytes(config, graph, devices) + review_bytes(graph, num_reviews, devices)
    need += state_bytes(config, graph, devices) + backward_bytes(config, graph, devices)
    need += loss_bytes(config, graph, devices)
    remedy = REMEDY
    if words is not None:
        need += encoder_bytes(config, words, devices)
        remedy = (
            f"lower text.batch_tokens or text.finetune_texts_per_step, set text.finetune to lora or frozen, {REMEDY}"
        )
    what = f"training over {sum(count for _, count in graph.node_types):,} nodes with {config.model.dim} dimensions"
    require_device_memory(need, what, remedy)


def require_embedding(config: Config, graph_inputs: GraphInputs, remedy: str = REMEDY) -> None:
    """Checks that the embeddings of all nodes fit on each device.

    Args:
      config: all settings.
      graph_inputs: of the whole graph.
      remedy: what the message advises.

    Raises:
      InsufficientMemoryError: they do not fit.
    """
    graph, devices = graph_inputs.graph, len(select_devices(None))
    need = task_bytes(config, graph, devices) + state_bytes(config, graph, devices) // 4
    need += rounds_bytes(config, graph, devices) + 2 * vector_bytes(config, graph, graph_inputs.fusion)
    what = f"the embeddings of {graph.count(USER):,} users and {graph.count(ITEM):,} items"
    require_device_memory(need, what, remedy)
