"""A published tokenizer.json under the settings of the tokenizer_config.json beside it: honoured, or refused by name.

transformers applies some of them according to `tokenizer_class`; where its versions 4 and 5 would give other tokens,
the folder is refused, with what to change.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from fused_rec.text.encoders.config_fields import field, one_of

Side = Literal["left", "right"]
SIDES = ("right", "left")
# Of a folder whose tokenizer_config.json names no class; other families take tokenizer.json as it is.
DEFAULT_CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "mpnet": "MPNetTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
}
# Classes whose settings replace those of tokenizer.json's BertNormalizer, and of its first ByteLevel.
WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer")
BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer")
IN_PYTHON = ("BertJapaneseTokenizer", "BertweetTokenizer", "PhobertTokenizer")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# In tokenizer_config.json; what a BertNormalizer calls it, and its default.
NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def tokenizer_class(stored: Mapping[str, Any], model_type: str) -> str:
    """The class that tokenizer_config.json names, without "Fast", or the family's own; "" where there is none.

    Raises ValueError on one that computes tokens in Python, which tokenizer.json does not describe.
    """
    name = field(stored, "tokenizer_class", str, DEFAULT_CLASSES.get(model_type, "")).removesuffix("Fast")
    if name in IN_PYTHON:
        raise ValueError(f"tokenizer_class is {name!r}, which is Python code; supported are those of tokenizer.json")
    return name


def cut_side(stored: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> Side:
    """Which end of a long text is cut off: as tokenizer_config.json says, or else tokenizer.json; the right one."""
    own = (tokenizer.truncation or {}).get("direction")
    side = field(stored, "truncation_side", str, own or "right")
    one_of("truncation_side", side, SIDES)
    return side  # pyright: ignore[reportReturnType]


def settle(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any], model_type: str) -> None:
    """Applies the settings of tokenizer_config.json to a tokenizer of tokenizer.json.

    Raises ValueError where they contradict it in a way that transformers' versions resolve differently.
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
    """Raises ValueError where a text of its own would have other segments than 0, which encoders are given."""
    if any(_sample(tokenizer).type_ids):
        raise ValueError("tokenizer.json: its post_processor gives a text other type ids than 0; supported is 0")


def check_rebuilt(content: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError where transformers, which builds a WordPiece class from its vocabulary, would drop settings.

    content: of tokenizer.json.
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
    try:
        return tokenizer.encode("a")
    except Exception as error:  # the library raises no other class
        raise ValueError(f"tokenizer.json cannot encode the text 'a' ({error}); fetch the file again") from error


def _kind_of(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _settle_normalizer(tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    settings = {theirs: field(stored, name, bool, default) for name, (theirs, default) in NORMALIZER.items()}
    tokenizer.normalizer = normalizers.BertNormalizer(**settings, clean_text=content["normalizer"]["clean_text"])
    unknown, used = _token(stored.get("unk_token")), content["model"].get("unk_token")
    if unknown is not None and used is not None and unknown != used:
        raise ValueError(f"unk_token is {unknown!r:.60} and that of tokenizer.json {used!r:.60}; they must be the same")


def _settle_prefix(
    tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], stored: Mapping[str, Any], kind: str
) -> None:
    """Whether a text begins as if a space stood before it (add_prefix_space)."""
    parts = [*_parts(content.get("normalizer"), "normalizers"), *_parts(content.get("pre_tokenizer"), "pretokenizers")]
    asked = field(stored, "add_prefix_space", bool, False if kind in BYTE_LEVEL else None)
    does = {_kind_of(part): _puts_space(part) for part in parts if _puts_space(part) is not None}
    if asked is None or all(space == asked for space in does.values()):
        return
    if kind not in BYTE_LEVEL or set(does) != {"ByteLevel"}:
        raise ValueError(
            f"add_prefix_space is {asked}, and the {' and '.join(does)} of tokenizer.json does otherwise; "
            "make the two files agree"
        )
    steps = [
        pre_tokenizers.ByteLevel(add_prefix_space=asked, use_regex=part.get("use_regex", True))
        if part["type"] == "ByteLevel"
        else _rebuilt(tokenizer, part)
        for part in _parts(content["pre_tokenizer"], "pretokenizers")
    ]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _rebuilt(tokenizer: tokenizers.Tokenizer, part: Mapping[str, Any]) -> Any:
    """One step of a pre-tokenizer on its own, which the library reads only as part of a tokenizer."""
    alone = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": part}
    return tokenizers.Tokenizer.from_str(json.dumps(alone | dict.fromkeys(("normalizer", "decoder")))).pre_tokenizer


def _parts(whole: Any, members: str) -> list[dict[str, Any]]:
    if not isinstance(whole, dict):
        return []
    return [part for inner in whole[members] for part in _parts(inner, members)] if members in whole else [whole]


def _puts_space(part: Mapping[str, Any]) -> bool | None:
    if part["type"] == "ByteLevel":
        return bool(part["add_prefix_space"])
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return True if part["type"] == "Prepend" else None


def _token(value: Any) -> str | None:
    """The text of a special token, which files write as a string or as an object with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and content else None


def _add_tokens(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any]) -> None:
    """Tokens that tokenizer_config.json or added_tokens.json (joined into `stored`) lists, with their properties."""
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
                f"{tokenizer.token_to_id(text)}; write both anew with "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        given = {flag: field(entry, flag, bool, False) for flag in flags} if isinstance(entry, dict) else {}
        added.append((int(number), AddedToken(text, **given)))
    known = {token.content for _, token in added} | {
        token.content for token in tokenizer.get_added_tokens_decoder().values()
    }
    for name in NAMED_TOKENS:
        text = _token(stored.get(name))
        if text is not None and text not in known and (number := tokenizer.token_to_id(text)) is not None:
            added.append((number, AddedToken(text, special=True, normalized=False)))
    for number, token in sorted(added, key=lambda pair: pair[0]):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ValueError(f"the token {token.content!r:.60} has no place in tokenizer.json; fetch both files again")


def _check_ends(tokenizer: tokenizers.Tokenizer, stored: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError where what is put before and after a text is not what tokenizer_config.json says."""
    encoding = _sample(tokenizer)
    special = [number for number, one in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if one]
    ends = {"bos_token": encoding.special_tokens_mask[:1] == [1], "eos_token": encoding.special_tokens_mask[-1:] == [1]}
    place = {"bos_token": 0, "eos_token": -1, "cls_token": 0, "sep_token": -1}

    def puts(name: str) -> bool:
        text = _token(stored.get(name))
        number = None if text is None else tokenizer.token_to_id(text)
        there = ends["bos_token" if place[name] == 0 else "eos_token"]
        return there and number is not None and special[place[name]] == number

    for name in ("bos_token", "eos_token"):
        asked = field(stored, f"add_{name}", bool, None)
        strict = asked or kind in ("LlamaTokenizer", "CodeLlamaTokenizer")
        if asked is not None and strict and _token(stored.get(name)) is not None and puts(name) != asked:
            raise ValueError(
                f"add_{name} is {asked}, and the post_processor of tokenizer.json {'adds none' if asked else 'adds it'}"
                "; make the two files agree"
            )
    if kind in (*WORDPIECE, "RobertaTokenizer"):
        for name in ("cls_token", "sep_token"):
            if _token(stored.get(name)) is not None and not puts(name):
                raise ValueError(
                    f"{name} is {_token(stored[name])!r:.60}, and the post_processor of tokenizer.json puts another "
                    "token there or none; make the two files agree"
                )
