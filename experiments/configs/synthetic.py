"""The synthetic dataset; the config is installed too, as --config=synthetic: fused_rec/commands/configs/synthetic.py.

python -m experiments.train --config=experiments/configs/synthetic.py --workdir=runs/synthetic
"""

from fused_rec.commands.configs.synthetic import get_config as get_config
