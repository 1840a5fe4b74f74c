"""What is compared: the settings that make each variant of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fused_rec.config import Config


@dataclasses.dataclass(frozen=True)
class Variant:
    """overrides: settings by section. needs: "text", "ties", without which it would be another variant or nothing.

    control: trained on words or ties that say nothing; what it reaches is not for use.
    """

    description: str
    overrides: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...] = ()
    control: bool = False


# Id rows alone, trained to rank by dot products: what the published baselines below share. Rounds, factors, width
# and noise are as published; the loss too, but for the weight of users (fused_rec/model/losses.py). Decay, the length
# of first rows and the weight of XSimGCL's contrast (.2 as published) were chosen on Amazon's validation part, of nine
# tries each at most; rates as high as cost it little there, since Last.fm is slow to learn. Decay is AdamW's: a
# published L2, which Adam rescales, has no equal in it.
PLAIN_MODEL = {
    "variant": "graph",
    "dim": 64,
    "score": "dot",
    "relation_gates": False,
    "layer_combination": "mean",
    "embedding_noise": 0.0,
    "popularity_weight": 0.0,
    "ease_weight": 0.0,
    "user_id_embedding": True,
    "edge_dropout": 0.0,
    "id_embedding_dropout": 0.0,
    "id_init_std": 0.01,  # rows that start short learn what is popular first, which few holdings tell best
}
FROZEN = {"finetune": "frozen"}  # where no words are read, or those of a sample stay
PLAIN_GRAPH = {"attributes": (), "text_knn": 0, "social_edges": "none"}
BPR = {"loss": "bpr", "temperature": 1.0, "contrastive_weight": 0.0, "max_steps": 1000, "eval_every": 20, "patience": 5}

VARIANTS: dict[str, Variant] = {
    "fused": Variant("text inside the message passing", {}),
    "graph": Variant("without words", {"model": {"variant": "graph"}, "text": FROZEN}, needs=("text",)),
    "text": Variant("words alone", {"model": {"variant": "text", "ease_weight": 0.0}}, needs=("text",)),
    "no_ties": Variant("without ties", {"graph": {"social_edges": "none"}}, needs=("ties",)),
    "no_text_knn": Variant("without text neighbours", {"graph": {"text_knn": 0}}, needs=("text",)),
    "no_popularity": Variant("without popularity", {"model": {"popularity_weight": 0.0}}),
    "no_ease": Variant("without the closed-form part", {"model": {"ease_weight": 0.0}}),
    "no_gates": Variant("relations weigh the same for every node", {"model": {"relation_gates": False}}),
    "lora": Variant("language model trained along, by LoRA", {"text": {"finetune": "lora"}}, needs=("text",)),
    "bfloat16": Variant("steps multiply and send bfloat16", {"train": {"compute_dtype": "bfloat16"}}),
    "negatives": Variant("sampled items in the softmax instead of all", {"train": {"loss": "sampled_softmax"}}),
    "sampled": Variant(
        "the same, and ten sampled neighbours a node and relation",
        {"train": {"loss": "sampled_softmax", "num_neighbors": 10}, "text": FROZEN},
    ),
    "shuffled_text": Variant("another node's words", {"text": {"features": "shuffled"}}, ("text",), control=True),
    "random_text": Variant(
        "random vectors for words", {"text": FROZEN | {"features": "random"}}, ("text",), control=True
    ),
    "rewired_ties": Variant(
        "other ties, same degrees", {"graph": {"social_edges": "rewired"}}, ("ties",), control=True
    ),
    "bpr_mf": Variant(
        "matrix factorisation (Rendle et al., 2009, arXiv 1205.2618)",
        {
            "model": PLAIN_MODEL | {"num_layers": 0},
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 3.0},
        },
    ),
    "lightgcn": Variant(
        "LightGCN (He et al., 2020, arXiv 2002.02126)",
        {
            "model": PLAIN_MODEL | {"num_layers": 3},
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 0.1},
        },
    ),
    "social_lightgcn": Variant(
        "LightGCN whose users hear their ties too",
        {
            "model": PLAIN_MODEL | {"num_layers": 3},
            "text": FROZEN,
            "graph": PLAIN_GRAPH | {"social_edges": "observed"},
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 0.1},
        },
        needs=("ties",),
    ),
    "xsimgcl": Variant(
        "XSimGCL (Yu et al., 2023, arXiv 2209.02544)",
        {
            "model": PLAIN_MODEL | {"num_layers": 3, "layer_combination": "mean_without_input", "embedding_noise": 0.2},
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"contrastive_weight": 0.02, "learning_rate": 0.005, "weight_decay": 1.0},
        },
    ),
}


def variant(config: Config, name: str) -> Config:
    """The config with the settings of one of `VARIANTS`. Raises ValueError, listing them, for another name."""
    if name not in VARIANTS:
        raise ValueError(f"variant is {name!r}; it must be one of {', '.join(VARIANTS)}")
    sections = {
        section: dataclasses.replace(getattr(config, section), **settings)
        for section, settings in VARIANTS[name].overrides.items()
    }
    return dataclasses.replace(config, **sections)
