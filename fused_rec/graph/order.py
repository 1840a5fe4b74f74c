"""Orders of edges by counting sorts: linear in time, and without 64-bit keys in memory."""

import numpy as np
import scipy.sparse
from jaxtyping import Int, Int32

from fused_rec.graph.schema import Edges

LINE = 64  # bytes; JAX on a CPU reads an array that begins at a multiple of it in place, and copies any other


def counting_order(nodes: Int[np.ndarray, "E"], count: int) -> tuple[Int32[np.ndarray, "E"], Int32[np.ndarray, "_"]]:
    """Sorts edges by node; edges of one node keep their order.

    Args:
      nodes: int [E], the node of each edge, below `count`.
      count: the number of nodes.

    Returns:
      The permutation, int32 [E], and where each node's edges start in it, int32 [count + 1].
    """
    # The transpose of a matrix with one entry in each row is a stable counting sort.
    rows, ones = np.arange(len(nodes) + 1, dtype=np.int32), np.ones(len(nodes), np.bool_)
    turned = scipy.sparse.csr_matrix((ones, nodes, rows), (len(nodes), count)).tocsc()
    return turned.indices, turned.indptr


def order_edges(edges: Edges, n_sources: int, n_targets: int) -> Edges:
    """Sorts edges by (receiver, sender).

    Args:
      edges: in any order, within the numbers of nodes.
      n_sources: the number of source nodes.
      n_targets: the number of target nodes.

    Returns:
      The edges, int32 and float32, each array aligned (`aligned`).
    """
    senders, receivers = (nodes.astype(np.int32, copy=False) for nodes in edges[:2])
    parts = senders, receivers, edges.weight.astype(np.float32, copy=False)
    order = None if ascends(senders) else counting_order(senders, n_sources)[0]
    last = receivers if order is None else receivers[order]
    if not ascends(last):
        by_receiver = counting_order(last, n_targets)[0]
        order = by_receiver if order is None else order[by_receiver]
    return Edges(*(aligned(part if order is None else part[order]) for part in parts))


def row_starts(nodes: Int[np.ndarray, "E"], count: int) -> Int32[np.ndarray, "_"]:
    """Returns where each node's edges start in edges that ascend by node, int32 [count + 1]."""
    return np.concatenate([[0], np.cumsum(np.bincount(nodes, minlength=count))]).astype(np.int32)


def ascends(nodes: Int[np.ndarray, "E"]) -> bool:
    """Returns whether no node is below the one before it."""
    return bool((nodes[1:] >= nodes[:-1]).all())


def aligned(array: np.ndarray) -> np.ndarray:
    """Returns the array where it begins at a multiple of `LINE`, else a copy that does."""
    if array.ctypes.data % LINE == 0 and array.flags.c_contiguous:
        return array
    memory = np.empty(array.nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
