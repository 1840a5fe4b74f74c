"""Gowalla, split of LightGCN (He et al., 2020): check-ins without text or social edges; LightGCN's propagation.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/gowalla.py --workdir=runs/gowalla

Three layers of 64 dimensions, as published. A softmax over all items replaces BPR, and cosine plus popularity replaces
the dot product. A tenth of the predefined training split selects the step; the test split is read once.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "lightgcn_text"},
        split={"kind": "predefined"},
        graph={"text_knn": 0, "social_edges": "none"},
        model={
            "variant": "graph",
            "relation_gates": False,
            "layer_combination": "mean",
            "popularity_weight": 0.5,
            "id_embedding_dropout": 0.0,
        },
        train={
            "temperature": 0.1,
            "batch_size": 2048,
            "learning_rate": 0.05,
            "weight_decay": 0.0,
            "eval_every": 50,
            "patience": 2,
            "max_steps": 250,
            "metric": "recall@20",
            "refit": "valid",
        },
    )
