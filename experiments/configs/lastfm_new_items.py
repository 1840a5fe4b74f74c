"""Last.fm (HetRec 2011), new items: all interactions of a fifth of the artists are held out.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/lastfm_new_items.py --workdir=runs/new_items

The 3,526 new artists are ranked among themselves by their names only: their tags are held out with their interactions.
"""

from experiments.configs import config_dict


def get_config():
    """Few steps at a low learning rate and full text width, close to the pretrained text vectors."""
    return config_dict(
        data={"name": "lastfm"},
        split={"kind": "new_items"},
        text={"tfidf_dim": 0},
        # User text consists of the tags of interacted items, which new artists do not have.
        model={"late_fusion": True, "dim": 384, "user_text_input": False, "edge_dropout": 0.5},
        train={"temperature": 1.0, "learning_rate": 0.0003, "eval_every": 10, "patience": 3, "max_steps": 200},
    )
