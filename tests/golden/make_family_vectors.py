"""Writes the tiny models of every encoder family and what the PyTorch originals make of them.

    pip install torch transformers safetensors tokenizers numpy && python tests/golden/make_family_vectors.py

Run it again only when a family is added or the texts change; the encoders under test have no part in it. Writes
  families/NAME/            a folder as the hub has it: random weights, in bfloat16 except llama's, and a tokenizer
  families/variants.json    other settings for the same weights, by FAMILY/VARIANT
  families/outputs.safetensors  `ids` int32 [rows, tokens] and `lengths` int32 [rows], to be taken modulo a vocabulary;
      `places` int32 [places, 2], the rows and tokens whose hidden states are kept; FAMILY/VARIANT float32 [places, D];
      FAMILY/vectors float32 [texts, D], of the texts below as the folder's files say they are pooled
"""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

HERE = Path(__file__).parent
FOLDER = HERE / "families"
LENGTHS = [151, 1, 2, 37, 63]
TEXTS = json.loads((HERE / "minilm_texts.json").read_text("utf-8"))
TEXTS = [*TEXTS[8:14], *TEXTS[31:40], *TEXTS[80:110:4]]

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
ROTARY = SMALL | {"max_position_embeddings": 160, "rms_norm_eps": 1e-5}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 40}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 50}
# Of each: what the folder stores besides the encoder, its settings, its tokenizer, and other settings for its weights.
FAMILIES = {
    "roberta": (AutoModelForMaskedLM, SMALL | {"max_position_embeddings": 160, "type_vocab_size": 1}, "bytes", {}),
    "xlm-roberta": (AutoModel, SMALL | {"max_position_embeddings": 160, "type_vocab_size": 2}, "unigram", {}),
    "distilbert": (
        AutoModelForMaskedLM,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 160},
        "words",
        {},
    ),
    "mpnet": (AutoModel, SMALL | {"max_position_embeddings": 160}, "words", {}),
    "llama": (
        AutoModelForCausalLM,
        ROTARY | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        "bytes",
        {
            "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}},
            "llama3": {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            "yarn": {"rope_parameters": YARN},
            "yarn_told": {
                "rope_parameters": YARN
                | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
            },
            "yarn_scales": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
        },
    ),
    "mistral": (
        AutoModel,
        ROTARY | {"num_key_value_heads": 1, "head_dim": 12, "sliding_window": 11},
        "bytes",
        {"whole": {"sliding_window": None}},
    ),
    "qwen2": (
        AutoModelForCausalLM,
        ROTARY | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "bytes",
        {
            "windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layer_types": None},
            "types": {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        },
    ),
    "qwen3": (AutoModel, ROTARY | {"num_key_value_heads": 4, "head_dim": 10, "num_hidden_layers": 3}, "bytes_end", {}),
    "modernbert": (
        AutoModelForMaskedLM,
        SMALL | {"num_hidden_layers": 3, "max_position_embeddings": 160, "local_attention": 12}
        | {"global_attn_every_n_layers": 2},
        "bytes",
        {"wide": {"local_attention": 31, "hidden_activation": "silu"}},
    ),
}  # fmt: skip
COUNT_FROM_IDS = ("roberta", "xlm-roberta", "mpnet")  # positions
POOLING = {  # the sentence-transformers files of some folders: pooling, normalisation, prompts
    "roberta": ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True, None),
    "xlm-roberta": ({"pooling_mode": "cls"}, False, None),
    "llama": ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, False, None),
    "qwen3": ({"pooling_mode_lasttoken": True, "include_prompt": True}, True, {"query": "Find funds: ", "passage": ""}),
}


def make_tokenizer(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer that learned from the texts, of one of the kinds that published models have."""
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.train_from_iterator(TEXTS[-8:], trainer)
        ends = ("<s>", "</s>")
    elif kind == "words":
        words = ["<s>", "<pad>", "</s>", "[UNK]", *"abcdefghijklmnopqrstuvwxyz$.,!?", "the", "rate", "fund"]
        words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
        ends = ("<s>", "</s>")
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<s>", "<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(TEXTS, trainer)
        ends = ("", "</s>") if kind == "bytes_end" else ("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (ends[0], "$A", ends[1]) if part),
        special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends if end],
    )
    return tokenizer


def hidden_states(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[rows, tokens, D] with padding on the right, once it is the same with padding on the left."""

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        more = {}
        if (
            model.config.model_type not in COUNT_FROM_IDS
            and "position_ids" in inspect.signature(model.forward).parameters
        ):
            more["position_ids"] = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
        with torch.no_grad():
            return model(torch.tensor(ids), torch.tensor(mask.astype(int)), **more).last_hidden_state.numpy()

    lengths = mask.sum(1)
    shifted = [np.roll(row, mask.shape[1] - length) for row, length in zip(ids, lengths, strict=True)]
    right, left = run(ids, mask), run(np.stack(shifted), mask[:, ::-1].copy())
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(left[row, mask.shape[1] - length :], right[row, :length], atol=3e-5)
    return right


def pooled(model, tokenizer: tokenizers.Tokenizer, pooling: str, normalize: bool) -> np.ndarray:
    """Vectors of the texts, one text a call, so that no padding is involved."""
    from_ids = model.config.model_type in COUNT_FROM_IDS  # positions begin after the padding token's, which is 1
    tokenizer.enable_truncation(model.config.max_position_embeddings - 2 * from_ids)
    rows = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
        rows.append(torch.nn.functional.normalize(vector, dim=0) if normalize else vector)
    return torch.stack(rows).numpy()


def write_family(name: str, outputs: dict[str, np.ndarray]) -> dict[str, dict]:
    """The folder and its outputs; returns the settings of its variants."""
    kind, settings, tokenizer_kind, variants = FAMILIES[name]
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(tokenizer_kind)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}\n', "utf-8")
    torch.manual_seed(20250611)
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = AutoConfig.for_model(name, vocab_size=tokenizer.get_vocab_size(), **ends, **settings)
    model = kind.from_config(config)
    for weight_name, weight in model.named_parameters():
        is_scale = "norm" in weight_name.lower() and weight_name.endswith("weight")
        torch.nn.init.normal_(weight, mean=float(is_scale), std=0.3)
    if name != "llama":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    def opened(**more):
        stored = json.loads((folder / "config.json").read_text("utf-8"))
        config = AutoConfig.for_model(**stored | more)
        return AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()

    ids, lengths, places = outputs["ids"], outputs["lengths"], outputs["places"]
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    ids = np.where(mask, ids % tokenizer.get_vocab_size(), 1)
    for variant, more in {"plain": {}, **variants}.items():
        hidden = hidden_states(opened(**more), ids, mask)
        outputs[f"{name}/{variant}"] = np.ascontiguousarray(hidden[places[:, 0], places[:, 1]])

    decoder = name in ("llama", "mistral", "qwen2", "qwen3")
    if name not in POOLING:
        outputs[f"{name}/vectors"] = pooled(opened(), tokenizer, "lasttoken" if decoder else "mean", False)
    else:
        pooling, normalize, prompts = POOLING[name]
        parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")][: 2 + normalize]
        modules = [
            {"idx": i, "path": path, "type": f"sentence_transformers.models.{t}"} for i, (t, path) in enumerate(parts)
        ]
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling) + "\n", "utf-8")
        (folder / "modules.json").write_text(json.dumps(modules) + "\n", "utf-8")
        if prompts is not None:
            content = {"prompts": prompts, "default_prompt_name": None}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(content) + "\n", "utf-8")
        [mode] = [k for k, on in pooling.items() if on is True and k.startswith("pooling")] or [pooling["pooling_mode"]]
        mode = next(m for m in ("mean", "cls", "lasttoken") if m in mode)
        outputs[f"{name}/vectors"] = pooled(opened(), tokenizer, mode, normalize)
    return {f"{name}/{variant}": more for variant, more in variants.items()}


if __name__ == "__main__":
    lengths = np.array(LENGTHS, np.int32)
    places = [(row, at) for row, n in enumerate(LENGTHS) for at in range(0, n, 4 if n < 40 else 10)]
    places += [(row, n - 1) for row, n in enumerate(LENGTHS) if n > 1]
    outputs = {
        "ids": np.random.default_rng(11).integers(0, 2**20, (len(LENGTHS), max(LENGTHS))).astype(np.int32),
        "lengths": lengths,
        "places": np.array(places, np.int32),
    }
    variants = {}
    for name in FAMILIES:
        variants |= write_family(name, outputs)
    (FOLDER / "variants.json").write_text(json.dumps(variants, indent=1) + "\n", "utf-8")
    save_file(outputs, FOLDER / "outputs.safetensors")
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{len(FAMILIES)} families, {len(variants)} variants, {len(TEXTS)} texts, {size:,} bytes")
