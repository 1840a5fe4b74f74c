"""One file a dataset: what it is, how long it takes, what it gives. `synthetic` and `tables` are installed too."""

from fused_rec.commands.configs import config_dict as config_dict
