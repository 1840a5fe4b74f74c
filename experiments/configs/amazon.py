"""Amazon Musical Instruments, 5-core (McAuley et al., 2015): reviews; each customer's last 20 % are held out."""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "amazon"},
        split={"kind": "per_user"},
        train={"temperature": 0.3, "learning_rate": 0.005, "eval_every": 10, "refit": True},
    )
