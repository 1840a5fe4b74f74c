"""Synthetic market, generated from a seed: descriptions, reviews, referrals.

python -m experiments.train --config=experiments/configs/synthetic.py --workdir=runs/synthetic

Half a minute on two CPU cores once the texts are encoded. docs/RESULTS.md has the results without late fusion.
"""

from fused_rec.commands.configs import config_dict


def get_config():
    """Returns settings selected on validation."""
    return config_dict(
        data={"name": "synthetic"},
        graph={"text_knn": 0},
        model={
            "late_fusion": True,
            "dim": 256,
            "user_id_embedding": False,
            "edge_dropout": 0.5,
            "review_dropout": False,  # validation: .2418 without, .2331 with (seeds 0 and 1)
            "popularity_weight": 0.7,
        },
        train={"learning_rate": 0.002, "eval_every": 10},
    )
