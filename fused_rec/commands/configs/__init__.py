"""Configs that are installed: --config=NAME. Those of public datasets are in experiments/configs."""

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from fused_rec.config import Config, to_dict


def config_dict(**sections: dict) -> ml_collections.ConfigDict:
    """The defaults of `fused_rec.config` with some settings replaced, for `--config` to override further."""
    config = Config()
    changed = {name: dataclasses.replace(getattr(config, name), **settings) for name, settings in sections.items()}
    values = to_dict(dataclasses.replace(config, **changed))
    unset = placeholder(float)  # a flag gives a number to a setting that has none
    return ml_collections.ConfigDict(
        {
            section: {name: unset if value is None else value for name, value in settings.items()}
            for section, settings in values.items()
        }
    )
