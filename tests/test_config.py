"""Every refusal names field, value and what is allowed; presets and derived sizes."""

import dataclasses
import math

import pytest

from mom_jax.config import PRESETS, AttentionConfig, DataConfig, MeshConfig, ModelConfig, TrainConfig

POSITIVE = "it must be a positive integer"
REFUSED = [
    *((ModelConfig, {name: 0}, name, POSITIVE) for name in (
        "vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "num_memories", "top_k", "conv_size",
        "max_length", "intermediate_size",
    )),
    (ModelConfig, {"num_layers": 2.0}, "num_layers", POSITIVE),
    (ModelConfig, {"num_layers": True}, "num_layers", POSITIVE),
    (ModelConfig, {"head_dim": 8}, "head_dim", "a power of two from 16 to 256"),
    (ModelConfig, {"head_dim": 48}, "head_dim", "a power of two from 16 to 256"),
    (ModelConfig, {"head_dim": 512}, "head_dim", "a power of two from 16 to 256"),
    (ModelConfig, {"expand_v": 0.03}, "expand_v", r"head_dim \* expand_v = 7.68 must be a multiple of 16 from 16 to 1280"),
    (ModelConfig, {"expand_v": 0.0}, "expand_v", "a multiple of 16"),
    *((ModelConfig, {"expand_v": value}, "expand_v", "from 16 to 1280") for value in (6.0, math.nan, math.inf)),
    (ModelConfig, {"top_k": 5}, "top_k", "at most num_memories = 4"),
    (
        ModelConfig,
        {"num_memories": 1, "top_k": 1, "shared_memory": False, "single_kv_proj": True},
        "single_kv_proj", "nothing to share",
    ),
    (ModelConfig, {"hidden_ratio": 0.0}, "hidden_ratio", "> 0"),
    (ModelConfig, {"norm_eps": 0.0}, "norm_eps", "> 0"),
    *((ModelConfig, {name: value}, name, ">= 0") for value in (-0.1, math.nan, math.inf) for name in (
        "initializer_range", "balance_loss_scale", "router_z_loss_scale", "router_bias_rate",
    )),
    (ModelConfig, {"embedding_dropout": 1.0}, "embedding_dropout", r"\[0, 1\)"),
    (ModelConfig, {"update_rule": "lstm"}, "update_rule", "choose one of 'gated_deltanet'"),
    (ModelConfig, {"balance_loss_form": "none"}, "balance_loss_form", "choose one of 'per_layer', 'global'"),
    (ModelConfig, {"dtype": "float16"}, "dtype", "choose one of 'float32', 'bfloat16'"),
    (ModelConfig, {"implementation": "cuda"}, "implementation", "choose one of None, 'triton', 'chunked', 'reference'"),
    (ModelConfig, {"remat": "some"}, "remat", "choose one of 'none', 'dots', 'full'"),
    *((ModelConfig, {name: value}, name, "None or an id below vocab_size = 32000") for value in (-1, 32000) for name in (
        "bos_token_id", "eos_token_id", "pad_token_id",
    )),
    (AttentionConfig, {"layers": (24,)}, "layers", "different indices from 0 to 23"),
    (AttentionConfig, {"layers": (-1,)}, "layers", "different indices from 0 to 23"),
    (AttentionConfig, {"layers": (1, 1)}, "layers", "different indices from 0 to 23"),
    (AttentionConfig, {"layers": (1,), "num_heads": 0}, "num_heads", POSITIVE),
    (AttentionConfig, {"layers": (1,), "num_heads": 3}, "num_heads", "an even integer"),
    (AttentionConfig, {"layers": (1,), "num_heads": 2048}, "num_heads", "an even integer"),
    (AttentionConfig, {"layers": (1,), "num_kv_heads": 0}, "num_kv_heads", POSITIVE),
    (AttentionConfig, {"layers": (1,), "num_kv_heads": 5}, "num_kv_heads", "must divide num_heads = 16"),
    (AttentionConfig, {"layers": (1,), "window_size": 0}, "window_size", POSITIVE),
    (AttentionConfig, {"layers": (1,), "rope_theta": 0.0}, "rope_theta", "> 0"),
    *((DataConfig, {name: 0}, name, POSITIVE) for name in ("sequence_length", "batch_size")),
    (DataConfig, {"seed": -1}, "seed", ">= 0"),
    *((TrainConfig, {name: 0}, name, POSITIVE) for name in (
        "steps", "stop_after", "accumulation", "loss_chunk", "log_every", "eval_every", "eval_batches", "checkpoint_every",
        "keep_last",
    )),
    (TrainConfig, {"schedule": "linear"}, "schedule", "choose one of 'cosine', 'wsd'"),
    *((TrainConfig, {name: -1}, name, ">= 0") for name in ("learning_rate", "weight_decay", "warmup_steps", "keep_best")),
    (TrainConfig, {"learning_rate": math.nan}, "learning_rate", ">= 0"),
    (TrainConfig, {"steps": 10, "warmup_steps": 10}, "warmup_steps", "below steps = 10"),
    (TrainConfig, {"clip_norm": 0.0}, "clip_norm", "> 0"),
    (TrainConfig, {"preemption_deadline": 0.0}, "preemption_deadline", "> 0"),
    *((TrainConfig, {name: 1.0}, name, r"\[0, 1\)") for name in ("beta1", "beta2")),
    *((TrainConfig, {name: 1.5}, name, r"\[0, 1\]") for name in ("decay_fraction", "final_learning_rate")),
    *((MeshConfig, {name: 0}, name, POSITIVE) for name in ("data", "memory")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields", "name", "allowed"), REFUSED, ids=[f"{kind.__name__}-{fields}" for kind, fields, *_ in REFUSED]
)
def test_refusals_name_field_value_and_what_is_allowed(unchecked_shapes, kind, fields, name, allowed):
    value = repr(fields[name]).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{name} = {value} is not allowed: .*{allowed}"):
        if kind is AttentionConfig:
            ModelConfig(attention=AttentionConfig(**fields))
        else:
            kind(**fields)


def test_configurations_are_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().top_k = 3
    assert hash(ModelConfig()) == hash(ModelConfig())


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ((), (("mom", 6),)),
        ((0, 1, 2, 3, 4, 5), (("attention", 6),)),
        ((2,), (("mom", 2), ("attention", 1), ("mom", 3))),
        ((5, 0, 1), (("attention", 2), ("mom", 3), ("attention", 1))),
    ],
)
def test_layer_runs(layers, runs):
    assert ModelConfig(num_layers=6, attention=AttentionConfig(layers=layers)).layer_runs == runs


def test_derived_sizes():
    assert ModelConfig(head_dim=64, expand_v=1.5).value_head_dim == 96
    assert ModelConfig(hidden_size=1024, hidden_ratio=3.0).mlp_size == 2048
    assert ModelConfig(hidden_size=1024, hidden_ratio=4.0).mlp_size == 2816  # 2,730 rounded up to 256
    assert ModelConfig(intermediate_size=100).mlp_size == 100


def test_warm_up_is_a_tenth_of_short_runs():
    assert [TrainConfig(steps=steps).num_warmup_steps for steps in (1, 10, 400, 1000, 5000)] == [0, 1, 40, 100, 100]
    assert TrainConfig(steps=400, warmup_steps=0).num_warmup_steps == 0


def test_presets_take_overrides_and_refuse_unknown_ones():
    for name, preset in PRESETS.items():
        assert preset(num_layers=3).num_layers == 3, name
        with pytest.raises(TypeError, match="widht"):
            preset(widht=3)


def test_presets_are_the_official_sizes():
    for name, hidden_size in (("mom_340m", 1024), ("mom_1_3b", 2048)):
        config = PRESETS[name]()
        assert (config.hidden_size, config.num_layers, config.num_heads, config.head_dim) == (hidden_size, 24, 4, 256)
        assert (config.num_memories, config.top_k, config.shared_memory, config.vocab_size) == (4, 2, True, 32000)
        assert not config.tie_embeddings and config.conv_size == 4 and config.mlp_size == 2 * hidden_size
    single = PRESETS["gated_deltanet_340m"]()
    assert (single.num_memories, single.top_k, single.shared_memory) == (1, 1, False)
