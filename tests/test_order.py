"""Orders of edges, against NumPy's sorts."""

import numpy as np
import pytest

from fused_rec.graph.order import LINE, aligned, ascends, counting_order, order_edges, row_starts
from fused_rec.graph.schema import Edges


@pytest.mark.parametrize("n_edges", [0, 1, 500])
def test_a_counting_order_is_a_stable_sort(n_edges):
    nodes = np.random.default_rng(0).integers(0, 20, n_edges)
    order, start = counting_order(nodes, 23)
    np.testing.assert_array_equal(order, np.argsort(nodes, kind="stable"))
    np.testing.assert_array_equal(start, np.searchsorted(np.sort(nodes), np.arange(24)))
    np.testing.assert_array_equal(row_starts(nodes, 23), start)
    assert order.dtype == start.dtype == np.int32


@pytest.mark.parametrize("given", ["in no order", "by sender", "by receiver", "sorted"])
def test_edges_are_sorted_by_receiver_then_sender(given):
    rng = np.random.default_rng(1)
    receivers, senders = np.divmod(rng.permutation(30 * 7)[:90], 7)
    keys = {"in no order": (), "by sender": (senders,), "by receiver": (receivers,), "sorted": (senders, receivers)}
    before = np.lexsort(keys[given]) if keys[given] else np.arange(90)
    edges = Edges(senders[before], receivers[before], (senders * 100.0 + receivers)[before])
    found = order_edges(edges, 7, 30)
    order = np.lexsort((edges.senders, edges.receivers))
    for own, part in zip(found, edges, strict=True):
        np.testing.assert_array_equal(own, part[order])
        assert own.ctypes.data % LINE == 0
    assert [part.dtype for part in found] == [np.int32, np.int32, np.float32]


def test_aligned_arrays_are_not_copied():
    for shift in range(LINE):
        memory = np.zeros(4 * LINE, np.uint8)[shift : shift + LINE]
        found = aligned(memory)
        assert found.ctypes.data % LINE == 0
        assert np.shares_memory(found, memory) == (memory.ctypes.data % LINE == 0)
    assert aligned(np.arange(12).reshape(3, 4).T).tolist() == np.arange(12).reshape(3, 4).T.tolist()


def test_order_is_recognized():
    assert ascends(np.array([], int))
    assert ascends(np.array([1, 1, 4]))
    assert not ascends(np.array([1, 4, 3]))
