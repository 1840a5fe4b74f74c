"""Your own tables; the config is installed too, as --config=tables: fused_rec/commands/configs/tables.py."""

from fused_rec.commands.configs.tables import get_config as get_config
