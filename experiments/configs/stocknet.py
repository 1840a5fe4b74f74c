"""StockNet (Xu and Cohen, 2018): tweets about tickers, company profiles, retweets; split by global time.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/stocknet.py --workdir=runs/stocknet

Half a minute on two CPU cores once the texts are encoded. docs/RESULTS.md has the results without late fusion.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "stocknet", "k_core": 5},
        split={"kind": "time"},
        graph={"attributes": ("sector",)},
        # Most interactions are with the few tickers popular at the time.
        model={
            "late_fusion": True,
            "user_id_embedding": False,
            "edge_dropout": 0.5,
            "popularity_weight": 1.0,
            "popularity_half_life": 90.0,
        },
        train={"temperature": 0.3, "learning_rate": 0.002, "eval_every": 10},
    )
