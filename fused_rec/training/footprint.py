"""What a run has in memory, from the sizes of its graph and config: said, and refused, before it begins.

N nodes, U users, I items, E directed edges over all relations, W columns of words, K dimensions, L rounds, P devices,
T towers. Numbers are float32 or int32: 4 bytes.
"""

import jax

from fused_rec.config import Config
from fused_rec.distributed.devices import select_devices
from fused_rec.graph.build import ITEM, NO_TEXT_DIM, USER
from fused_rec.graph.hetero import HeteroGraph
from fused_rec.memory import require_device_memory
from fused_rec.training.finetune import EncoderData
from fused_rec.training.train_step import GraphInputs

NUMBER = 4  # bytes
EDGE = 5 * NUMBER  # both ways of sorting
REMEDY = (
    "lower train.batch_size or model.dim, sample neighbours (docs/SCALE.md), raise data.k_core, or use more devices"
)


def _towers(config: Config, graph: HeteroGraph) -> int:
    return 2 if config.model.variant == "fused" and graph.text(ITEM).shape[1] > NO_TEXT_DIM else 1


def task_bytes(graph: HeteroGraph, devices: int) -> int:
    """Of what a device has of the graph: its words and edges."""
    n_edges = sum(count for _, count in graph.relations)
    width = max(graph.text(node_type).shape[1] for node_type, _ in graph.node_types)
    rows = sum(count for _, count in graph.node_types)
    return (NUMBER * rows * width + EDGE * n_edges) // devices


def state_bytes(config: Config, graph: HeteroGraph, devices: int) -> int:
    """Of a device's id rows, their gradient and AdamW's two moments."""
    if config.model.variant == "text":
        return 0
    rows = sum(count for node_type, count in graph.node_types if node_type != USER or config.model.user_id_embedding)
    return 4 * NUMBER * rows * config.model.dim // devices


def rounds_bytes(config: Config, graph: HeteroGraph, devices: int) -> int:
    """Of the rows of all rounds of all towers, and one round's rows of all devices."""
    rows = sum(count for _, count in graph.node_types)
    return (
        NUMBER * rows * config.model.dim * (_towers(config, graph) * (config.model.num_layers + 1) + devices) // devices
    )


def loss_bytes(config: Config, graph: HeteroGraph, devices: int) -> int:
    """Of a device's scores in the loss and their gradient, of each tower in turn."""
    users = -(-min(config.train.batch_size, graph.count(USER)) // devices)
    scored = {
        "softmax": graph.count(ITEM),
        "sampled_softmax": config.train.batch_size * config.train.num_negatives,
        "bpr": config.train.positives_per_user * config.model.dim,
    }
    return 2 * NUMBER * users * scored[config.train.loss]


def vector_bytes(config: Config, graph: HeteroGraph) -> int:
    """Of the vectors of all users and items, which every device has whole."""
    columns = _towers(config, graph) * config.model.dim + 1
    columns += min(config.model.ease_rank, graph.count(USER), graph.count(ITEM)) if config.model.ease_weight else 0
    return NUMBER * (graph.count(USER) + graph.count(ITEM)) * columns


def encoder_bytes(config: Config, words: EncoderData, devices: int) -> int:
    """Of the language model where it is trained: weights, with gradient and moments if all are, and one chunk of texts.

    Of each layer and token of a chunk the way back needs some eight rows, the inner ones twice, and attention twice.
    """
    model, length = words.model.config, int(words.bucket_length.max())
    weights = sum(leaf.size for leaf in jax.tree.leaves(words.model.params))
    tokens = length * min(
        max(1, config.text.batch_tokens // length), -(-config.text.finetune_texts_per_step // devices)
    )
    of_token = 8 * model.hidden_size + 2 * model.intermediate_size + 2 * model.num_attention_heads * length
    copies = 4 if config.text.finetune == "full" else 1
    return NUMBER * (copies * weights + model.num_hidden_layers * tokens * of_token)


def require_step(config: Config, graph_inputs: GraphInputs, words: EncoderData | None = None) -> None:
    """Raises InsufficientMemoryError where a training step over the whole graph does not fit on each device.

    words: where the language model is trained too.
    """
    graph, devices = graph_inputs.graph, len(select_devices(None))
    parts = (state_bytes(config, graph, devices), rounds_bytes(config, graph, devices))
    need = task_bytes(graph, devices) + 2 * parts[1] + parts[0] + loss_bytes(config, graph, devices)
    remedy = REMEDY
    if words is not None:
        need += encoder_bytes(config, words, devices)
        remedy = (
            f"lower text.batch_tokens or text.finetune_texts_per_step, set text.finetune to lora or frozen, {REMEDY}"
        )
    what = f"training over {sum(count for _, count in graph.node_types):,} nodes with {config.model.dim} dimensions"
    require_device_memory(need, what, remedy)


def require_embedding(config: Config, graph_inputs: GraphInputs, remedy: str = REMEDY) -> None:
    """Raises InsufficientMemoryError where the vectors of all nodes do not fit on each device."""
    graph, devices = graph_inputs.graph, len(select_devices(None))
    need = task_bytes(graph, devices) + state_bytes(config, graph, devices) // 4
    need += rounds_bytes(config, graph, devices) + 2 * vector_bytes(config, graph)
    what = f"the vectors of {graph.count(USER):,} users and {graph.count(ITEM):,} items"
    require_device_memory(need, what, remedy)
