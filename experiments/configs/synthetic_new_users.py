"""Synthetic market, new users: all interactions of a fifth of the users are held out.

python -m experiments.train --config=experiments/configs/synthetic_new_users.py --workdir=runs/synthetic_new_users

The 400 new users are known by their descriptions (360 of them) and by their referrals.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of synthetic.py, with user-ID embeddings, which social edges train before the first interaction."""
    return config_dict(
        data={"name": "synthetic"},
        split={"kind": "new_users", "seed": 1},
        graph={"text_knn": 0},
        model={"late_fusion": True, "dim": 256, "edge_dropout": 0.5, "popularity_weight": 0.7},
        train={"learning_rate": 0.002, "eval_every": 10},
    )
