"""Amazon Musical Instruments, 5-core (McAuley et al., 2015), split by global time: the last 20 % of all reviews.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/amazon_time.py --workdir=runs/amazon_time

113 of 586 test users wrote their first review in the test period and are unknown to the model.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of amazon.py, with a larger popularity weight and a half-life, both chosen on validation."""
    return config_dict(
        data={"name": "amazon"},
        split={"kind": "time"},
        model={
            "late_fusion": True,
            "dim": 256,
            "user_id_embedding": False,
            "edge_dropout": 0.5,
            "popularity_weight": 1.0,
            "popularity_half_life": 365.0,
        },
        train={"temperature": 0.5, "learning_rate": 0.002, "eval_every": 10, "refit": "valid"},
    )
