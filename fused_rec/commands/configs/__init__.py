"""Installed configs: --config=NAME. Those of public datasets are in experiments/configs."""

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from fused_rec.config import Config, to_dict


def config_dict(**sections: dict) -> ml_collections.ConfigDict:
    """Replaces some defaults of `fused_rec.config`.

    Args:
      **sections: settings by section, such as `model={"dim": 256}`.

    Returns:
      All settings by section, for `--config` flags to override.
    """
    config = Config()
    changed = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()}
    values = to_dict(dataclasses.replace(config, **changed))
    unset = placeholder(float)  # lets a flag set a number where the default is None
    return ml_collections.ConfigDict(
        {
            section: {name: unset if value is None else value for name, value in settings.items()}
            for section, settings in values.items()
        }
    )
