"""Configurations of flash-linear-attention's models and ours, one from the other.

``mom``             MomConfig
``gated_deltanet``  GatedDeltaNetConfig: one memory that every token uses, without a router (arXiv 2412.06464)

Every official field is honoured, refused by name, or listed here as having no effect on results.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mom_jax.config import AttentionConfig, ModelConfig, require
from mom_jax.config_io import checked_values

# Official fields and ours, of both models. A file may leave any of them out.
COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "expand_v": "expand_v",
    "conv_size": "conv_size",
    "hidden_ratio": "hidden_ratio",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initializer_range",
    "max_position_embeddings": "max_length",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
FIELDS = COMMON_FIELDS | {
    "num_memories": "num_memories",
    "topk": "top_k",
    "shared_mem": "shared_memory",
    "single_kv_proj": "single_kv_proj",
    "conv_bias": "conv_bias",  # the official layer has it, the official model never turns it on
    "use_output_gate": "use_output_gate",
    "aux_loss_scale": "balance_loss_scale",
}
# What transformers notes down about files and outputs.
BOOKKEEPING = {
    "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "tokenizer_class", "return_dict", "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "is_decoder", "chunk_size_feed_forward",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """An official model: what its configuration says, and what it leaves to the code.

    Attributes:
      architecture: the class that loads it.
      fields: official fields and ours.
      fixed, fixed_attention: official fields of which only one value is supported.
      without_effect: how the official code computes the same result, and the values that we write.
      only: fields of ours that the layout has no place for, and the value that it stands for.
      defaults: our values where a file is silent, if they are not ModelConfig's own.
    """

    architecture: str
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    fixed_attention: Mapping[str, Any]
    without_effect: Mapping[str, Any]
    only: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "mom": Layout(
        architecture="MomForCausalLM",
        fields=FIELDS,
        fixed={
            "mom_backend": "gated_deltanet", "use_short_conv": True, "hidden_act": "swish", "attnres_block_size": None,
        },
        fixed_attention={"qkv_bias": False, "rope_theta": 10000.0},  # the official model ignores all others
        without_effect={
            "attn_mode": "chunk", "capacity": 1.0, "use_cache": True, "fuse_norm": True, "fuse_swiglu": True,
            "fuse_cross_entropy": True, "fuse_conv_l2": False,
        },
        only={"update_rule": "gated_deltanet", "router_bias_rate": 0},
    ),
    "gated_deltanet": Layout(
        architecture="GatedDeltaNetForCausalLM",
        fields=COMMON_FIELDS | {"use_gate": "use_output_gate"},
        # allow_neg_eigval doubles beta.
        fixed={"use_short_conv": True, "hidden_act": "swish", "allow_neg_eigval": False},
        fixed_attention={"qkv_bias": False},
        without_effect={
            "attn_mode": "chunk", "use_cache": True, "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True,
            "fuse_linear_cross_entropy": False, "use_l2warp": False,
        },
        only={
            "update_rule": "gated_deltanet", "num_memories": 1, "top_k": 1, "shared_memory": False, "conv_bias": False,
            "router_bias_rate": 0,
        },
        defaults={
            "num_layers": 21, "num_heads": 6, "expand_v": 2.0, "num_memories": 1, "top_k": 1, "shared_memory": False,
            "balance_loss_scale": 0.0,
        },
    ),
}  # fmt: skip
# Beside the fields of a layout those that are translated by hand.
BY_HAND = {"mom": {"attn", "use_layer_wise_balance"}, "gated_deltanet": {"attn", "num_v_heads"}}


def require_layout(model_type: Any) -> Layout:
    """The layout of an official ``model_type``; ``ValueError`` if there is none."""
    allowed = (
        "it must be 'mom' or 'gated_deltanet', flash-linear-attention's; the original repository's older layouts are not "
        "supported"
    )
    require(model_type in LAYOUTS, "model_type", model_type, allowed)
    return LAYOUTS[model_type]


def from_official(official: dict[str, Any], dtype: str | None, overrides: dict[str, Any]) -> ModelConfig:
    """ModelConfig from the fields of an official config.json.

    Args:
      dtype: compute type; None: the file's ``dtype`` (``torch_dtype`` in older ones), else ModelConfig's default.
      overrides: fields of ModelConfig that win over the official ones.

    Raises ``ValueError`` naming a field that is unknown, unsupported, of the wrong type or out of range.
    """
    layout = require_layout(official.get("model_type"))
    known = {*layout.fields, *layout.fixed, *layout.without_effect, *BOOKKEEPING, *BY_HAND[official["model_type"]]}
    unknown = sorted(official.keys() - known)
    if unknown:
        raise ValueError(f"unknown fields, whose effect is not known either: {', '.join(unknown)}")
    _require_fixed(official, layout.fixed)
    ours = {"dtype": dtype or official.get("dtype") or official.get("torch_dtype") or ModelConfig.dtype, **layout.defaults}
    for name in official.keys() & layout.fields.keys():
        if name == "hidden_ratio" and official[name] is None:
            continue  # the official model, too, takes the default then
        try:
            ours |= checked_values(ModelConfig, {layout.fields[name]: official[name]})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if official["model_type"] == "mom":
        is_per_layer = official.get("use_layer_wise_balance", True)
        require(isinstance(is_per_layer, bool), "use_layer_wise_balance", is_per_layer, "it must be true or false")
        ours["balance_loss_form"] = "per_layer" if is_per_layer else "global"
    else:
        heads = ours["num_heads"]
        value_heads = official.get("num_v_heads")
        allowed = f"only null or num_heads = {heads} is supported (no grouped value attention)"
        require(value_heads in (None, heads), "num_v_heads", value_heads, allowed)
    if official.get("attn"):
        ours["attention"] = _attention_from_official(official["attn"], layout)
    return ModelConfig(**ours | overrides)


def _attention_from_official(attn: Any, layout: Layout) -> AttentionConfig:
    """From one specification, or a list of them for different layers with the same settings."""
    layers, settings = [], []
    for spec in attn if isinstance(attn, list) else [attn]:
        is_complete = isinstance(spec, dict) and {"layers", "num_heads"} <= spec.keys()
        require(is_complete, "attn", spec, "it must be a table with layers and num_heads")
        _require_fixed(spec, layout.fixed_attention, "attn.")
        values = {"num_kv_heads": None, "window_size": None} | spec
        values = {name: value for name, value in values.items() if name not in layout.fixed_attention}
        values = checked_values(AttentionConfig, values, "attn")
        layers += values.pop("layers")
        settings.append(values)
    require(all(values == settings[0] for values in settings), "attn", attn, "all its settings must be the same")
    return AttentionConfig(tuple(layers), **settings[0])


def _require_fixed(fields: dict[str, Any], fixed: Mapping[str, Any], prefix: str = "") -> None:
    for name, only in fixed.items():
        value = fields.get(name, only)
        require(value == only, prefix + name, value, f"only {only!r} is supported")


def to_official(config: ModelConfig, model_type: str = "mom") -> dict[str, Any]:
    """Every field of the official config.json; raises ``ValueError`` naming a field that it has no place for."""
    layout, attention = require_layout(model_type), config.attention
    needs = [(f"ModelConfig.{name}", getattr(config, name), only) for name, only in layout.only.items()]
    if attention.layers and "rope_theta" in layout.fixed_attention:
        needs.append(("AttentionConfig.rope_theta", attention.rope_theta, layout.fixed_attention["rope_theta"]))
    for name, value, only in needs:
        require(value == only, name, value, f"the official layout holds only {only!r}")
    attn = {
        "layers": list(attention.layers), "num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads,
        "window_size": attention.window_size, "rope_theta": attention.rope_theta, **layout.fixed_attention,
    }  # fmt: skip
    by_hand = {"attn": attn if attention.layers else None}
    if model_type == "mom":
        by_hand["use_layer_wise_balance"] = config.balance_loss_form == "per_layer"
    else:
        by_hand["num_v_heads"] = None
    return {
        "model_type": model_type,
        "architectures": [layout.architecture],
        **{official: getattr(config, ours) for official, ours in layout.fields.items()},
        **by_hand,
        **layout.fixed,
        **layout.without_effect,
    }
