"""The built-in market, products nobody holds yet: all holdings of a fifth of them are held out.

python -m experiments.train --config=experiments/configs/synthetic_new_items.py --workdir=runs/synthetic_new_items

The 80 new products are ranked among themselves, from their descriptions alone.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of synthetic.py, but for the relation of similar texts: it is what ties a new product to the others."""
    return config_dict(
        data={"name": "synthetic"},
        split={"kind": "new_items", "seed": 1},
        model={"dim": 256, "user_id_embedding": False, "edge_dropout": 0.5, "popularity_weight": 0.7},
        train={"temperature": 0.5, "learning_rate": 0.002, "eval_every": 10},
    )
