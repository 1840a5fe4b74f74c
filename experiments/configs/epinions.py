"""Epinions, predefined GBSR split (Yang et al., 2024): rated products and 595,104 trust edges, no text.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/epinions.py --workdir=runs/epinions

A tenth of the predefined training split selects the step; the test split is read once.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of tables.py, not tuned on this dataset."""
    return config_dict(
        data={"name": "epinions"},
        split={"kind": "predefined"},
        model={"late_fusion": True, "dim": 128, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"temperature": 0.0, "learning_rate": 0.003, "eval_every": 20},
    )
