"""Synthetic market, new items: all interactions of a fifth of the items are held out.

python -m experiments.train --config=experiments/configs/synthetic_new_items.py --workdir=runs/synthetic_new_items

The 80 new items are ranked among themselves by their descriptions only.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of synthetic.py, with text-kNN edges: they are the only edges of a new item."""
    return config_dict(
        data={"name": "synthetic"},
        split={"kind": "new_items", "seed": 1},
        model={
            "late_fusion": True,
            "dim": 256,
            "user_id_embedding": False,
            "edge_dropout": 0.5,
            "popularity_weight": 0.7,
        },
        train={"temperature": 0.5, "learning_rate": 0.002, "eval_every": 10},
    )
