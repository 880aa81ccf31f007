"""The official configuration (flash-linear-attention's ``MomConfig``) and ours, one from the other.

Every official field is honoured, refused by name, or listed here as having no effect on results.
"""

from typing import Any

from mom_jax.config import AttentionConfig, ModelConfig, require
from mom_jax.config_io import checked_values

# Official fields and ours. A file may leave any of them out: the defaults are the same.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "expand_v": "expand_v",
    "num_memories": "num_memories",
    "topk": "top_k",
    "shared_mem": "shared_memory",
    "single_kv_proj": "single_kv_proj",
    "conv_size": "conv_size",
    "conv_bias": "conv_bias",  # the official layer has it, the official model never turns it on
    "use_output_gate": "use_output_gate",
    "hidden_ratio": "hidden_ratio",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_length",
    "aux_loss_scale": "balance_loss_scale",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# Fields of which only one value is supported; of attention, because the official model ignores all others.
FIXED = {"mom_backend": "gated_deltanet", "use_short_conv": True, "hidden_act": "swish", "attnres_block_size": None}
FIXED_ATTENTION = {"qkv_bias": False, "rope_theta": 10000.0}
# How the official code computes the same result, and the values that we write.
WITHOUT_EFFECT = {
    "attn_mode": "chunk", "capacity": 1.0, "use_cache": True, "fuse_norm": True, "fuse_swiglu": True,
    "fuse_cross_entropy": True, "fuse_conv_l2": False,
}  # fmt: skip
# What transformers notes down about files and outputs.
BOOKKEEPING = {
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "tokenizer_class", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "is_decoder", "chunk_size_feed_forward",
}  # fmt: skip
KNOWN = {*FIELDS, *FIXED, *WITHOUT_EFFECT, *BOOKKEEPING, "attn", "use_layer_wise_balance"}


def from_official(official: dict[str, Any], dtype: str | None, overrides: dict[str, Any]) -> ModelConfig:
    """ModelConfig from the fields of an official config.json.

    Args:
      dtype: compute type; None: the file's ``dtype`` (``torch_dtype`` in older ones), else ModelConfig's default.
      overrides: fields of ModelConfig that win over the official ones.

    Raises ``ValueError`` naming a field that is unknown, unsupported, of the wrong type or out of range.
    """
    model_type = official.get("model_type")
    allowed = "it must be 'mom', flash-linear-attention's; the original repository's older layouts are not supported"
    require(model_type == "mom", "model_type", model_type, allowed)
    unknown = sorted(official.keys() - KNOWN)
    if unknown:
        raise ValueError(f"unknown fields, whose effect is not known either: {', '.join(unknown)}")
    _require_fixed(official, FIXED)
    ours = {"dtype": dtype or official.get("dtype") or official.get("torch_dtype") or ModelConfig.dtype}
    for name in official.keys() & FIELDS.keys():
        if name == "hidden_ratio" and official[name] is None:
            continue  # the official model, too, takes the default then
        try:
            ours |= checked_values(ModelConfig, {FIELDS[name]: official[name]})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    is_per_layer = official.get("use_layer_wise_balance", True)
    require(isinstance(is_per_layer, bool), "use_layer_wise_balance", is_per_layer, "it must be true or false")
    ours["balance_loss_form"] = "per_layer" if is_per_layer else "global"
    if official.get("attn"):
        ours["attention"] = _attention_from_official(official["attn"])
    return ModelConfig(**ours | overrides)


def _attention_from_official(attn: Any) -> AttentionConfig:
    """From one specification, or a list of them for different layers with the same settings."""
    layers, settings = [], []
    for spec in attn if isinstance(attn, list) else [attn]:
        is_complete = isinstance(spec, dict) and {"layers", "num_heads"} <= spec.keys()
        require(is_complete, "attn", spec, "it must be a table with layers and num_heads")
        _require_fixed(spec, FIXED_ATTENTION, "attn.")
        values = {"num_kv_heads": None, "window_size": None} | spec
        values = checked_values(AttentionConfig, {k: v for k, v in values.items() if k not in FIXED_ATTENTION}, "attn")
        layers += values.pop("layers")
        settings.append(values)
    require(all(values == settings[0] for values in settings), "attn", attn, "all its settings must be the same")
    return AttentionConfig(tuple(layers), **settings[0])


def _require_fixed(fields: dict[str, Any], fixed: dict[str, Any], prefix: str = "") -> None:
    for name, only in fixed.items():
        value = fields.get(name, only)
        require(value == only, prefix + name, value, f"only {only!r} is supported")


def to_official(config: ModelConfig) -> dict[str, Any]:
    """Every field of the official config.json; raises ``ValueError`` naming a field that it has no place for."""
    attention = config.attention
    theta = FIXED_ATTENTION["rope_theta"]
    for name, value, only in (
        ("ModelConfig.update_rule", config.update_rule, FIXED["mom_backend"]),
        ("ModelConfig.router_bias_rate", config.router_bias_rate, 0),
        ("AttentionConfig.rope_theta", attention.rope_theta if attention.layers else theta, theta),
    ):
        require(value == only, name, value, f"the official layout holds only {only!r}")
    attn = {
        "layers": list(attention.layers), "num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads,
        "window_size": attention.window_size, **FIXED_ATTENTION,
    }  # fmt: skip
    return {
        "model_type": "mom",
        "architectures": ["MomForCausalLM"],
        **{official: getattr(config, ours) for official, ours in FIELDS.items()},
        "attn": attn if attention.layers else None,
        "use_layer_wise_balance": config.balance_loss_form == "per_layer",
        **FIXED,
        **WITHOUT_EFFECT,
    }
