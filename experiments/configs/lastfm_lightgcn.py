"""Last.fm, split of LightGCN's code (He et al., 2020): interactions only, the graph variant in seconds.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/lastfm_lightgcn.py --workdir=runs/lgn

Few steps at a high learning rate and a softmax over all items; a refit on train and valid precedes the test metrics.
docs/SPEED.md has the seconds.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation among those that train in seconds."""
    return config_dict(
        data={"name": "lastfm_lightgcn"},
        split={"kind": "predefined"},
        graph={"text_knn": 0, "social_edges": "none"},
        model={"variant": "graph", "id_embedding_dropout": 0.0},
        train={
            "temperature": 0.15,
            "positives_per_user": 256,
            "learning_rate": 0.03,
            "weight_decay": 0.1,
            "eval_every": 80,
            "max_steps": 80,
            "metric": "recall@20",
            "refit": "valid",
        },
    )
