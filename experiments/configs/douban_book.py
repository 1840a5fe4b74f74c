"""Douban-Book, predefined GBSR split (Yang et al., 2024): books read and 169,142 trust edges, no text.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/douban_book.py --workdir=runs/douban_book

A tenth of the predefined training split selects the step and the weights of late fusion; the test split is read once.
Without text a linear model is a strong baseline here. Not measured with late fusion yet (docs/RESULTS.md).
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "edges"},
        split={"kind": "predefined"},
        model={"variant": "graph", "dim": 128, "late_fusion": True},
        train={
            "positives_per_user": 256,
            "learning_rate": 0.02,
            "eval_every": 40,
            "patience": 2,
            "max_steps": 320,
            "refit": "valid",
        },
    )
