"""Tokenizers: settings of tokenizer_config.json are applied to tokenizer.json, or refused by name.

transformers applies some depending on `tokenizer_class`; where its versions 4 and 5 would give different tokens, the
folder is refused, with a remedy.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from fused_rec.text.encoders.config_fields import field, one_of

Side = Literal["left", "right"]
SIDES = ("right", "left")
# Classes where tokenizer_config.json has none; other families use tokenizer.json unchanged.
DEFAULT_CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "mpnet": "MPNetTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
}
# Classes whose settings replace those of the BertNormalizer, or of the first ByteLevel, in tokenizer.json.
WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer")
BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer")
IN_PYTHON = ("BertJapaneseTokenizer", "BertweetTokenizer", "PhobertTokenizer")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# By name in tokenizer_config.json: name in BertNormalizer, and default.
NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def tokenizer_class(stored: Mapping[str, Any], model_type: str) -> str:
    """Returns the tokenizer class of a model.

    Args:
      stored: content of tokenizer_config.json.
      model_type: family of the model.

    Returns:
      The class in the file without "Fast", or the default of the family; "" where there is none.

    Raises:
      ValueError: the class is implemented in Python, so that tokenizer.json does not describe it.
    """
    name = field(stored, "tokenizer_class", str, DEFAULT_CLASSES.get(model_type, "")).removesuffix("Fast")
    if name in IN_PYTHON:
        raise ValueError(f"tokenizer_class is {name!r}, which is Python code; supported are those of tokenizer.json")
    return name


def cut_side(stored: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> Side:
    """Returns the end at which long texts are truncated.

    Args:
      stored: content of tokenizer_config.json.
      tokenizer: the tokenizer of tokenizer.json, used where `stored` has no side.

    Returns:
      The side, right by default.

    Raises:
      ValueError: the side is neither left nor right.
    """
    own = (tokenizer.truncation or {}).get("direction")
    side = field(stored, "truncation_side", str, own or "right")
    one_of("truncation_side", side, SIDES)
    return side  # pyright: ignore[reportReturnType]


def settle(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any], model_type: str) -> None:
    """Applies the settings of tokenizer_config.json to a tokenizer, in place.

    Args:
      tokenizer: the tokenizer of tokenizer.json.
      stored: content of tokenizer_config.json.
      model_type: family of the model.

    Raises:
      ValueError: the files contradict each other in a way that versions of transformers resolve differently.
    """
    kind = tokenizer_class(stored, model_type)
    content = json.loads(tokenizer.to_str())
    if kind in WORDPIECE:
        check_rebuilt(content, kind)
        _settle_normalizer(tokenizer, content, stored)
    _settle_prefix(tokenizer, content, stored, kind)
    _add_tokens(tokenizer, stored)
    _check_ends(tokenizer, stored, kind)
    if content["model"].get("dropout"):
        raise ValueError(f"tokenizer.json: the model's dropout is {content['model']['dropout']}; supported is null")
    tokenizer.encode_special_tokens = field(stored, "split_special_tokens", bool, False)


def check_types(tokenizer: tokenizers.Tokenizer) -> None:
    """Checks that the segment ids of a text are 0, as encoders assume.

    Args:
      tokenizer: the tokenizer.

    Raises:
      ValueError: they are not 0.
    """
    if any(_sample(tokenizer).type_ids):
        raise ValueError("tokenizer.json: its post_processor gives a text other type ids than 0; supported is 0")


def check_rebuilt(content: Mapping[str, Any], kind: str) -> None:
    """Checks that rebuilding a WordPiece tokenizer from its vocabulary, as transformers does, drops no settings.

    Args:
      content: content of tokenizer.json.
      kind: tokenizer class.

    Raises:
      ValueError: a setting would be dropped.
    """
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    found = {
        "normalizer": _kind_of(content.get("normalizer")),
        "pre_tokenizer": _kind_of(content.get("pre_tokenizer")),
        "model.continuing_subword_prefix": model.get("continuing_subword_prefix", "##"),
        "model.max_input_chars_per_word": model.get("max_input_chars_per_word", 100),
    }
    built = dict(zip(found, ("BertNormalizer", "BertPreTokenizer", "##", 100), strict=True))
    for name, value in built.items():
        if found[name] != value:
            raise ValueError(
                f"tokenizer.json: {name} is {found[name]!r:.60}, and a {kind} has {value!r}; to keep the former, set "
                'tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json'
            )


def _sample(tokenizer: tokenizers.Tokenizer) -> tokenizers.Encoding:
    """Encodes a short text."""
    try:
        return tokenizer.encode("a")
    except Exception as error:  # the library raises no other class
        raise ValueError(f"tokenizer.json cannot encode the text 'a' ({error}); fetch the file again") from error


def _kind_of(step: Any) -> Any:
    """Returns the type of a step of a tokenizer."""
    return step.get("type") if isinstance(step, dict) else None


def _settle_normalizer(tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Replaces the BertNormalizer by one with the settings of tokenizer_config.json."""
    settings = {theirs: field(stored, name, bool, default) for name, (theirs, default) in NORMALIZER.items()}
    tokenizer.normalizer = normalizers.BertNormalizer(**settings, clean_text=content["normalizer"]["clean_text"])
    unknown, used = _token(stored.get("unk_token")), content["model"].get("unk_token")
    if unknown is not None and used is not None and unknown != used:
        raise ValueError(f"unk_token is {unknown!r:.60} and that of tokenizer.json {used!r:.60}; they must be the same")


def _settle_prefix(
    tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], stored: Mapping[str, Any], kind: str
) -> None:
    """Applies `add_prefix_space`: whether a space is put before a text."""
    steps = [*_steps(content.get("normalizer"), "normalizers"), *_steps(content.get("pre_tokenizer"), "pretokenizers")]
    requested = field(stored, "add_prefix_space", bool, False if kind in BYTE_LEVEL else None)
    actual = {_kind_of(step): _adds_space(step) for step in steps if _adds_space(step) is not None}
    if requested is None or all(space == requested for space in actual.values()):
        return
    if kind not in BYTE_LEVEL or set(actual) != {"ByteLevel"}:
        raise ValueError(
            f"add_prefix_space is {requested}, and the {' and '.join(actual)} of tokenizer.json does otherwise; "
            "make the two files agree"
        )
    rebuilt = [
        pre_tokenizers.ByteLevel(add_prefix_space=requested, use_regex=step.get("use_regex", True))
        if step["type"] == "ByteLevel"
        else _rebuilt(step)
        for step in _steps(content["pre_tokenizer"], "pretokenizers")
    ]
    tokenizer.pre_tokenizer = rebuilt[0] if len(rebuilt) == 1 else pre_tokenizers.Sequence(rebuilt)


def _rebuilt(step: Mapping[str, Any]) -> Any:
    """Builds one step of a pre-tokenizer, which the library parses only within a tokenizer."""
    minimal = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": step}
    return tokenizers.Tokenizer.from_str(json.dumps(minimal | dict.fromkeys(("normalizer", "decoder")))).pre_tokenizer


def _steps(whole: Any, members: str) -> list[dict[str, Any]]:
    """Flattens nested sequences of steps."""
    if not isinstance(whole, dict):
        return []
    return [step for inner in whole[members] for step in _steps(inner, members)] if members in whole else [whole]


def _adds_space(step: Mapping[str, Any]) -> bool | None:
    """Returns whether a step puts a space before a text, None where it does not concern spaces."""
    if step["type"] == "ByteLevel":
        return bool(step["add_prefix_space"])
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return True if step["type"] == "Prepend" else None


def _token(value: Any) -> str | None:
    """Returns the text of a special token, stored as a string or as an object with properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _add_tokens(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any]) -> None:
    """Adds the tokens of tokenizer_config.json and added_tokens.json (merged into `stored`) with their properties."""
    listed = field(stored, "added_tokens_decoder", dict, {})
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added: list[tuple[int, AddedToken]] = []
    for number, entry in listed.items():
        text = _token(entry)
        if text is None or not number.isdecimal():
            raise ValueError(f"added_tokens_decoder has {number!r:.60}: {entry!r:.60}; it must map ids to tokens")
        if tokenizer.token_to_id(text) != int(number):
            raise ValueError(
                f"added_tokens_decoder gives {text!r:.60} the id {number}, and tokenizer.json "
                f"{tokenizer.token_to_id(text)}; write both again with "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        given = {flag: field(entry, flag, bool, False) for flag in flags} if isinstance(entry, dict) else {}
        added.append((int(number), AddedToken(text, **given)))
    present = {token.content for _, token in added} | {
        token.content for token in tokenizer.get_added_tokens_decoder().values()
    }
    for name in NAMED_TOKENS:
        text = _token(stored.get(name))
        if text is not None and text not in present and (number := tokenizer.token_to_id(text)) is not None:
            added.append((number, AddedToken(text, special=True, normalized=False)))
    for number, token in sorted(added, key=lambda pair: pair[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(f"the token {token.content!r:.60} is not in tokenizer.json; fetch both files again")


def _check_ends(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError where the special tokens around a text are not those of tokenizer_config.json."""
    encoding = _sample(tokenizer)
    special = [number for number, one in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if one]
    ends = {"bos_token": encoding.special_tokens_mask[:1] == [1], "eos_token": encoding.special_tokens_mask[-1:] == [1]}
    position = {"bos_token": 0, "eos_token": -1, "cls_token": 0, "sep_token": -1}

    def adds(name: str) -> bool:
        text = _token(stored.get(name))
        number = None if text is None else tokenizer.token_to_id(text)
        has_special = ends["bos_token" if position[name] == 0 else "eos_token"]
        return has_special and number is not None and special[position[name]] == number

    for name in ("bos_token", "eos_token"):
        requested = field(stored, f"add_{name}", bool, None)
        strict = requested or kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
        if requested is not None and strict and _token(stored.get(name)) is not None and adds(name) != requested:
            actual = "adds none" if requested else "adds it"
            raise ValueError(
                f"add_{name} is {requested}, and the post_processor of tokenizer.json {actual}; "
                "make the two files agree"
            )
    if kind in (*WORDPIECE, "RobertaTokenizer"):
        for name in ("cls_token", "sep_token"):
            if _token(stored.get(name)) is not None and not adds(name):
                raise ValueError(
                    f"{name} is {_token(stored[name])!r:.60}, and the post_processor of tokenizer.json puts another "
                    "token there or none; make the two files agree"
                )
