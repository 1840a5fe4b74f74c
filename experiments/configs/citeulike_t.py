"""CiteULike-t (Wang, Chen and Li, 2013): papers that users saved, words of their abstracts, tags; random split.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/citeulike_t.py --workdir=runs/citeulike_t

Tags cannot be removed with held-out pairs, since no file says who typed them: compare with words alone,
--config.data.name=citeulike_t_words --config.graph.attributes="()". The published splits with 1 or up to 10 papers per
user in train are --config.data.name=citeulike_t_p1 and citeulike_t_p10 with --config.split.kind=predefined.
"""

from experiments.configs import config_dict


def get_config():
    """Settings of tables.py; terms, dimension, temperature and tags as nodes by validation (docs/LAB_NOTES.md)."""
    return config_dict(
        data={"name": "citeulike_t"},
        split={"kind": "random"},
        text={"tfidf_dim": 1024},
        graph={"attributes": ("tags",)},
        model={"late_fusion": True, "dim": 256, "user_id_embedding": False, "edge_dropout": 0.5},
        train={"temperature": 0.1, "learning_rate": 0.003, "eval_every": 20},
    )
