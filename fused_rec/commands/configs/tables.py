"""Your own tables: interactions and optionally items, users and social edges, as CSV or Parquet (docs/tables.md)."""

from fused_rec.commands.configs import config_dict


def get_config():
    """Returns the defaults. Set --config.data.path=DIR, and --config.split.kind=time if there are timestamps."""
    return config_dict(
        data={"name": "tables"},
        model={"late_fusion": True, "dim": 128, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"refit": "all", "temperature": 0.0, "learning_rate": 0.003, "eval_every": 20},
    )
