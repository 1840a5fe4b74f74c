"""Your own tables: interactions, and where there are any items, users and ties, as CSV or Parquet (see README)."""

from experiments.configs import config_dict


def get_config():
    """Give the folder with --config.data.path=DIR; --config.split.kind=time where interactions have timestamps."""
    return config_dict(data={"name": "tables"}, train={"learning_rate": 0.005, "eval_every": 20})
