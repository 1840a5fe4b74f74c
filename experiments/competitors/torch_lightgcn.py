"""LightGCN in plain PyTorch, as fast as it gets without code of one's own.

One normalised matrix in compressed sparse rows with 32-bit positions; its product with the rows is MKL's, or cuSPARSE's
where the job names another device than the CPU. The matrix is
symmetric, so the derivative of the propagation is the propagation of the derivative, and nothing is kept for it.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable

import numpy as np
from protocol import Arrays, Job, answer, learning, triples

NEEDS = ("torch", "torch._dynamo", "scipy.sparse")  # the second comes with the first optimiser, and takes seconds
DECAY = 1e-4  # as LightGCN-PyTorch sets it
SHOWN = 1000  # users, and items, whose sums are compared


def normalised(arrays: Arrays):
    """float32 [U + I, U + I] sparse rows: 1 / sqrt(degree of either end) where a user holds an item."""
    import scipy.sparse
    import torch

    n_users, n_items = map(int, arrays["shape"])
    ends = arrays["user"].astype(np.int64), arrays["item"].astype(np.int64) + n_users
    degree = np.maximum(np.bincount(np.concatenate(ends), minlength=n_users + n_items), 1)
    weight = (degree[ends[0]] * degree[ends[1]]) ** -0.5
    half = scipy.sparse.coo_matrix((weight.astype(np.float32), ends), shape=(n_users + n_items,) * 2)
    rows = (half + half.T).tocsr()
    rows.sort_indices()
    positions = (torch.from_numpy(part.astype(np.int32)) for part in (rows.indptr, rows.indices))
    return torch.sparse_csr_tensor(*positions, torch.from_numpy(rows.data), size=rows.shape)


def model(job: Job, arrays: Arrays):
    """(rows, the mean of the layers, a step of BPR with Adam on a triple [B, 3] of rows)."""
    import torch

    torch.set_num_threads(job["threads"])
    device = job.get("device", "cpu")
    matrix, rounds = normalised(arrays).to(device), job["num_layers"]

    class Mean(torch.autograd.Function):
        """The mean of the rows after 0, 1, ..., `rounds` products."""

        @staticmethod
        def forward(ctx, rows):
            return mean(rows)

        @staticmethod
        def backward(ctx, *gradients):
            return mean(gradients[0].contiguous())

    def mean(rows):
        every = rows.clone()
        for _ in range(rounds):
            rows = matrix @ rows
            every += rows
        return every.div_(rounds + 1)

    rows = torch.nn.Parameter(torch.from_numpy(arrays["rows"].copy()).to(device))
    adam = torch.optim.Adam([rows], lr=job["learning_rate"], fused=True)

    def once(triple):
        user, liked, other = Mean.apply(rows)[triple]
        bpr = torch.nn.functional.softplus((user * (other - liked)).sum(dim=1)).mean()
        loss = bpr + DECAY / 2 * rows[triple].square().sum() / triple.shape[1]
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(bpr.detach())

    return rows, mean, once


def step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """A step of BPR with Adam."""
    import torch

    _, _, once = model(job, arrays)
    n_users, device = int(arrays["shape"][0]), job.get("device", "cpu")
    batches = [torch.from_numpy(arrays[f"batch_{name}"].astype(np.int64)) for name in ("user", "item", "other")]
    batches = torch.stack([batches[0], batches[1] + n_users, batches[2] + n_users], dim=1).to(device)
    return lambda number: once(batches[number % len(batches)])


def learn(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Steps on sampled pairs until the time is over."""
    import torch

    rows, mean, once = model(job, arrays)
    n_users, drawn = int(arrays["shape"][0]), triples(job, arrays)

    def advance() -> None:
        user, item, other = map(torch.from_numpy, drawn())
        once(torch.stack([user, item + n_users, other + n_users]))

    def vectors() -> np.ndarray:
        with torch.no_grad():
            return mean(rows).numpy()

    return learning(job, advance, vectors)


def rank(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The k best unseen items of every user: products, seen ones struck out, torch.topk."""
    import torch

    torch.set_num_threads(job["threads"])
    n_users, device = int(arrays["shape"][0]), job.get("device", "cpu")
    users, items = (torch.from_numpy(part).to(device) for part in np.split(arrays["rows"], [n_users]))
    items = items.T.contiguous()
    row, column = (torch.from_numpy(arrays[name].astype(np.int64)).to(device) for name in ("user", "item"))
    start = np.searchsorted(arrays["user"], np.arange(0, n_users + job["batch"], job["batch"]))

    def call(number: int) -> np.ndarray:
        best = []
        with torch.inference_mode():
            for place, first in enumerate(range(0, n_users, job["batch"])):
                scores = users[first : first + job["batch"]] @ items
                seen = slice(start[place], start[place + 1])
                scores[row[seen] - first, column[seen]] = -torch.inf
                best.append(scores.topk(job["k"], dim=1).indices)
        return torch.cat(best).cpu().numpy().astype(np.int32)

    return call


def propagate(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The matrix times the rows: one layer."""
    import torch

    torch.set_num_threads(job["threads"])
    matrix, rows = (part.to(job["device"]) for part in (normalised(arrays), torch.from_numpy(arrays["rows"])))
    return layer_of(lambda: matrix @ rows, int(arrays["shape"][0]))


def layer_of(product: Callable, n_users: int) -> Callable[[int], np.ndarray]:
    """Calls `product` until its result is there; of the first one, the rows of some users and items."""
    import torch

    def call(number: int) -> np.ndarray:
        with torch.inference_mode():
            sums = product()
        if sums.is_cuda:
            torch.cuda.synchronize()
        if number:
            return np.zeros(0)
        return torch.cat([part[:SHOWN] for part in sums.split([n_users, len(sums) - n_users])]).cpu().numpy()

    return call


if __name__ == "__main__":
    learning_tasks = {"step": (NEEDS, step), "learn": (NEEDS, learn)}
    tasks = {**learning_tasks, "rank": (("torch",), rank), "propagate": (NEEDS, propagate)}
    answer(tasks, ("torch", "numpy", "scipy"))
