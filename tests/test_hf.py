"""The official layout: the official code's golden cases, the numpy oracle at odd shapes, round trips, every refusal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numerics import LIMITS, assert_close
from oracle import GOLDEN, OFFICIAL_DEFAULTS, load_golden, oracle_forward, random_tensors
from safetensors.numpy import load_file, save_file

import mom_jax.hf
from mom_jax import ModelConfig, load_pretrained, save_pretrained, tiny
from mom_jax.config import AttentionConfig
from mom_jax.hf_config import FIELDS, from_official, to_official
from mom_jax.model import bind, split_params

GOLDEN_CASES = ["default", "left_padded", "no_shared_top1", "single_kv"]
PLAIN = dict(
    hidden_size=24, num_hidden_layers=2, vocab_size=31, num_heads=3, head_dim=16, intermediate_size=20, num_memories=3,
)  # fmt: skip
CONFIGS = {
    "window": PLAIN
    | dict(
        num_hidden_layers=4, expand_v=2, conv_size=3, conv_bias=True, use_output_gate=False,
        attn=dict(layers=[0, 3], num_heads=4, num_kv_heads=2, window_size=5),
    ),
    "full_attention": PLAIN | dict(tie_word_embeddings=True, attn=dict(layers=[1], num_heads=6)),
    "single_kv_without_shared": PLAIN | dict(single_kv_proj=True, shared_mem=False, conv_bias=True),
    "all_memories": PLAIN | dict(topk=3, conv_size=1, intermediate_size=None, hidden_ratio=2, norm_eps=1e-3),
    "one_memory": PLAIN | dict(num_memories=1, topk=1, shared_mem=False, conv_size=2),
}  # fmt: skip
# T below the segment alignment and above it; every one is a compilation.
LENGTHS = {
    "window": (37, 101),
    "full_attention": (37,),
    "single_kv_without_shared": (101,),
    "all_memories": (37,),
    "one_memory": (37,),
}


def write(directory, config, tensors):
    """A model directory as the official code leaves it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "mom"} | config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def directory(tmp_path):
    """A copy of a golden model that a test may spoil."""
    (tmp_path / "model").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "default" / file, tmp_path / "model")
    return tmp_path / "model"


def change_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read_map(index):
    return json.loads(index.read_text())["weight_map"]


def read_tensors(directory):
    """All tensors of a directory, by the index if there is one, and the number of files."""
    files = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        assert read_map(index) == {name: file.name for file in files for name in load_file(file)}
    return tensors, len(files)


def assert_identical(actual, expected):
    """Two trees or dictionaries of arrays, to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape and np.asarray(a).tobytes() == np.asarray(e).tobytes()


# What the model computes.


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name):
    _, _, case = load_golden(name)
    mask = case.get("attention_mask", np.ones_like(case["input_ids"]))
    model = load_pretrained(GOLDEN / name, dtype="float32", balance_loss_form="global")
    out = model(jnp.asarray(case["input_ids"]), jnp.asarray(mask))
    real = mask != 0
    logits, router_logits = np.asarray(out.logits), np.asarray(out.router_logits)
    errors = {
        "logits": np.abs(logits - case["logits"])[real].max(),
        "router_logits": np.abs(router_logits - case["router_logits"].reshape(router_logits.shape))[:, real].max(),
        "balance_loss": abs(float(out.balance_loss) - case["aux_loss"].item()),
    }
    assert errors["logits"] < 1e-4 and errors["router_logits"] < 1e-4 and errors["balance_loss"] < 1e-5, errors


@pytest.mark.parametrize("name, length", [(name, length) for name, lengths in LENGTHS.items() for length in lengths])
def test_matches_the_oracle(name, length, tmp_path):
    """Rows without padding and with it left, right and inside; all but the first hold several documents."""
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name], seed=1)
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, config["vocab_size"], (4, length))
    mask = np.ones(tokens.shape, int)
    mask[1, :9] = mask[2, -7:] = mask[3, 11:15] = mask[3, 30] = 0
    documents = np.sort(rng.integers(0, 4, tokens.shape), axis=1)
    documents[0] = 0
    expected = oracle_forward(tensors, config, tokens, mask, documents)

    model = load_pretrained(write(tmp_path / "model", config, tensors), dtype="float32")
    out = model(*map(jnp.asarray, (tokens, mask, documents)))
    real = mask != 0
    limit = LIMITS["float32"]
    assert_close(np.asarray(out.logits)[real], expected.logits[real], limit, "logits")
    assert_close(np.asarray(out.router_logits)[:, real], expected.router_logits[:, real], limit, "router_logits")
    assert_close(out.balance_loss, expected.balance_loss_per_layer, limit, "balance_loss")
    runs = [run.recurrent for run in out.state.layers if hasattr(run, "recurrent")]
    states = [state for state in expected.states if state is not None]
    assert_close(np.concatenate(runs), np.stack(states), limit, "states")


# To a directory and back.


@pytest.mark.parametrize("shard_bytes", [5e9, 1e4], ids=["one_file", "sharded"])
@pytest.mark.parametrize("name", [*GOLDEN_CASES, *CONFIGS])
def test_round_trip_is_bit_exact(name, shard_bytes, tmp_path):
    if name in GOLDEN_CASES:
        tensors, official, _ = load_golden(name)
        source = GOLDEN / name
    else:
        official, tensors = CONFIGS[name], random_tensors(CONFIGS[name], seed=0)
        source = write(tmp_path / "source", official, tensors)
    model = load_pretrained(source)
    save_pretrained(model, tmp_path / "saved", max_shard_bytes=shard_bytes)
    written, files = read_tensors(tmp_path / "saved")
    assert (files > 2) == (shard_bytes == 1e4)
    assert_identical(written, tensors)
    again = load_pretrained(tmp_path / "saved", dtype=model.config.dtype)
    assert again.config == model.config
    assert_identical(split_params(again), split_params(model))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["MomForCausalLM"] and saved["torch_dtype"] == "float32"
    expected = OFFICIAL_DEFAULTS | {name: official[name] for name in official.keys() & FIELDS.keys()}
    if official.get("attn"):
        defaults = {"num_kv_heads": None, "window_size": None, "qkv_bias": False, "rope_theta": 10000.0}
        expected["attn"] = defaults | official["attn"]
    assert {name: saved[name] for name in expected} == expected


def test_a_fresh_model_comes_back():
    """Fields that no golden case has, and fields that the official configuration has not."""
    config = tiny(
        vocab_size=64, hidden_size=32, pad_token_id=0, bos_token_id=None, balance_loss_scale=0.5, balance_loss_form="global",
        initializer_range=0.1, max_length=99, norm_eps=1e-5, hidden_ratio=3.5, use_output_gate=False, num_layers=2,
        dtype="bfloat16", attention=AttentionConfig(layers=(1,), num_heads=2, window_size=7),
    )  # fmt: skip
    assert from_official(to_official(config) | {"torch_dtype": "bfloat16"}, None, {"remat": "none"}) == config


def test_every_official_field_is_written():
    written = to_official(ModelConfig())
    assert written.keys() == {"model_type", "architectures", *FIELDS, *OFFICIAL_DEFAULTS} | {
        "use_layer_wise_balance", "mom_backend", "use_short_conv", "hidden_act", "attnres_block_size", "attn_mode",
        "capacity", "use_cache", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_conv_l2",
    }  # fmt: skip
    assert {key: written[key] for key in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS
    assert from_official({"model_type": "mom"}, None, {}) == ModelConfig() == from_official(written, None, {})


def test_compute_type(directory):
    assert load_pretrained(directory).config.dtype == "bfloat16"
    change_config(directory, torch_dtype="float32", transformers_version="4.57.0", _name_or_path="x")
    assert load_pretrained(directory).config.dtype == "float32"
    assert load_pretrained(directory, dtype="bfloat16").config.dtype == "bfloat16"


def test_overrides(directory):
    model = load_pretrained(directory, remat="dots", implementation="reference", router_bias_rate=0.01, max_length=7)
    config = model.config
    assert (config.remat, config.implementation, config.max_length) == ("dots", "reference", 7)
    (bias,) = jax.tree.leaves(split_params(model)[1])
    assert bias.shape == (2, 4) and not bias.any()
    with pytest.raises(TypeError, match="'depth'"):
        load_pretrained(directory, depth=3)


def test_half_precision_files_are_upcast(directory):
    tensors, _, _ = load_golden("default")
    original = split_params(load_pretrained(directory))[0]
    save_pretrained(load_pretrained(directory), directory, dtype="bfloat16")
    written, _ = read_tensors(directory)
    assert_identical(written, {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})
    loaded = split_params(load_pretrained(directory))[0]
    assert_identical(loaded, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), original))
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, directory / "model.safetensors")
    loaded = split_params(load_pretrained(directory))[0]
    assert_identical(loaded, jax.tree.map(lambda x: x.astype("float16").astype("float32"), original))


def test_a_list_of_attention_specifications():
    config = CONFIGS["window"]
    specs = [config["attn"] | {"layers": [0], "qkv_bias": False}, config["attn"] | {"layers": [3], "rope_theta": 10000}]
    official = {"model_type": "mom"} | config
    assert from_official(official | {"attn": specs}, None, {}) == from_official(official, None, {})
    assert from_official(official | {"attn": []}, None, {}) == from_official(official | {"attn": None}, None, {})


def test_tied_head_may_repeat_the_embedding(directory):
    tensors, _, _ = load_golden("default")
    expected = split_params(load_pretrained(directory))
    table = tensors["model.embeddings.weight"]
    save_file(tensors | {"lm_head.weight": table}, directory / "model.safetensors")
    assert_identical(split_params(load_pretrained(directory)), expected)
    changed = table.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], 1)
    save_file(tensors | {"lm_head.weight": changed}, directory / "model.safetensors")
    with pytest.raises(ValueError, match="is true, but lm_head.weight differs from model.embeddings.weight"):
        load_pretrained(directory)
    save_file(tensors | {"lm_head.weight": table[1:]}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has \(96, 64\), config wants \(97, 64\)"):
        load_pretrained(directory)


# Writing over a directory.


def another(model):
    """A model of the same config."""
    params, variables = split_params(model)
    return bind(model.config, jax.tree.map(lambda x: x + 1, params), variables)


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first, second", [(5e9, 1e5), (1e5, 5e9), (1e5, 2e5)])
def test_the_old_model_is_replaced(first, second, directory):
    other = another(load_pretrained(directory))
    (directory / "tokenizer.json").write_text("{}")
    save_pretrained(load_pretrained(directory), directory, max_shard_bytes=first)
    save_pretrained(other, directory, max_shard_bytes=second)
    assert_identical(split_params(load_pretrained(directory)), split_params(other))
    read_tensors(directory)
    assert (directory / "tokenizer.json").exists() and not list(directory.glob(".saving-*"))
    assert (directory / "model.safetensors").exists() != (directory / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("broken", ["write_safetensors", "write_json"])
def test_an_error_while_writing_changes_nothing(broken, directory, monkeypatch):
    model, before, calls = load_pretrained(directory), files_of(directory), []
    working = getattr(mom_jax.hf, broken)

    def fail_the_second_time(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        working(*args, **kwargs)

    monkeypatch.setattr(mom_jax.hf, broken, fail_the_second_time)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, directory, max_shard_bytes=1e5)
    assert files_of(directory) == before and not list(directory.glob(".saving-*"))


def test_an_error_while_moving_loses_nothing_and_does_not_load(directory, monkeypatch):
    model, calls = load_pretrained(directory), []
    save_pretrained(model, directory, max_shard_bytes=1e5)
    old_config = (directory / "config.json").read_bytes()
    working = Path.replace

    def fail_the_third_time(self, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError("unplugged")
        return working(self, target)

    monkeypatch.setattr(Path, "replace", fail_the_third_time)
    with pytest.raises(OSError, match="unplugged"):
        save_pretrained(another(model), directory, max_shard_bytes=1e5)
    with pytest.raises(FileNotFoundError, match=r"config.json is missing: a save was interrupted.*\.saving-"):
        load_pretrained(directory)
    (aside,) = directory.glob(".saving-*")
    assert (aside / "config.json.old").read_bytes() == old_config and (aside / "config.json").exists()
    new_files = {file for index in directory.rglob("*.index.json") for file in read_map(index).values()}
    assert len(new_files) > 3 and new_files <= {path.name for path in directory.rglob("*.safetensors")}
    save_pretrained(model, directory)
    assert_identical(split_params(load_pretrained(directory)), split_params(model))
    assert sorted(files_of(directory)) == ["config.json", "model.safetensors"]


# Refusals.


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="mom_gated_deltanet", num_experts=4), "config.json: model_type = 'mom_gated_deltanet'.*'mom'"),
        (dict(model_type=None), "model_type = None"),
        (dict(rope_scaling=None, quantization_config={}), "unknown fields.*: quantization_config, rope_scaling"),
        (dict(mom_backend="gla"), "mom_backend = 'gla' is not allowed: only 'gated_deltanet' is supported"),
        (dict(use_short_conv=False), "use_short_conv = False"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(attnres_block_size=2), "attnres_block_size = 2"),
        (dict(use_layer_wise_balance=1), "use_layer_wise_balance = 1 is not allowed: it must be true or false"),
        (dict(topk="2"), "topk: top_k = '2' is not allowed: it must be an integer"),
        (dict(eos_token_id=[1, 2]), r"eos_token_id: eos_token_id = \[1, 2\]"),
        (dict(topk=5), "ModelConfig.top_k = 5 is not allowed: it must be at most num_memories = 4"),
        (dict(head_dim=48), "ModelConfig.head_dim = 48"),
        (dict(torch_dtype="float16"), "ModelConfig.dtype = 'float16'"),
        (dict(attn=dict(layers=[0])), "attn = {'layers': .*layers and num_heads"),
        (dict(attn="all"), "attn = 'all'"),
        (dict(attn=dict(layers=[0], num_heads=2, qkv_bias=True)), "attn.qkv_bias = True is not allowed: only False"),
        (dict(attn=dict(layers=[0], num_heads=2, rope_theta=5e5)), "attn.rope_theta = 500000.0.*only 10000.0"),
        (dict(attn=dict(layers=[0], num_heads=2, qk_norm=True)), "attn.qk_norm = True is not allowed: there is no such"),
        (dict(attn=dict(layers=[2], num_heads=2)), r"AttentionConfig.layers = \(2,\)"),
        (dict(attn=[dict(layers=[0], num_heads=2), dict(layers=[1], num_heads=4)]), "attn = .*settings must be the same"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_configs(fields, message, directory):
    change_config(directory, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_all_wrong_tensors_are_listed_at_once(directory):
    tensors, _, _ = load_golden("default")
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.attn.k_proj.3.weight"]
    tensors["model.layers.1.attn.k_proj.4.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    tensors["model.layers.0.attn.o_proj.weight"] = np.zeros((64, 64))
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_pretrained(directory)
    assert str(caught.value).splitlines() == [
        f"the tensors in {directory} do not fit its config.json:",
        "  missing: model.layers.0.attn.k_proj.3.weight",
        "  missing: model.layers.1.attn.k_proj.3.weight",
        "  unexpected: model.layers.1.attn.k_proj.4.weight",
        "  wrong type: model.layers.0.attn.o_proj.weight is F64, not F32, BF16 or F16",
        "  wrong shape: model.norm.weight has (63,), config wants (64,)",
    ]
    change_config(directory, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_pretrained(directory)


def test_missing_and_damaged_files(directory):
    def refused(error, *parts):
        with pytest.raises(error) as caught:
            load_pretrained(directory)
        assert all(str(part) in str(caught.value) for part in parts), caught.value

    weights, config = directory / "model.safetensors", directory / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    refused(ValueError, weights, "no whole safetensors file")
    weights.write_bytes(b"")
    refused(ValueError, weights, "no whole safetensors file")
    weights.unlink()
    refused(FileNotFoundError, directory, "neither model.safetensors nor model.safetensors.index.json")
    config.write_text("{")
    refused(ValueError, config, "is no JSON")
    config.write_text("[]")
    refused(ValueError, config, "it must hold a JSON object")
    config.unlink()
    refused(FileNotFoundError, f"{directory} holds no model: it has nothing; a training run has checkpoints/, an inference")
    shutil.rmtree(directory)
    refused(FileNotFoundError, f"there is no directory {directory}", "never downloaded")


def test_broken_indices(directory):
    save_pretrained(load_pretrained(directory), directory, max_shard_bytes=1e5)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, file = next(iter(content["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": file}}))
    with pytest.raises(ValueError, match=r"weight_map = \['ghost'\] .*not in the files"):
        load_pretrained(directory)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name):
        load_pretrained(directory)
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load_pretrained(directory)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map = None is not allowed: it must be {tensor: file}"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "overrides, arguments, message",
    [
        (dict(router_bias_rate=0.1), {}, "ModelConfig.router_bias_rate = 0.1.*the official layout holds only 0"),
        (
            dict(attention=AttentionConfig((1,), num_heads=6, rope_theta=5e5)), {},
            "AttentionConfig.rope_theta = 500000.0.*the official layout holds only 10000.0",
        ),
        ({}, dict(dtype="float16"), "dtype = 'float16'"),
        ({}, dict(max_shard_bytes=0), "max_shard_bytes = 0"),
    ],
    ids=["router_bias_rate", "rope_theta", "dtype", "max_shard_bytes"],
)  # fmt: skip
def test_refused_saves_write_nothing(overrides, arguments, message, tmp_path):
    config = CONFIGS["full_attention"]
    model = load_pretrained(write(tmp_path / "source", config, random_tensors(config, 0)), **overrides)
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


def test_an_update_rule_that_the_layout_lacks_is_refused():
    config = tiny()
    object.__setattr__(config, "update_rule", "mamba2")
    with pytest.raises(ValueError, match="ModelConfig.update_rule = 'mamba2'.*only 'gated_deltanet'"):
        to_official(config)


def test_importing_the_package_is_light():
    code = "import sys, mom_jax; mom_jax.tiny(); assert not {'jax', 'flax', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mom_jax.nothing  # noqa: B018
