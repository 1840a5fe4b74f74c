"""Last.fm (HetRec 2011), predefined SocialLGN split: artist names, tags, friends.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/lastfm.py --workdir=runs/lastfm

Several minutes on two CPU cores. docs/RESULTS.md has the results without late fusion.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "lastfm_sociallgn"},
        split={"kind": "predefined"},
        text={"tfidf_dim": 0},
        model={"late_fusion": True, "edge_dropout": 0.3},
        train={"learning_rate": 0.01, "eval_every": 40, "patience": 2, "max_steps": 600, "refit": "valid"},
    )
