"""MovieLens 100k (Harper and Konstan, 2015) in RecBole's split: all ratings count, a tenth of each user is held out.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/ml_100k.py --workdir=runs/ml_100k

Settings are the defaults of `tables`; nothing was tuned. Texts are titles and genres. docs/RESULTS.md has the results
beside RecBole's.
"""

from experiments.configs import config_dict


def get_config():
    """RecBole's `split: {RS: [0.8, 0.1, 0.1]}`, `order: RO`, `group_by: user`, without a threshold of ratings."""
    return config_dict(
        data={"name": "recbole"},
        split={"kind": "per_user_random", "test": 0.1, "valid": 0.111},
        model={"late_fusion": True, "dim": 128, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"temperature": 0.0, "learning_rate": 0.003, "eval_every": 20},
    )
