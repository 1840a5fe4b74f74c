"""Settings of config.json by encoder family: those read, those without effect on vectors, and those with fixed values.

A setting in none of the tables is reported, since it may belong to an unsupported variant.
"""

import re
from collections.abc import Mapping
from typing import Any

from fused_rec.text.encoders.config_fields import require

_BERT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act") + (
    ("max_position_embeddings", "layer_norm_eps", "position_embedding_type", "is_decoder")
)
_DECODER = (
    _BERT[:7]
    + ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "rope_scaling")
    + (("rope_theta", "tie_word_embeddings", "is_causal", "layer_types", "original_max_position_embeddings"))
)
_QWEN = ("sliding_window", "use_sliding_window", "max_window_layers")
# Settings that the reader of each family uses.
READ: dict[str, frozenset[str]] = {
    "bert": frozenset((*_BERT, "type_vocab_size")),
    "roberta": frozenset((*_BERT, "type_vocab_size", "pad_token_id")),
    "xlm-roberta": frozenset((*_BERT, "type_vocab_size", "pad_token_id")),
    "distilbert": frozenset(
        ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "activation", "max_position_embeddings")
        + ("position_embedding_type", "is_decoder")
    ),
    "mpnet": frozenset((*_BERT, "relative_attention_num_buckets")),
    "modernbert": frozenset(
        (*_BERT[:5], "max_position_embeddings", "norm_eps", "hidden_activation", "local_attention", "sliding_window")
        + ("layer_types", "global_attn_every_n_layers", "rope_parameters", "rope_scaling", "global_rope_theta")
        + ("local_rope_theta", "attention_bias", "mlp_bias", "norm_bias")
    ),
    "llama": frozenset((*_DECODER, "attention_bias", "mlp_bias")),
    "mistral": frozenset((*_DECODER, "sliding_window")),
    "qwen2": frozenset((*_DECODER, *_QWEN)),
    "qwen3": frozenset((*_DECODER, *_QWEN, "attention_bias")),
}
# Settings of dropout, training, heads of other tasks, generation, and execution of the original.
NO_EFFECT = re.compile(
    r"""_?name_or_path|architectures|model_type|transformers_version|transformers\.js_config|torch_dtype|dtype
    |\w*dropout\w*|\w*_pdrop|initializer_\w+|gradient_checkpointing|use_cache|output_(past|attentions|hidden_states)
    |return_dict|use_return_dict|chunk_size_feed_forward|pretraining_tp|sinusoidal_pos_embds|tie_(weights_|word_embeddings)
    |((bos|eos|cls|sep|pad|mask|unk|decoder_start|forced_bos|forced_eos)_)token_id|pooler_\w+|directionality
    |id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|classifier_\w+|decoder_bias
    |sparse_pred(iction|_ignore_index)|deterministic_flash_attn|reference_compile|repad_logits_with_grad
    |_?attn_implementation(_\w+)?|final_logit_softcapping|logits_scaling|logit_scale|is_llama_config|sentence_transformers
    |(max|min)_length|do_sample|temperature|top_[kp]|typical_p|num_(beams|beam_groups|return_sequences)|diversity_penalty
    |repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|early_stopping
    |output_scores|return_dict_in_generate|remove_invalid_values|exponential_decay_length_penalty|suppress_tokens
    |begin_suppress_tokens|prefix|tokenizer_class|torchscript|use_bfloat16|tf_legacy_loss|unsloth_\w+|gradient_\w+
    |pad_token|bos_token|eos_token""",
    re.VERBOSE,
)
STALE = {  # in some published files, not read by the family's original
    "modernbert": ("layer_norm_eps", "position_embedding_type"),
    "qwen2": ("attention_bias",),
}
# Settings of unsupported extensions, with the value that disables each.
NEUTRAL: dict[str, Any] = {
    "quantization_config": None,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "use_bidirectional_attention": False,
    "bidirectional": False,
    "causal_mask": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    "use_mrope": False,
    "mrope_section": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": None,
    "attention_chunk_size": None,
    "attn_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "scale_emb": 1,
    "scale_depth": None,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "alibi": False,
    "num_experts": None,
    "num_local_experts": None,
}
ENCODERS_ONLY = {"is_causal": False}  # for families that are no decoders
STANDARD = re.compile(
    r"(Bert|DistilBert|Llama|Mistral|ModernBert|MPNet|Qwen2|Qwen3|Roberta|XLMRoberta)(Model|LMHeadModel|For\w+)"
)


def check(stored: Mapping[str, Any], model_type: str) -> list[str]:
    """Checks the settings of a config.json.

    Args:
      stored: its content.
      model_type: its family, a key of `READ`.

    Returns:
      Unknown settings, sorted.

    Raises:
      ValueError: a setting enables something that the family does not support.
    """
    read = READ[model_type]
    require(stored, **{name: value for name, value in NEUTRAL.items() if name not in read})
    if "is_causal" not in read:
        require(stored, **ENCODERS_ONLY)
    if stored.get("embedding_size") not in (None, stored.get("hidden_size", stored.get("dim"))):
        raise ValueError(f"embedding_size is {stored['embedding_size']!r:.60}; supported is that of hidden_size")
    names = stored.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or not STANDARD.fullmatch(name):
            raise ValueError(f"architectures names {name!r:.60}, which is no model of {model_type} in transformers")
    supported = read | NEUTRAL.keys() | ENCODERS_ONLY.keys() | {"embedding_size", *STALE.get(model_type, ())}
    return sorted(name for name in stored if name not in supported and not NO_EFFECT.fullmatch(name))
