"""Last.fm (HetRec 2011), artists nobody is known to listen to: every listen of a fifth of them is held out.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/lastfm_new_items.py --workdir=runs/new_items

The 3,526 new artists are ranked among themselves, from their names alone: their tags are held out with their listens.
"""

from experiments.configs import config_dict


def get_config():
    """Few small steps at full width: what nobody holds is found by what the language model knows of its name."""
    return config_dict(
        data={"name": "lastfm"},
        split={"kind": "new_items"},
        text={"tfidf_dim": 0},
        # What a user says are the tags they gave to what they hold, which new artists do not have.
        model={"dim": 384, "user_text_input": False, "edge_dropout": 0.5},
        train={"temperature": 1.0, "learning_rate": 0.0003, "eval_every": 10, "patience": 3, "max_steps": 200},
    )
