"""Your own tables: interactions, and where there are any items, users and ties, as CSV or Parquet (see README)."""

from fused_rec.commands.configs import config_dict


def get_config():
    """Give the folder with --config.data.path=DIR; --config.split.kind=time where interactions have timestamps."""
    return config_dict(
        data={"name": "tables"},
        model={"dim": 128, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"learning_rate": 0.003, "eval_every": 20},
    )
