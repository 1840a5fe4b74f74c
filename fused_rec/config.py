"""All settings with their defaults: frozen dataclasses, validated on construction, converted to and from JSON."""

import codecs
import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

SplitKind = Literal[
    "time", "per_user", "per_user_random", "leave_one_out", "random", "new_items", "new_users", "predefined"
]
Variant = Literal["fused", "graph", "text"]
# Published methods that model.method names: trained by gradients, with settings in fused_rec/studies/variants.py, and
# without, of fused_rec/baselines/registry.py.
TrainedMethod = Literal["bpr_mf", "lightgcn", "social_lightgcn", "xsimgcl", "rlmrec_con", "rlmrec_gen", "alpharec"]
Baseline = Literal[
    *("popularity", "item_knn", "user_knn", "friends_mean", "text_mean", "text_gcn", "als", "gf_cf", "ease"),
    *("text_ease", "tfidf_mean", "term_ease"),
]
BASELINE_NAMES = typing.get_args(Baseline)
METHODS = (*typing.get_args(TrainedMethod), *BASELINE_NAMES)
KS = (5, 10, 20, 50)  # cutoffs of ranking metrics
METRICS = (
    "auc",
    *(f"{name}@{k}" for name in ("recall", "precision", "hitrate", "ndcg", "mrr", "map") for k in KS),
)
SLICE_METRICS = ("ndcg@10", "recall@10", "auc")  # of slices of users, and of comparisons
Score = Literal["cosine", "dot"]
LayerCombination = Literal["learned", "mean", "mean_without_input"]
TextProjection = Literal["linear", "mlp"]
TextPropagation = Literal["to_users", "both_ways"]
Loss = Literal["softmax", "sampled_softmax", "bpr"]
TEMPERATURES = (0.15, 0.3)  # tried where train.temperature is 0
LOW_TEMPERATURE = 0.1  # tried as well, where the first of them is the better
ComputeDtype = Literal["float32", "bfloat16"]
TrainCompute = Literal["float32", "bfloat16", "auto"]
TextFeatureSource = Literal["real", "shuffled", "random"]
Finetuning = Literal["frozen", "lora", "full"]
SocialEdges = Literal["observed", "rewired", "none"]
Refit = Literal["none", "valid", "all"]
PLACES = (("data", "path"), ("text", "cache"))  # settings that name local folders
STATED = (("card", "owner"), ("card", "purpose"), ("card", "license"))  # settings that only cards and pages read
# Settings of folders, speed and cards, which change no result (`text.batch_tokens`: only by rounding). Tables are
# identified by their digest, wherever they are. A run resumes with any of these changed (docs/commands.md, "Run
# directory").
NEUTRAL = (*PLACES, ("text", "offline"), ("text", "batch_tokens"), ("train", "wandb"), *STATED)
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # surrogates come from names that are not UTF-8


def _require(condition: bool, setting: str, value: object, bound: str) -> None:
    if not condition:
        raise ValueError(f"{setting} is {_shown(value)}; it must be {bound}")


def _require_sane(section: str, config: Any) -> None:
    """Refuses numbers that overflow in the arithmetic and texts that cannot be written to a file."""
    for field in dataclasses.fields(config):
        setting, given = f"{section}.{field.name}", getattr(config, field.name)
        if (value := _plain(given)) is not given:
            object.__setattr__(config, field.name, value)
        if isinstance(value, float):
            _require(not math.isinf(value), setting, value, "finite")
        elif isinstance(value, int):
            _require(abs(value) < 2**63, setting, value, "of 64 bits")
        for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            _require(not _UNWRITABLE.search(text), setting, value, "text without NUL or surrogates")


def _plain(value: Any) -> Any:
    """Converts a NumPy scalar to a Python value and returns anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _is_encoding(name: str) -> bool:
    try:
        return not name or codecs.lookup(name).incrementaldecoder is not None and b"a".decode(name) is not None
    except (LookupError, ValueError):
        return name.lower().startswith(("utf", "u1", "u3"))  # encodings of two or four bytes per character


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Input tables and their filters."""

    name: str = "synthetic"  # a key of fused_rec.data.sources.registry.READERS
    path: str = ""  # folder of the tables; empty = the default folder of the dataset under $FUSED_REC_DATA
    repair: bool = False  # repair faulty rows (each kind counted and logged) instead of refusing the tables
    k_core: int = 1  # k-core filter: keep users and items with at least this many interactions, until stable
    seed: int = 0  # random seed of the synthetic dataset
    min_value: float | None = None  # drop interactions whose `value` is lower; None = keep all
    delimiter: str = ""  # of your own text tables; empty = comma, semicolon, tab or pipe, detected from the header
    encoding: str = ""  # of your own text tables, if not UTF-8 and not declared: e.g. cp1252 from Windows

    def __post_init__(self):
        _require_sane("data", self)
        fits = self.min_value is None or not math.isnan(self.min_value)
        _require(fits, "data.min_value", self.min_value, "a number, or None")
        fits = re.fullmatch(r'(?a:[^\w"\r\n\x80-\U0010ffff])?', self.delimiter) is not None
        _require(fits, "data.delimiter", self.delimiter, "empty or one ASCII character, no letter, digit or quote")
        _require(_is_encoding(self.encoding), "data.encoding", self.encoding, "empty or an encoding, such as cp1252")
        _require(self.k_core >= 1, "data.k_core", self.k_core, "at least 1")
        _require(self.seed >= 0, "data.seed", self.seed, "0 or more")


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Split into train, valid and test: fractions of interactions, or of users or items for new_users, new_items."""

    kind: SplitKind = "random"
    # test fraction; unused with kind leave_one_out, and with predefined, where the tables define the test split
    test: float = 0.2
    valid: float = 0.1  # validation fraction, of what the test split leaves; unused with kind leave_one_out
    seed: int = 0  # random seed of the split
    # most training interactions of a user: the newest where there are times, else drawn; others are dropped; 0 = all
    history: int = 0
    new_item_share: float = 0.0  # share of the items that lose all their training interactions

    def __post_init__(self):
        _require_sane("split", self)
        _require(
            self.kind in typing.get_args(SplitKind), "split.kind", self.kind, f"one of {typing.get_args(SplitKind)}"
        )
        for name in ("test", "valid"):
            value = getattr(self, name)
            _require(0 < value < 1, f"split.{name}", value, "between 0 and 1")
        _require(self.seed >= 0, "split.seed", self.seed, "0 or more")
        _require(self.history >= 0, "split.history", self.history, "0 or more")
        _require(0 <= self.new_item_share < 1, "split.new_item_share", self.new_item_share, "in [0, 1)")

    @property
    def drops_rows(self) -> bool:
        """Whether interactions are dropped from the training split."""
        return self.history > 0 or self.new_item_share > 0


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text features: the language model, its cache, TF-IDF and fine-tuning."""

    model: str = "all-MiniLM-L6-v2"  # the installed MiniLM package, a Hugging Face folder, or ORG/NAME@COMMIT
    prompt: str = ""  # name of the model's prompt to prepend to each text; empty = the model's default, if any
    cache: str = "~/.cache/fused_rec"  # folder of cached text embeddings; empty = no cache
    max_tokens: int = 0  # truncate texts to this many tokens; 0 = the model's limit
    # padded tokens per encoder call and device; larger is slower on a CPU and faster on an accelerator
    batch_tokens: int = 2048
    # type of the language model's matrix products; bfloat16 is faster on processors that multiply it natively
    compute_dtype: ComputeDtype = "float32"
    offline: bool = True  # use local model files only; False allows a download from the Hugging Face Hub
    tfidf_dim: int = 256  # dimensions of the TF-IDF features concatenated to the language model's; 0 = none
    # real, or a control: text shuffled between nodes, or random vectors (drawn by train.seed)
    features: TextFeatureSource = "real"
    attributes: tuple[str, ...] = ()  # columns that are rendered as text for users and items without text
    finetune: Finetuning = "frozen"  # language model: frozen, fine-tuned by LoRA, or fine-tuned in full
    lora_rank: int = 8  # rank of the LoRA adapters
    finetune_learning_rate: float = 1e-4  # of the language model (docs/FINETUNING.md); 2e-5 is usual for full
    # texts encoded with gradient per step; the other embeddings are cached from the last evaluation
    finetune_texts_per_step: int = 64

    def __post_init__(self):
        _require_sane("text", self)
        controls = typing.get_args(TextFeatureSource)
        _require(self.features in controls, "text.features", self.features, f"one of {controls}")
        _require(self.tfidf_dim >= 0, "text.tfidf_dim", self.tfidf_dim, "0 or more")
        _require(self.max_tokens >= 0, "text.max_tokens", self.max_tokens, "0 or more")
        _require(self.batch_tokens >= 512, "text.batch_tokens", self.batch_tokens, "at least 512")
        computes = typing.get_args(ComputeDtype)
        _require(self.compute_dtype in computes, "text.compute_dtype", self.compute_dtype, f"one of {computes}")
        fits = self.compute_dtype == "float32" or self.finetune == "frozen"
        _require(fits, "text.compute_dtype", self.compute_dtype, "float32 where text.finetune is not frozen")
        trainings = typing.get_args(Finetuning)
        _require(self.finetune in trainings, "text.finetune", self.finetune, f"one of {trainings}")
        _require(self.lora_rank >= 1, "text.lora_rank", self.lora_rank, "at least 1")
        _require(self.finetune_learning_rate > 0, "text.finetune_learning_rate", self.finetune_learning_rate, "above 0")
        _require(
            self.finetune_texts_per_step >= 1,
            "text.finetune_texts_per_step",
            self.finetune_texts_per_step,
            "at least 1",
        )


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """Graph construction: relations besides the interactions of the tables."""

    attributes: tuple[str, ...] = ()  # item columns whose values become attribute nodes, such as "sector"
    text_knn: int = 10  # in-neighbors of each user and item among those of its type, nearest by text; 0 = none
    # user-user edges: observed, rewired at equal degrees as a control (drawn by train.seed), or none
    social_edges: SocialEdges = "observed"

    def __post_init__(self):
        _require_sane("graph", self)
        _require(
            self.social_edges in typing.get_args(SocialEdges),
            "graph.social_edges",
            self.social_edges,
            f"one of {typing.get_args(SocialEdges)}",
        )
        _require(self.text_knn >= 0, "graph.text_knn", self.text_knn, "0 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture. Variants: fused = text and graph; graph = without text; text = a user is made of item text."""

    variant: Variant = "fused"
    # a published method, one of METHODS; empty = the model of these settings. A flag, or fr.configure, that names one
    # applies the settings of the method, `variant` among them
    method: str = ""
    dim: int = 64  # embedding dimension of each branch
    num_layers: int = 3  # propagation layers (hops)
    score: Score = "cosine"  # cosine similarity, or dot product
    relation_gates: bool = True  # gate each relation per node and layer, from the node's text and degree
    # learned weights; uniform mean over layers 0..L; or mean over layers 1..L, without the input embedding (XSimGCL)
    layer_combination: LayerCombination = "learned"
    embedding_noise: float = 0.0  # norm of the random noise added to each embedding in every layer (XSimGCL's epsilon)
    # weight of log(1 + item degree) in the logits: 0 = none, 1 = the item's share of all interactions
    popularity_weight: float = 0.5
    popularity_half_life: float = 0.0  # days after which an interaction counts half in the item degree; 0 = never
    # rank by a weighted sum of the model, its branches and closed-form recommenders; validation fits the weights
    late_fusion: bool = False
    # with late fusion: raise items without interactions, as far as NDCG@10 and recall@20 on validation lose at most
    # this share; 0 = not at all
    launch_cost: float = 0.005
    user_id_embedding: bool = True  # False: no user-ID embedding; users are represented by neighbors and text only
    user_text_input: bool = True  # False: user text is used for gates and text-kNN edges, not as an input feature
    text_projection: TextProjection = "linear"  # of text features to `dim`: one matrix, or two layers (AlphaRec)
    # variant text: one layer from items to users, or `num_layers` layers in both directions, in which users start as
    # the mean of their items' text features, without text of their own (AlphaRec)
    text_propagation: TextPropagation = "to_users"
    # weight of the InfoNCE loss between final embeddings and projected text, in any variant (RLMRec-Con); 0 = none
    text_alignment: float = 0.0
    # weight of the InfoNCE loss between text features and those predicted from the final embeddings of nodes whose ID
    # embeddings are dropped, in any variant with ID embeddings (RLMRec-Gen); 0 = none
    text_reconstruction: float = 0.0
    edge_dropout: float = 0.0  # fraction of user-item edges dropped from message passing per step
    review_dropout: bool = True  # a dropped edge takes its reviews out of the text of its user and item in that step
    # fraction of nodes whose ID embedding is dropped per step; a learned row replaces it with text_reconstruction
    id_embedding_dropout: float = 0.1
    id_init_std: float = 0.1  # standard deviation of the initial ID embeddings

    def __post_init__(self):
        _require_sane("model", self)
        _require(
            self.variant in typing.get_args(Variant),
            "model.variant",
            self.variant,
            f"one of {typing.get_args(Variant)}",
        )
        _require(self.method in ("", *METHODS), "model.method", self.method, f"empty or one of {METHODS}")
        _require(self.score in typing.get_args(Score), "model.score", self.score, f"one of {typing.get_args(Score)}")
        _require(self.dim >= 1, "model.dim", self.dim, "at least 1")
        _require(self.num_layers >= 0, "model.num_layers", self.num_layers, "0 or more")
        kinds = typing.get_args(LayerCombination)
        _require(self.layer_combination in kinds, "model.layer_combination", self.layer_combination, f"one of {kinds}")
        fits = self.layer_combination == "learned" or not self.relation_gates
        _require(fits, "model.layer_combination", self.layer_combination, "learned where model.relation_gates is True")
        fits = self.layer_combination != "mean_without_input" or self.num_layers > 0
        _require(fits, "model.layer_combination", self.layer_combination, "learned or mean where model.num_layers is 0")
        for name, kind in (("text_projection", TextProjection), ("text_propagation", TextPropagation)):
            kinds = typing.get_args(kind)
            _require(getattr(self, name) in kinds, f"model.{name}", getattr(self, name), f"one of {kinds}")
        _require(self.embedding_noise >= 0, "model.embedding_noise", self.embedding_noise, "0 or more")
        for name in ("edge_dropout", "id_embedding_dropout", "launch_cost"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")
        for name in ("popularity_weight", "popularity_half_life", "text_alignment", "text_reconstruction"):
            _require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "0 or more")
        fits = not self.text_reconstruction or self.uses_ids and self.id_embedding_dropout > 0
        bound = "0 where no ID embeddings are dropped (model.id_embedding_dropout)"
        _require(fits, "model.text_reconstruction", self.text_reconstruction, bound)
        _require(self.id_init_std > 0, "model.id_init_std", self.id_init_std, "above 0")

    @property
    def name(self) -> str:
        """The name of the model in results: its method, or else its variant."""
        return self.method or self.variant

    @property
    def is_trained(self) -> bool:
        """Whether parameters are trained by gradients; if not, a baseline is fitted."""
        return self.method not in typing.get_args(Baseline)

    @property
    def uses_ids(self) -> bool:
        """Whether nodes have ID embeddings, propagated over all relations; if not, a user is made of item text."""
        return self.variant != "text"

    @property
    def uses_text(self) -> bool:
        """Whether text is an input."""
        return self.variant != "graph"

    @property
    def reads_text(self) -> bool:
        """Whether text is an input or target of a loss of embeddings, and so must be encoded."""
        return self.uses_text or self.text_alignment > 0 or self.text_reconstruction > 0

    @property
    def fuses_text(self) -> bool:
        """Whether text gates the graph's messages, and a second branch scores by text alone (`text_branch`)."""
        return self.uses_ids and self.uses_text

    @property
    def effective_layers(self) -> int:
        """Layers that are propagated: one at most where text goes from items to users alone."""
        return self.num_layers if self.uses_ids or self.users_start_as_items else min(self.num_layers, 1)

    @property
    def users_start_as_items(self) -> bool:
        """Whether a user's input is the mean of their items' text, and text propagates in both directions."""
        return not self.uses_ids and self.text_propagation == "both_ways"

    @property
    def hops(self) -> int:
        """Hops of the graph that an embedding depends on: the layers, and one more where users start as their items."""
        return self.effective_layers + self.users_start_as_items

    @property
    def local_text(self) -> bool:
        """Whether the text of a node enters where that node is alone: not where users start as their items."""
        both = [self, self.text_branch()] if self.fuses_text else [self]
        return not any(branch.users_start_as_items for branch in both)

    def text_branch(self) -> "ModelConfig":
        """Returns the settings of the second branch of a model that fuses text."""
        return dataclasses.replace(self, variant="text", late_fusion=False, text_alignment=0.0, text_reconstruction=0.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Loss, optimizer and early stopping. A batch: `batch_size` users with up to `positives_per_user` items each."""

    loss: Loss = "softmax"
    # divides the scores in every loss; 1 for LightGCN's BPR over dot products; 0 = chosen on validation among
    # TEMPERATURES and LOW_TEMPERATURE; large tables take the first
    temperature: float = 0.15
    batch_size: int = 512  # users per step
    positives_per_user: int = 64  # most positive items sampled per user and step
    # sampled negatives per user, shared over the batch by sampled_softmax; bpr samples one per positive instead
    num_negatives: int = 16
    num_neighbors: int = 0  # in-neighbors sampled per node, relation and step; 0 = the full graph (docs/SCALE.md)
    # weight of the InfoNCE loss between the final and the first layer, both with model.embedding_noise (XSimGCL)
    contrastive_weight: float = 0.0
    learning_rate: float = 0.01
    weight_decay: float = 0.1  # decoupled (AdamW)
    # with num_neighbors, update the ID embeddings that a step reaches, and the others when they are reached: the same
    # optimizer, faster where most are not reached (docs/SCALE.md)
    lazy_adam: bool = False
    # dtype of products and collectives in a training step; parameters, sums and evaluation are float32. auto = bfloat16
    # where a probe at the start of the run finds it faster
    compute_dtype: TrainCompute = "float32"
    max_steps: int = 2000
    eval_every: int = 50  # steps between evaluations on the validation split
    patience: int = 5  # early stopping: evaluations without improvement before training ends
    metric: str = "ndcg@10"  # validation metric that selects the step
    wandb: str = ""  # Weights & Biases project that also receives curves and results; empty = none
    # retrain for the selected number of steps: on train and valid, before the test metrics are measured; or on all
    # interactions, after they were measured on the model of train alone, for serving; docs/commands.md
    refit: Refit = "none"
    seed: int = 0  # random seed of initialization, batches, dropout and controls

    def __post_init__(self):
        _require_sane("train", self)
        _require(self.loss in typing.get_args(Loss), "train.loss", self.loss, f"one of {typing.get_args(Loss)}")
        computes = typing.get_args(TrainCompute)
        _require(self.compute_dtype in computes, "train.compute_dtype", self.compute_dtype, f"one of {computes}")
        _require(self.temperature >= 0, "train.temperature", self.temperature, "above 0, or 0 to choose it")
        for name in ("batch_size", "positives_per_user", "num_negatives", "max_steps", "eval_every", "patience"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.num_neighbors >= 0, "train.num_neighbors", self.num_neighbors, "0 or more")
        fits = self.loss != "softmax" or not self.num_neighbors
        bound = "sampled_softmax or bpr where train.num_neighbors is above 0: softmax needs the embeddings of all items"
        _require(fits, "train.loss", self.loss, bound)
        _require(self.metric in METRICS, "train.metric", self.metric, f"one of {METRICS}")
        _require(self.contrastive_weight >= 0, "train.contrastive_weight", self.contrastive_weight, "0 or more")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        fits = not self.lazy_adam or self.num_neighbors > 0
        _require(fits, "train.lazy_adam", self.lazy_adam, "False where train.num_neighbors is 0: all rows are reached")
        decay = self.learning_rate * self.weight_decay
        bound = "False where train.learning_rate * train.weight_decay is .09 or more"
        _require(not self.lazy_adam or decay < 0.09, "train.lazy_adam", self.lazy_adam, bound)
        fits = len(self.wandb) <= 128 and not set(self.wandb) & set("/\\#?%:")
        _require(fits, "train.wandb", self.wandb, "a project name of at most 128 characters without / \\ # ? % :")
        refits = typing.get_args(Refit)
        _require(self.refit in refits, "train.refit", self.refit, f"one of {refits}")
        _require(0 <= self.seed < 2**31, "train.seed", self.seed, "in [0, 2^31)")

    @property
    def dtype(self) -> ComputeDtype:
        """The type of a step's products; a choice of `auto` precedes the first step."""
        if self.compute_dtype == "auto":
            raise ValueError("train.compute_dtype is auto; choose_compute_type comes before a step")
        return self.compute_dtype


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """What cards and pages say of a model beyond what the run knows; empty = not stated."""

    owner: str = ""  # who is responsible for the model
    purpose: str = ""  # what it may be used for
    license: str = ""  # of the model: a name, or an identifier of the Hugging Face Hub, such as cc-by-4.0

    def __post_init__(self):
        _require_sane("card", self)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. `to_dict` and `from_dict` convert it for JSON, checkpoints and absl flags.

    Example:
      fr.Config().model.dim
    """

    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    text: TextConfig = TextConfig()
    graph: GraphConfig = GraphConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    card: CardConfig = CardConfig()

    def __post_init__(self):
        fits = not self.train.contrastive_weight or self.model.num_layers > 0
        _require(fits, "train.contrastive_weight", self.train.contrastive_weight, "0 where model.num_layers is 0")
        fits = self.train.refit == "none" or not self.split.drops_rows
        bound = "none where split.history or split.new_item_share is above 0: a refit adds held-out interactions"
        _require(fits, "train.refit", self.train.refit, bound)
        fits = self.text.finetune == "frozen" or self.model.uses_text
        _require(fits, "text.finetune", self.text.finetune, "frozen where model.variant is graph, which uses no text")
        fits = self.text.finetune == "frozen" or not self.train.num_neighbors
        _require(
            fits,
            "text.finetune",
            self.text.finetune,
            "frozen where train.num_neighbors is above 0: fine-tuning is not implemented for sampled subgraphs",
        )
        fits = self.text.finetune == "frozen" or self.text.features != "random"
        _require(fits, "text.finetune", self.text.finetune, "frozen where text.features is random: no text is encoded")

    @property
    def encodes_text(self) -> bool:
        """Whether the language model encodes the texts of the tables."""
        return self.model.reads_text and self.text.features != "random"


def with_temperature(config: Config, temperature: float) -> Config:
    """Returns the config with this train.temperature."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, temperature=temperature))


def with_compute_dtype(config: Config, compute_dtype: ComputeDtype) -> Config:
    """Returns the config with this train.compute_dtype."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=compute_dtype))


def measured_alone(config: Config) -> Config:
    """Returns the config without a training that only serving needs, for studies, which read metrics."""
    refit = "none" if config.train.refit == "all" else config.train.refit
    return dataclasses.replace(config, train=dataclasses.replace(config.train, refit=refit))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Converts a config to nested dictionaries of plain values, by section and setting, as JSON takes them."""
    return dataclasses.asdict(config)


def differing(config: Config, there: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Compares a config with the `to_dict` of another one, read back from JSON.

    Args:
      config: the config.
      there: the other one, as dictionaries.

    Returns:
      (other value, value in `config`) of each setting that differs, by its name `section.setting`.
    """
    found = {}
    for section, settings in to_dict(config).items():
        for name, value in settings.items():
            here = list(value) if isinstance(value, tuple) else value  # JSON has no tuples
            other = there.get(section, {}).get(name)
            other = list(other) if isinstance(other, tuple) else other
            if other != here:
                found[f"{section}.{name}"] = other, here
    return found


def portable(config: Config) -> dict[str, dict[str, Any]]:
    """Converts a config as `to_dict` does, without the settings of local folders, for publication."""
    values = to_dict(config)
    for section, setting in PLACES:
        del values[section][setting]
    return values


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Builds a config from nested dictionaries, the inverse of `to_dict`.

    Args:
      values: settings by section; absent ones take their defaults.

    Returns:
      The validated config.

    Raises:
      ValueError: an unknown section or setting, or a value out of its bounds.
    """
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    _require(isinstance(values, Mapping), "config", values, "a dictionary of sections")
    unknown = set(values) - set(sections)
    _require(not unknown, "config", sorted(map(str, unknown)), f"made of the sections {sorted(sections)}")
    return Config(**{name: _section(name, sections[name], settings) for name, settings in values.items()})


def _section(name: str, kind: Any, settings: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}
    _require(isinstance(settings, Mapping), f"config section {name}", settings, "a dictionary of settings")
    unknown = set(settings) - set(known)
    _require(not unknown, f"config section {name}", sorted(map(str, unknown)), f"made of the settings {sorted(known)}")
    typed = {}
    for setting, given in settings.items():
        default, value = known[setting], _plain(given)
        if isinstance(default, tuple):
            strings = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
            _require(strings, f"{name}.{setting}", value, "a list of strings")
            value = tuple(map(str, value))  # NumPy's strings too
        elif default is None and value is None:
            typed[setting] = None
            continue
        elif (default is None or isinstance(default, float)) and isinstance(value, int) and not isinstance(value, bool):
            _require(abs(value) < 2**63, f"{name}.{setting}", value, "of 64 bits")  # float() may overflow beyond
            value = float(value)
        wanted, bound = (float, "a number, or None") if default is None else (type(default), "")
        _require(type(value) is wanted, f"{name}.{setting}", value, bound or f"of type {wanted.__name__}")
        typed[setting] = value
    return kind(**typed)
