"""The built-in market, customers who hold nothing yet: all holdings of a fifth of them are held out.

python -m experiments.train --config=experiments/configs/synthetic_new_users.py --workdir=runs/synthetic_new_users

The 400 new customers are known by what they say of themselves (360 of them) and by their referrals.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of synthetic.py, but with a row for each customer: friends train it before the first holding does."""
    return config_dict(
        data={"name": "synthetic"},
        split={"kind": "new_users", "seed": 1},
        graph={"text_knn": 0},
        model={"dim": 256, "edge_dropout": 0.5, "popularity_weight": 0.7},
        train={"learning_rate": 0.002, "eval_every": 10},
    )
