"""Named variants of a config: ablations, controls and published methods, as changes of settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fused_rec.config import BASELINE_NAMES, METHODS, Config, from_dict, to_dict

REFERENCE = "fused"
BRANCHES = ("text", "graph")  # the variants that each use one of the two inputs
REQUIRED = (*BRANCHES, REFERENCE)  # to tell when fusion pays


@dataclasses.dataclass(frozen=True)
class Variant:
    """Variant of a config.

    Attributes:
      description: a phrase for tables and help texts.
      overrides: changed settings, by section.
      needs: inputs ("text", "ties") without which the variant does not exist or equals another one.
      control: trained on uninformative text or social edges; not for use.
      ablation: the base config with one part changed; no method of its own to compare fusion with.
    """

    description: str
    overrides: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...] = ()
    control: bool = False
    ablation: bool = False


# ID embeddings and dot products, as shared by the published baselines below. Layers, layer weights, dimension and noise
# are as published, and so is the loss, except for the weight of users (fused_rec/model/losses.py). Weight decay, the
# standard deviation of the initial embeddings and the contrastive weight of XSimGCL (.2 as published) were selected on
# the validation split of Amazon, from at most nine values each; learning rates are as high as validation there allows,
# since Last.fm converges slowly. Weight decay is that of AdamW; the published L2, which Adam rescales, has no equal.
PLAIN_MODEL = {
    "variant": "graph",
    "dim": 64,
    "score": "dot",
    "relation_gates": False,
    "layer_combination": "mean",
    "embedding_noise": 0.0,
    "popularity_weight": 0.0,
    "late_fusion": False,
    "text_projection": "linear",
    "text_propagation": "to_users",
    "text_alignment": 0.0,
    "text_reconstruction": 0.0,
    "user_id_embedding": True,
    "edge_dropout": 0.0,
    "review_dropout": False,
    "id_embedding_dropout": 0.0,
    "id_init_std": 0.01,  # small embeddings learn popularity first, the best signal with few interactions
}
FROZEN = {"finetune": "frozen"}  # for variants without text and with sampled subgraphs
PLAIN_GRAPH = {"attributes": (), "text_knn": 0, "social_edges": "none"}
BPR = {"loss": "bpr", "temperature": 1.0, "contrastive_weight": 0.0, "max_steps": 1000, "eval_every": 20, "patience": 5}
# Layers, dimension, temperature (of Books and Movies), learning rate, normalization, the users' mean and the one MLP of
# users and items are as published by AlphaRec's authors (github.com/LehengTHU/AlphaRec). What differs: text features
# are those of the base config, whitened, where the paper has text-embedding-3-large; the hidden layer has half of their
# width, as the paper's has of 3,072; the softmax is over all items, where the paper samples 256 negatives per positive;
# users are weighted as in fused_rec/model/losses.py; weight decay (1e-6) is that of AdamW.
ALPHAREC_MODEL = PLAIN_MODEL | {
    "variant": "text",
    "num_layers": 2,
    "score": "cosine",
    "text_projection": "mlp",
    "text_propagation": "both_ways",
}
ALPHAREC_TRAIN = {
    "loss": "softmax",
    "temperature": 0.15,
    "contrastive_weight": 0.0,
    "learning_rate": 0.0005,
    "weight_decay": 1e-6,
    "max_steps": 2000,
    "eval_every": 50,
    "patience": 5,
}
# LightGCN's settings; layers, edge dropout, weight and temperature of the alignment are those published for Amazon and
# Yelp (github.com/HKUDS/RLMRec). What differs: text features of items, and their mean over a user's items, replace the
# profiles that a language model writes; the MLP's hidden layer has D / 2 units, D the width of the features, not
# (D + K) / 2; the denominator has the users, and one positive of each, of the batch, where the authors' code has all
# users and also a term of negatives; edge dropout scales up what it keeps, and layers are averaged where their code
# adds them, which for BPR is another temperature; the dimension K is 64, as of all methods here, not 32.
RLMREC_CON = PLAIN_MODEL | {"num_layers": 3, "edge_dropout": 0.2, "text_alignment": 0.01}
# The same for RLMRec-Gen, as published for Amazon: layers, edge dropout, share of masked nodes, the learned row in
# their place, the MLP, and weight and temperature of the reconstruction. What differs: text features, edge dropout,
# mean of layers and dimension as above; masked nodes count where they are in the batch, as users or one positive of
# each, where the authors' code has those of the whole graph.
RLMREC_GEN = PLAIN_MODEL | {
    "num_layers": 2,
    "edge_dropout": 0.2,
    "id_embedding_dropout": 0.15,
    "text_reconstruction": 0.1,
}

VARIANTS: dict[str, Variant] = {
    "fused": Variant("text inside the message passing", {}),
    "graph": Variant(
        "without text", {"model": {"variant": "graph", "late_fusion": False}, "text": FROZEN}, needs=("text",)
    ),
    "text": Variant("text alone", {"model": {"variant": "text", "late_fusion": False}}, needs=("text",)),
    "no_social_edges": Variant("without social edges", {"graph": {"social_edges": "none"}}, ("ties",), ablation=True),
    "no_text_knn": Variant("without text-kNN edges", {"graph": {"text_knn": 0}}, ("text",), ablation=True),
    "no_popularity": Variant("without popularity", {"model": {"popularity_weight": 0.0}}, ablation=True),
    "no_late_fusion": Variant("the trained model alone", {"model": {"late_fusion": False}}, ablation=True),
    "no_launch_prior": Variant(
        "new items as the components score them", {"model": {"launch_cost": 0.0}}, ablation=True
    ),
    "no_review_dropout": Variant(
        "dropped edges keep their reviews", {"model": {"review_dropout": False}}, ("text",), ablation=True
    ),
    "no_gates": Variant("without relation gates", {"model": {"relation_gates": False}}, ablation=True),
    "lora": Variant("language model fine-tuned by LoRA", {"text": {"finetune": "lora"}}, ("text",), ablation=True),
    "bfloat16": Variant("training steps in bfloat16", {"train": {"compute_dtype": "bfloat16"}}, ablation=True),
    "negatives": Variant(
        "sampled items in the softmax instead of all", {"train": {"loss": "sampled_softmax"}}, ablation=True
    ),
    "sampled": Variant(
        "the same, with ten sampled neighbors per node and relation",
        {"train": {"loss": "sampled_softmax", "num_neighbors": 10}, "text": FROZEN},
        ablation=True,
    ),
    "shuffled_text": Variant("text of another node", {"text": {"features": "shuffled"}}, ("text",), control=True),
    "random_text": Variant(
        "random vectors instead of text", {"text": FROZEN | {"features": "random"}}, ("text",), control=True
    ),
    "rewired_social_edges": Variant(
        "rewired social edges of equal degrees", {"graph": {"social_edges": "rewired"}}, ("ties",), control=True
    ),
    "bpr_mf": Variant(
        "matrix factorization with BPR (Rendle et al., 2009, arXiv 1205.2618)",
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
        "LightGCN with social edges",
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
    "rlmrec_con": Variant(
        "RLMRec-Con (Ren et al., 2024, arXiv 2310.15950)",
        {
            "model": RLMREC_CON,
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 0.1},
        },
        needs=("text",),
    ),
    "rlmrec_gen": Variant(
        "RLMRec-Gen (Ren et al., 2024, arXiv 2310.15950)",
        {
            "model": RLMREC_GEN,
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 0.1},
        },
        needs=("text",),
    ),
    "alpharec": Variant(
        "AlphaRec (Sheng et al., 2025, arXiv 2407.05441)",
        {"model": ALPHAREC_MODEL, "text": FROZEN, "graph": PLAIN_GRAPH, "train": ALPHAREC_TRAIN},
        needs=("text",),
    ),
}


def variant(config: Config, name: str) -> Config:
    """Applies a variant or baseline to a config.

    Args:
      config: the base config.
      name: a key of `VARIANTS`, or a baseline.

    Returns:
      The changed config, whose model.method is the name of a published method.

    Raises:
      ValueError: an unknown name; lists the known ones.
    """
    if name not in VARIANTS and name not in BASELINE_NAMES:
        raise ValueError(f"variant is {name!r}; it must be one of {', '.join((*VARIANTS, *BASELINE_NAMES))}")
    overrides = VARIANTS[name].overrides if name in VARIANTS else _inputs_of(name)
    model = {**overrides.get("model", {}), "method": name if name in METHODS else ""}
    sections = {
        section: dataclasses.replace(getattr(config, section), **settings)
        for section, settings in {**overrides, "model": model}.items()
    }
    return dataclasses.replace(config, **sections)


def _inputs_of(baseline: str) -> dict[str, dict[str, Any]]:
    """The settings by which a baseline gets the inputs that it needs, and no others are prepared."""
    from fused_rec.baselines.registry import BASELINES  # needs JAX; --help names variants without it

    needs = BASELINES[baseline].needs
    return {
        "model": PLAIN_MODEL | {"variant": "text" if "text" in needs else "graph"},
        "text": FROZEN,
        "graph": PLAIN_GRAPH | {"social_edges": "observed" if "ties" in needs else "none"},
    }


def configured(config: Config, given: Mapping[str, Mapping[str, Any]]) -> Config:
    """Changes settings; where model.method is among them, the method's own settings are applied before the others.

    Args:
      config: the base config.
      given: settings by section.

    Returns:
      The changed, validated config.

    Raises:
      ValueError: as `fused_rec.config.from_dict`.
    """
    name = given.get("model", {}).get("method")
    if isinstance(name, str) and name in METHODS:
        config = variant(config, name)
    values = to_dict(config)
    return from_dict({**values, **{name: {**values.get(name, {}), **settings} for name, settings in given.items()}})
