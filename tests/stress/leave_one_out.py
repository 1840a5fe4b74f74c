"""Recomputes leave-one-out effects of a finished run one at a time, and measures the time of both.

    python tests/stress/leave_one_out.py --workdir=W [--effects=1000] [--most=4] [--seed=0]

Draws users at random and the item ranked first for each. Prints the largest difference between an effect and the
recomputation on the graph without the source, as a share of the score, and seconds of processor time (on a busy machine
the clock would tell more of the others): of the setup, of all effects of a user, and of one recomputation. Fails where
a difference exceeds 1e-5.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOUND = 1e-5


def main() -> None:
    """Prints the table and exits with 1 where a bound is exceeded."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--effects", type=int, default=1000, help="effects to recompute")
    parser.add_argument("--most", type=int, default=4, help="of one user")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from tqdm import tqdm

    from fused_rec.explanation.counterfactual import without_sources
    from fused_rec.explanation.decomposition import decompose, scores
    from fused_rec.explanation.leave_one_out import effects, leave_one_out
    from fused_rec.explanation.own_reviews import own_reviews
    from fused_rec.explanation.sources import sources
    from fused_rec.serving.recommender import load_measured
    from fused_rec.training.sharding import embed_on_one_device

    config, prepared, state = load_measured(arguments.workdir, "test")
    graph_inputs, params = prepared.graph_inputs, state.params
    decomposition = decompose(config, params, graph_inputs)
    reviews = own_reviews(config, prepared)
    leave_one_out(config, params, prepared.observed, graph_inputs, reviews)  # compiles
    start = time.process_time()
    model = leave_one_out(config, params, prepared.observed, graph_inputs, reviews)
    setup = time.process_time() - start
    rng = np.random.default_rng(arguments.seed)
    errors, counts, seconds, alone = [], [], [], []
    bar = tqdm(rng.permutation(prepared.dataset.n_users).tolist(), unit="user")
    for user in bar:
        own, given = prepared.observed.item[prepared.observed.user == user], scores(decomposition, user).copy()
        given[own] = -np.inf
        item, named = int(given.argmax()), sources(model.graph, model.reverse, user, reviews)
        start = time.process_time()
        found = effects(model, user, [item])
        seconds.append(time.process_time() - start)
        counts.append(len(named))
        for place in rng.permutation(len(named))[: arguments.most].tolist():
            start = time.process_time()
            gone = [named[place]]
            edited = without_sources(config, prepared.observed, graph_inputs, user, gone, reviews)
            users, items = embed_on_one_device(config, params, edited)
            after = float(users[user] @ items[item])
            alone.append(time.process_time() - start)
            scale = max(abs(float(found.score[0])), 1e-3)
            errors.append(abs(float(found.score[0]) - after - float(found.value[place, 0])) / scale)
        bar.set_postfix_str(f"{len(errors)} effects, largest difference {max(errors, default=0):.1e}")
        if len(errors) >= arguments.effects:
            break
    bar.close()
    middle, last = (1000 * float(np.quantile(seconds, share)) for share in (0.5, 0.95))
    print(
        f"{prepared.dataset.name}: {len(errors)} effects of {len(counts)} users, median {np.median(counts):.0f} sources"
    )
    print(f"largest difference {max(errors):.1e} of the score, median {np.median(errors):.1e}")
    print(
        f"setup {setup:.2f} s; all effects of a user {middle:.0f} ms (95 %: {last:.0f} ms); one recomputation "
        f"{1000 * float(np.median(alone)):.0f} ms"
    )
    if max(errors) > BOUND:
        sys.exit(f"a difference of {max(errors):.1e}; the bound is {BOUND:.0e}")


if __name__ == "__main__":
    main()
