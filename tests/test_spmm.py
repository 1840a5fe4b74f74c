"""The sparse sum and its other half against dense matrices, with every derivative, on all backends."""

import functools
import os
import shutil
import subprocess
import sys
import typing

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from fused_rec.graph.adjacency import Backend, build_adjacency, default_backend
from fused_rec.graph.schema import Edges
from fused_rec.graph.spmm import edge_dot, gated_sum, gated_sum_of, neighbor_sum

BACKENDS: list[Backend] = [
    backend for backend in typing.get_args(Backend) if backend != "compiled" or default_backend() == backend
]

#   sources 0   1   2   3      weights: 0 -> 0 is 2, 1 -> 0 is 3, 1 -> 2 is -1
#           | / |              source 2 and 3 send to nobody, target 1 has no source
#   targets 0   2   1
HAND = Edges(np.array([0, 1, 1]), np.array([0, 0, 2]), np.array([2, 3, -1], np.float32))


def edges_of(matrix) -> Edges:
    """The edges of a dense targets x sources matrix, ascending by (receiver, sender)."""
    receivers, senders = np.nonzero(matrix)
    return Edges(senders, receivers, matrix[receivers, senders].astype(np.float32))


def dense(adjacency, weight, n_targets):
    """The oracle: the relation as a targets x sources matrix."""
    shape = (n_targets, len(adjacency.sender_start) - 1)
    return jnp.zeros(shape).at[adjacency.receivers, adjacency.senders].add(weight)


def random_case(seed, n_sources=6, n_targets=5, n_edges=13, width=3):
    """A targets x sources matrix with so many entries, and x of the sources and y of the targets."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((n_targets, n_sources))
    matrix.flat[rng.permutation(matrix.size)[:n_edges]] = rng.normal(size=n_edges)
    x, y = (rng.normal(size=(n, width)).astype(np.float32) for n in (n_sources, n_targets))
    return matrix, jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    adjacency = build_adjacency(HAND, 4, 3, backend)
    x = jnp.array([[1, 10], [2, 20], [100, 100], [100, 100]], jnp.float32)
    # target 0: 2 * (1, 10) + 3 * (2, 20); target 1: nothing; target 2: -(2, 20)
    assert neighbor_sum(adjacency, adjacency.weight, x).tolist() == [[8, 80], [0, 0], [-2, -20]]
    y = jnp.array([[1, 1], [7, 7], [0, -1]], jnp.float32)
    # (1, 1)(1, 10), (1, 1)(2, 20), (0, -1)(2, 20): no weight in it
    assert edge_dot(adjacency, y, x).tolist() == [11, 22, -20]


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_rows_are_summed_in_float32(backend):
    """4,096 ones: a sum in bfloat16 would stay at 256, after which adding 1 changes nothing."""
    count = 4096
    star = Edges(np.arange(count), np.zeros(count, np.int64), np.ones(count, np.float32))
    adjacency = build_adjacency(star, count, 1, backend)
    y = neighbor_sum(adjacency, adjacency.weight, jnp.ones((count, 2), jnp.bfloat16))
    assert y.dtype == jnp.float32
    assert y.tolist() == [[count, count]]
    # The other way round: one source, a neighbor of all, aggregates all.
    back = Edges(np.zeros(count, np.int64), np.arange(count), np.ones(count, np.float32))
    reverse = build_adjacency(back, 1, count, backend)
    by_weight, by_x = jax.grad(lambda w, x: neighbor_sum(reverse, w, x).sum(), (0, 1))(
        jnp.asarray(reverse.weight), jnp.ones((1, 2), jnp.bfloat16)
    )
    assert by_x.dtype == jnp.bfloat16
    assert by_x.tolist() == [[count, count]]
    assert by_weight.dtype == jnp.float32
    assert set(by_weight.tolist()) == {2.0}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_kernel_is_built_where_it_can_be():
    assert "compiled" in BACKENDS, "reinstall with: pip install -e ."


@pytest.mark.parametrize("width", [1, 15, 16, 64, 79, 128, 209])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_width_over_many_threads(width, dtype):
    """Rows from none to hundreds of edges, enough for every thread to have several parts; each width has its loops."""
    rng = np.random.default_rng(width)
    n, degrees = 700, rng.zipf(1.5, 700).clip(max=400) - 1
    receivers = np.repeat(np.arange(n), degrees)
    edges = Edges(rng.integers(0, n, len(receivers)), receivers, rng.normal(size=len(receivers)).astype(np.float32))
    matrix = scipy.sparse.coo_array((edges.weight.astype(float), (receivers, edges.senders)), shape=(n, n)).tocsr()
    x, g = (jnp.asarray(rng.normal(size=(n, width)), dtype) for _ in range(2))
    rounding = float(jnp.finfo(dtype).eps) / 2  # of the derivative, which has the type of x
    for backend in BACKENDS:
        adjacency = build_adjacency(edges, n, n, backend)
        y, back = jax.vjp(lambda x, adjacency=adjacency: neighbor_sum(adjacency, adjacency.weight, x), x)
        np.testing.assert_allclose(y, matrix @ np.asarray(x, float), rtol=1e-5, atol=1e-4)
        (into,) = back(g.astype(jnp.float32))
        np.testing.assert_allclose(into.astype(float), matrix.T @ np.asarray(g, float), rtol=rounding + 1e-5, atol=1e-4)


EDGE_CASES = {
    "none": np.zeros((3, 4)),
    "one": np.eye(3, 4) * [[0], [5], [0]],
    "first row empty": np.array([[0, 0], [1, 2]]),
    "last row empty": np.array([[1, 2], [0, 0]]),
    "last column empty": np.array([[1, 0], [2, 0]]),
    "full": np.arange(1, 13).reshape(3, 4),
    "one of each": np.ones((1, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", EDGE_CASES.values(), ids=EDGE_CASES)
def test_edge_cases(matrix, backend):
    rng = np.random.default_rng(0)
    y, x = (jnp.asarray(rng.normal(size=(n, 2)), jnp.float32) for n in matrix.shape)
    adjacency = build_adjacency(edges_of(matrix), matrix.shape[1], matrix.shape[0], backend)
    np.testing.assert_allclose(neighbor_sum(adjacency, adjacency.weight, x), matrix @ x, rtol=1e-5, atol=1e-6)
    pairs = np.nonzero(matrix)
    np.testing.assert_allclose(edge_dot(adjacency, y, x), (y @ x.T)[pairs], rtol=1e-5, atol=1e-6)
    weight, into = jax.vjp(lambda weight, x: neighbor_sum(adjacency, weight, x), adjacency.weight, x)[1](y)
    np.testing.assert_allclose(weight, (y @ x.T)[pairs], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(into, matrix.T @ y, rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    sizes=st.sampled_from([(7, 2), (4, 5)]),
    n_edges=st.sampled_from([0, 1, 8, 14]),
)
def test_any_graph_equals_its_matrix(seed, sizes, n_edges):
    matrix, x, y = random_case(seed, sizes[0], sizes[1], n_edges)
    results = []
    for backend in BACKENDS:
        adjacency = build_adjacency(edges_of(matrix), sizes[0], sizes[1], backend)
        results.append((neighbor_sum(adjacency, adjacency.weight, x), edge_dot(adjacency, y, x)))
        np.testing.assert_allclose(results[-1][0], matrix @ x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(results[-1][1], (y @ x.T)[np.nonzero(matrix)], rtol=1e-4, atol=1e-5)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# --- derivatives ---------------------------------------------------------------------------------------------------


def of_sum(adjacency, weight, x):
    return jnp.sin(neighbor_sum(adjacency, weight, x)).sum()


def of_sum_dense(adjacency, weight, x, n_targets=5):
    return jnp.sin(dense(adjacency, weight, n_targets) @ x).sum()


def of_dot(adjacency, y, x):
    return jnp.sin(edge_dot(adjacency, y, x)).sum()


def of_dot_dense(adjacency, y, x):
    return jnp.sin((y @ x.T)[adjacency.receivers, adjacency.senders]).sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_the_matrix(backend, seed):
    matrix, x, y = random_case(seed)
    adjacency = build_adjacency(edges_of(matrix), 6, 5, backend)
    for ours, oracle, left in ((of_sum, of_sum_dense, adjacency.weight), (of_dot, of_dot_dense, y)):
        got = jax.jit(jax.grad(ours, (1, 2)))(adjacency, left, x)
        expected = jax.jit(jax.grad(oracle, (1, 2)))(adjacency, left, x)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_slopes(backend):
    matrix, x, y = random_case(2)
    adjacency = build_adjacency(edges_of(matrix), 6, 5, backend)
    for function, left in ((neighbor_sum, adjacency.weight), (edge_dot, y)):

        @jax.jit
        def of_arrays(left, x, function=function):
            return function(adjacency, left, x)

        check_grads(of_arrays, (left, x), 1, ["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_weighted_by_a_dot(backend):
    """As affinities use the pair: the derivative of one runs through the other."""
    matrix, x, y = random_case(3)
    adjacency = build_adjacency(edges_of(matrix), 6, 5, backend)

    def ours(y, x):
        return (neighbor_sum(adjacency, jnp.tanh(edge_dot(adjacency, y, x)), x) ** 2).sum()

    def oracle(y, x):
        return ((((matrix != 0) * jnp.tanh(y @ x.T)) @ x) ** 2).sum()

    for one, other in zip(jax.grad(ours, (0, 1))(y, x), jax.grad(oracle, (0, 1))(y, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- devices -------------------------------------------------------------------------------------------------------


def sum_and_slope(adjacency, x):
    y, back = jax.vjp(lambda x: neighbor_sum(adjacency, adjacency.weight, x), x)
    return y, back(y)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_four_devices(backend):
    """Columns apart: each device sums its own share of x, none needs to know of the others."""
    matrix, *_ = random_case(4)
    adjacency = build_adjacency(edges_of(matrix), 6, 5, backend)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 2)), jnp.float32)
    y, slope = jax.pmap(sum_and_slope, in_axes=(None, 0))(adjacency, x)
    np.testing.assert_allclose(y, matrix @ x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope, matrix.T @ (matrix @ x), rtol=1e-4, atol=1e-5)


def test_segment_passes_the_replication_check():
    """jaxlib's CSR product has no rule for it, so a check of a step over devices must run on `segment`."""
    matrix, x, _ = random_case(5, width=4)
    adjacency = build_adjacency(edges_of(matrix), 6, 5, "segment")

    def step(adjacency, x):
        return sum_and_slope(jax.lax.pcast(adjacency, "devices", to="varying"), x)

    columns = PartitionSpec(None, "devices")
    mapped = jax.shard_map(
        step,
        mesh=Mesh(np.array(jax.devices()), ("devices",)),
        in_specs=(PartitionSpec(), columns),
        out_specs=(columns, columns),
    )
    y, slope = jax.jit(mapped)(adjacency, x)
    np.testing.assert_allclose(y, matrix @ x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope, matrix.T @ (matrix @ x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_of_sources_and_targets(backend):
    """The same as rows multiplied beforehand and sums afterwards, with all four derivatives."""
    matrix, x, y = random_case(3)
    adjacency = build_adjacency(edges_of(matrix), len(x), len(y), backend)
    rng = np.random.default_rng(4)
    scale, gate = (jnp.asarray(rng.normal(size=len(rows)), jnp.float32) for rows in (x, y))

    def plain(weight, scale, gate, x):
        return (gate[:, None] * neighbor_sum(adjacency, weight, scale[:, None] * x) * y).sum()

    def ours(weight, scale, gate, x):
        return (gated_sum(adjacency, weight, scale, gate, x) * y).sum()

    arguments = jnp.asarray(adjacency.weight), scale, gate, x
    expected, found = (jax.value_and_grad(function, (0, 1, 2, 3))(*arguments) for function in (plain, ours))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_factors_with_narrow_rows(backend):
    """Products are float32: 1 / 3 is no number of bfloat16. Derivatives of rows are rounded to their type."""
    adjacency = build_adjacency(HAND, 4, 3, backend)
    x, scale, gate = jnp.ones((4, 2), jnp.bfloat16), jnp.full(4, 1 / 3), jnp.array([2.0, 1.0, 3.0])
    y = gated_sum(adjacency, adjacency.weight, scale, gate, x)
    np.testing.assert_allclose(y, [[10 / 3] * 2, [0, 0], [-1, -1]], rtol=1e-6)
    by_scale, by_x = jax.grad(lambda scale, x: gated_sum(adjacency, adjacency.weight, scale, gate, x).sum(), (0, 1))(
        scale, x
    )
    np.testing.assert_allclose(by_scale, [8, 6, 0, 0], rtol=1e-6)
    assert by_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(by_x[:2, 0].astype(jnp.float32), [4 / 3, 1], rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 16, 64])
def test_some_rows_are_rows_of_all(backend, width):
    """With all four derivatives; a row may be wanted twice, and target 2 has no source."""
    matrix, x, _ = random_case(6, width=width)
    matrix[2] = 0
    adjacency = build_adjacency(edges_of(matrix), 6, 5, backend)
    rng, rows = np.random.default_rng(7), jnp.array([3, 2, 3, 0])
    y = rng.normal(size=(4, width)).astype(np.float32)
    scale, gate = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (6, 5))

    def from_all(weight, scale, gate, x):
        return (gated_sum(adjacency, weight, scale, gate, x)[rows] * y).sum()

    def some(weight, scale, gate, x):
        return (gated_sum_of(adjacency, weight, scale, gate[rows], x, rows) * y).sum()

    arguments = jnp.asarray(adjacency.weight), scale, gate, x
    expected, found = (jax.value_and_grad(function, (0, 1, 2, 3))(*arguments) for function in (from_all, some))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_rows_of_narrow_rows(backend):
    """Derivatives as of the whole sum: products are float32, and the derivative of x is rounded to its type."""
    adjacency = build_adjacency(HAND, 4, 3, backend)
    x, scale, rows = jnp.ones((4, 2), jnp.bfloat16), jnp.full(4, 1 / 3), jnp.array([2, 0])
    gate = jnp.array([3.0, 2.0])
    y, back = jax.vjp(lambda x: gated_sum_of(adjacency, adjacency.weight, scale, gate, x, rows), x)
    np.testing.assert_allclose(y, [[-1, -1], [10 / 3] * 2], rtol=1e-6)
    [by_x] = back(jnp.ones((2, 2)))
    assert by_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(by_x[:2, 0].astype(jnp.float32), [4 / 3, 1], rtol=1e-2)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="no kernel was compiled here")
@pytest.mark.parametrize("width", [5, 16, 40, 64, 209])  # threads share rows of one cache line, columns of longer ones
def test_some_rows_by_several_threads_are_those_by_one(width):
    """Enough edges for every thread; each number of the derivative is added to by one of them, in the order of rows."""
    rng = np.random.default_rng(8)
    senders, receivers = np.sort(rng.choice(300, (200, 40)).ravel()), np.repeat(np.arange(200), 40)
    edges = Edges(senders, receivers, rng.normal(size=8000).astype(np.float32))
    chosen = rng.integers(0, 200, 900)
    chosen[500:600] = chosen[-90:] = 7  # as the padding of a batch, of which some has no derivative
    x, rows = jnp.asarray(rng.normal(size=(300, width)), jnp.float32), jnp.asarray(chosen)
    by_backend = [build_adjacency(edges, 300, 200, backend) for backend in ("compiled", "segment")]

    def values(adjacency):
        function = functools.partial(gated_sum_of, adjacency, adjacency.weight, jnp.ones(300), jnp.ones(900), rows=rows)
        y, back = jax.vjp(lambda x: function(x), x)
        return y, *back(y.at[-90:].set(0))

    for found, expected in zip(*map(values, by_backend), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="no kernel was compiled here")
def test_no_number_of_threads_changes_a_bit():
    """One, and more threads than a row of 40 numbers has cache lines: they share its columns, and the rows as well."""
    found = set()
    for threads in ("1", "7"):  # NPROC is what XLA sizes its pool by
        environment = os.environ | {"NPROC": threads, "JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run([sys.executable, "-c", DERIVATIVES], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1, found


DERIVATIVES = """
import hashlib, jax, numpy as np
from fused_rec import kernels
assert kernels.usable()
rng = np.random.default_rng(0)
start, senders = np.arange(201, dtype=np.int32) * 40, rng.integers(0, 300, 8000).astype(np.int32)
weight, rows = rng.normal(size=8000).astype(np.float32), rng.integers(0, 200, 900).astype(np.int32)
y = rng.normal(size=(900, 40)).astype(np.float32)
call = jax.ffi.ffi_call("fused_rec_spread_from", jax.ShapeDtypeStruct((300, 40), np.float32))
print(hashlib.sha256(np.asarray(call(start, senders, weight, y, rows)).tobytes()).hexdigest())
"""


@pytest.mark.skipif("compiled" not in BACKENDS, reason="no kernel was compiled here")
@pytest.mark.parametrize("row", [-1, 3])
def test_the_kernel_refuses_a_row_that_is_not_there(row):
    adjacency = build_adjacency(HAND, 4, 3, "compiled")
    with pytest.raises(jax.errors.JaxRuntimeError, match="one row of the sums"):
        gated_sum_of(adjacency, adjacency.weight, jnp.ones(4), jnp.ones(1), jnp.ones((4, 2)), jnp.array([row]))
