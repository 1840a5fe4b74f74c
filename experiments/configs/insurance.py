"""Purchases of insurance products (Bruun, Maistro and Lioma, 2022), published split by time; no text.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/insurance.py --workdir=runs/insurance

4,005 of 4,887 test users made their first purchase in the test period and are unknown to the model. A repeated
purchase of a pair is not held out.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of tables.py, not tuned on this dataset."""
    return config_dict(
        data={"name": "insurance"},
        split={"kind": "predefined"},
        model={"late_fusion": True, "dim": 128, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"temperature": 0.0, "learning_rate": 0.003, "eval_every": 20},
    )
