"""PyTorch Geometric's LightGCN over a sparse CSR matrix, which is the fastest adjacency that it takes on a CPU.

The matrix is normalised once: otherwise each of the three layers would do so in every step.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable

import numpy as np
from protocol import Arrays, Job, answer, learning, triples
from torch_lightgcn import DECAY, NEEDS, layer_of, normalised


def model(job: Job, arrays: Arrays):
    """(the matrix, the package's model, a step of its own loss with Adam on labels [2, 2 B])."""
    import torch
    from torch_geometric.nn import LightGCN

    torch.set_num_threads(job["threads"])
    device = job.get("device", "cpu")
    matrix = normalised(arrays).to(device)
    n_nodes, dim = arrays["rows"].shape
    model = LightGCN(n_nodes, dim, job["num_layers"], normalize=False).to(device)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.from_numpy(arrays["rows"]))
    adam = torch.optim.Adam(model.parameters(), lr=job["learning_rate"])

    def once(label) -> float:
        liked, rest = model(matrix, label).chunk(2)
        loss = model.recommendation_loss(liked, rest, node_id=label.unique(), lambda_reg=DECAY)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(torch.nn.functional.softplus(rest - liked).mean().detach())

    return matrix, model, once


def step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """A step of the package's own recommendation loss with Adam."""
    import torch

    _, _, once = model(job, arrays)
    n_users, device = int(arrays["shape"][0]), job.get("device", "cpu")
    user, item, other = (
        torch.from_numpy(arrays[f"batch_{name}"].astype(np.int64)).to(device) for name in ("user", "item", "other")
    )
    labels = torch.stack([torch.cat([user, user], 1), torch.cat([item, other], 1) + n_users], dim=1)
    return lambda number: once(labels[number % len(labels)])


def learn(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Steps on sampled pairs until the time is over."""
    import torch

    matrix, lightgcn, once = model(job, arrays)
    n_users, drawn = int(arrays["shape"][0]), triples(job, arrays)

    def advance() -> None:
        user, item, other = map(torch.from_numpy, drawn())
        once(torch.stack([torch.cat([user, user]), torch.cat([item, other]) + n_users]))

    def vectors() -> np.ndarray:
        with torch.no_grad():
            return lightgcn.get_embedding(matrix).numpy()

    return learning(job, advance, vectors)


def propagate(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """One layer of the package."""
    import torch
    from torch_geometric.nn import LGConv

    torch.set_num_threads(job["threads"])
    matrix, rows = (part.to(job["device"]) for part in (normalised(arrays), torch.from_numpy(arrays["rows"])))
    layer = LGConv(normalize=False)
    return layer_of(lambda: layer(rows, matrix), int(arrays["shape"][0]))


if __name__ == "__main__":
    needs = (*NEEDS, "torch_geometric.nn")
    answer(
        {"step": (needs, step), "learn": (needs, learn), "propagate": (needs, propagate)},
        ("torch_geometric", "torch", "numpy"),
    )
