"""Douban-Book, predefined GBSR split (Yang et al., 2024): books read and 169,142 trust edges, no text.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/douban_book.py --workdir=runs/douban_book

A tenth of the predefined training split selects the step; the test split is read once. Without text a linear model is a
strong baseline here, so low-rank EASE is a term of the score (`model.ease_weight`). About ten minutes on two CPU cores;
test NDCG@10 .1985, mean of three seeds (docs/RESULTS.md).
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "edges"},
        split={"kind": "predefined"},
        model={"variant": "graph", "dim": 128, "ease_weight": 4.0, "ease_rank": 1536, "ease_l2": 135.0},
        train={
            "positives_per_user": 256,
            "learning_rate": 0.02,
            "eval_every": 40,
            "patience": 2,
            "max_steps": 320,
            "refit": True,
        },
    )
