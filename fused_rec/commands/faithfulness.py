"""Measure the faithfulness of explanations by deletion and insertion curves.

    python -m experiments.faithfulness --workdir=runs/lastfm --users=200 --out=faithfulness.json

For a random sample of users and the item ranked first for each, the user's interactions and neighbors are removed
(deletion) and restored (insertion) in the order of their leave-one-out effects, and in other orders; each score is
recomputed. Writes curves and areas as JSON and, beside it, as a figure (needs the extra `plots`).
docs/EXPLANATIONS.md has measured tables.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from fused_rec.commands.launch import command
from fused_rec.commands.places import DEFINE_path, DEFINE_run, written_file

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
USERS = flags.DEFINE_integer("users", 200, "Users; fewer if too few qualify.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Random seed of users, random orders and the bootstrap.", lower_bound=0)
OUT = DEFINE_path("out", written_file, "JSON file of the curves and areas.", required=True)


def main(argv: list[str]) -> None:
    """Measures, prints a table, and writes the results and the figure."""
    import jax
    from tqdm import tqdm

    from fused_rec.explanation.decomposition import scores
    from fused_rec.explanation.explained_model import explained_model
    from fused_rec.explanation.faithfulness import ORDERS, SHARES, curves, summary
    from fused_rec.runs.run_dir import write_json
    from fused_rec.serving.recommender import load_measured

    out = Path(OUT.value)
    if out.suffix != ".json":
        raise app.UsageError(f"--out is {out.name}; it must end in .json")
    config, prepared, state = load_measured(WORKDIR.value, "test", data_path=DATA_PATH.value, cache=CACHE.value)
    model = explained_model(config, jax.device_put(state.params), prepared, with_reviews=False)
    rng = np.random.default_rng(SEED.value)
    found, asked = [], 0
    with tqdm(total=USERS.value, desc="faithfulness", unit="customer") as bar:
        for user in rng.permutation(prepared.dataset.n_users).tolist():
            if len(found) == USERS.value:
                break
            asked += 1
            bar.set_postfix_str(f"{asked} asked")
            own = prepared.observed.item[prepared.observed.user == user]
            given = scores(model.decomposition, user).copy()
            given[own] = -np.inf
            one = curves(model, user, int(given.argmax()), rng, SEED.value)
            if one is not None:
                found.append(one)
                bar.update()
    report = {
        "command": command(),
        "data": prepared.dataset.name,
        "split": prepared.split.kind,
        "training_seed": config.train.seed,
        "users": len(found),
        "asked": asked,
        "shares": SHARES.tolist(),
        **summary(found, SEED.value),
    }
    write_json(out, report)
    print(f"{report['data']}, {report['split']} split: {len(found)} customers of {asked} asked\n")
    for kind, better in (("deletion", "lower is better"), ("insertion", "higher is better")):
        print(f"{kind}, area under the curve ({better})    {ORDERS[0]} less this order, 95 %")
        for name, row in report[kind].items():
            apart = row["difference"]
            mean = f"{row['area']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            print(f"  {name:13s} {mean}   {apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f})")
    print(f"numbers: {out}")
    _draw(report, out.with_suffix(".png"))


def _draw(report: dict[str, Any], figure: Path) -> None:
    """Writes the curves as a figure, where Matplotlib is installed."""
    from fused_rec.evaluation.plots import by_share
    from fused_rec.storage import write_figure

    if importlib.util.find_spec("matplotlib") is None:
        print('the figure needs Matplotlib: pip install -e ".[plots]", then the same again')
        return
    write_figure(figure, by_share(report))
    print(f"figure:  {figure}")
