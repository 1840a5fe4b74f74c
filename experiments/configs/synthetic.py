"""The built-in market, generated from a seed."""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(data={"name": "synthetic"}, train={"eval_every": 10, "learning_rate": 0.005})
