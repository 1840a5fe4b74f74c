"""Amazon Musical Instruments, 5-core (McAuley et al., 2015): reviews; the last 20 % of each user are held out.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/amazon.py --workdir=runs/amazon

A minute on two CPU cores once the texts are encoded. docs/RESULTS.md has the results without late fusion.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "amazon"},
        split={"kind": "per_user"},
        model={
            "late_fusion": True,
            "dim": 256,
            "user_id_embedding": False,
            "edge_dropout": 0.5,
            "popularity_weight": 0.7,
        },
        train={"temperature": 0.3, "learning_rate": 0.002, "eval_every": 10, "refit": "valid"},
    )
