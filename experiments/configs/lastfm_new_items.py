"""Last.fm (HetRec 2011), artists nobody is known to listen to: every listen of a fifth of them is held out.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/lastfm_new_items.py --workdir=runs/new_items

The 3,526 new artists are ranked among themselves, from their names alone: their tags are held out with their listens.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of lastfm.py."""
    return config_dict(
        data={"name": "lastfm"},
        split={"kind": "new_items"},
        text={"lexical": 0},
        train={"temperature": 0.3, "learning_rate": 0.01, "eval_every": 20, "patience": 3, "max_steps": 400},
    )
