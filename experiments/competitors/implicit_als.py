"""implicit's alternating least squares, the plain choice on a CPU: one pass over all pairs, and its ranking."""
# pyright: reportMissingImports=false, reportOptionalSubscript=false

from collections.abc import Callable

import numpy as np
from protocol import Arrays, Job, answer, learning

NEEDS = ("scipy.sparse", "threadpoolctl", "implicit.cpu.als")


def opened(job: Job, arrays: Arrays):
    """(model without factors, users x items in sparse rows)."""
    import scipy.sparse
    import threadpoolctl
    from implicit.cpu.als import AlternatingLeastSquares

    # BLAS threads below implicit's own would fight with them, as the package itself warns.
    threadpoolctl.threadpool_limits(1, "blas")
    ends, shape = (arrays["user"], arrays["item"]), tuple(map(int, arrays["shape"]))
    held = scipy.sparse.csr_matrix((np.ones(len(arrays["user"]), np.float32), ends), shape=shape)
    factors = arrays["rows"].shape[1]
    settings = {name: job[name] for name in ("regularization", "alpha") if name in job}
    settings |= {"factors": factors, "iterations": 1, "num_threads": job["threads"], "random_state": 0}
    return AlternatingLeastSquares(**settings), held


def step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """One iteration: users' factors from items', and back."""
    model, held = opened(job, arrays)

    def call(number: int) -> float:
        model.fit(held, show_progress=False)
        return float("nan")  # it has no loss to compare

    return call


def learn(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Iterations until the time is over."""
    model, held = opened(job, arrays)
    return learning(
        job,
        lambda: model.fit(held, show_progress=False),
        lambda: np.concatenate([model.user_factors, model.item_factors]),
    )


def rank(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The k best unseen items of every user, from the given vectors."""
    model, held = opened(job, arrays)
    n_users = held.shape[0]
    model.user_factors, model.item_factors = arrays["rows"][:n_users], arrays["rows"][n_users:]
    everyone = np.arange(n_users)
    return lambda number: model.recommend(everyone, held, N=job["k"])[0]


if __name__ == "__main__":
    answer({"step": (NEEDS, step), "learn": (NEEDS, learn), "rank": (NEEDS, rank)}, ("implicit", "numpy", "scipy"))
