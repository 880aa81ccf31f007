"""Weights between runs, inference checkpoints and Hugging Face directories: to the bit, whole or not at all, one by one."""

import json
import shutil
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from models import draw_params, small
from oracle import GOLDEN, load_golden, oracle_forward, random_tensors
from safetensors.numpy import load_file, save_file
from tokenizers import models as tokenizer_models

import mom_jax
import mom_jax.inference_checkpoint
import mom_jax.interchange
from mom_jax.checkpoint import Checkpoints
from mom_jax.config import AttentionConfig, DataConfig, MeshConfig, ModelConfig
from mom_jax.config_io import to_dict
from mom_jax.files import CHECKSUMS
from mom_jax.hf_config import from_official, to_official
from mom_jax.interchange import open_source, to_hugging_face, to_inference_checkpoint
from mom_jax.model import bind
from mom_jax.runs import DEFAULTS
from mom_jax.sharding import make_mesh, parameter_specs, shardings, use_mesh
from mom_jax.token_files import ByteTokenizer, HuggingFaceTokenizer, TokenFileWriter
from mom_jax.weights import by_name, to_tree, weights_of

GATED_DELTANET = dict(
    model_type="gated_deltanet", hidden_size=24, num_hidden_layers=3, vocab_size=31, num_heads=3, head_dim=16, expand_v=2.0,
    intermediate_size=20, conv_size=2,
    attn=dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=5, qkv_bias=False, rope_theta=5e5),
)  # fmt: skip


def make_run(directory: Path, config: ModelConfig, tokenizer=None) -> dict:
    """A run's directory as train_lm.py leaves it; returns the arrays by name."""
    params, variables = draw_params(config)
    state = {"params": params, "variables": variables, "optimiser": {"mean": params}, "step": jnp.int32(3)}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(3, state, config={"model": to_dict(config), "data": to_dict(DataConfig())})
    tokenizer = tokenizer or ByteTokenizer()
    kept = directory / "tokenizer"
    kept.mkdir()
    if tokenizer.kind == "huggingface":
        tokenizer._tokenizer.save(str(kept / "tokenizer.json"))
    writer = TokenFileWriter(kept / "train.tokens", tokenizer)
    writer.add(tokenizer.encode("a"), 1)
    writer.finish([])
    return weights_of(bind(config, params, variables)).shapes


def assert_equal(model, arrays):
    """The arrays of a model are those by name, to the bit."""
    found = weights_of(model).shapes
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == jnp.float32 and np.array_equal(found[name], np.asarray(array, np.float32)), name


def assert_same_tensors(directory, expected):
    files = sorted(directory.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name


def write_model(directory, config, tensors):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def gated_deltanet_tensors(config=GATED_DELTANET, seed=0):
    """Random tensors under the names of GatedDeltaNetForCausalLM, and the same for the oracle, as MoM with one memory."""
    as_mom = {name: value for name, value in config.items() if name not in ("model_type", "use_gate")}
    as_mom |= dict(num_memories=1, topk=1, shared_mem=False, use_output_gate=config.get("use_gate", True))
    tensors = random_tensors(as_mom, seed)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("attn.gate.weight")}
    return {name.replace("_proj.0.weight", "_proj.weight"): tensor for name, tensor in kept.items()}, tensors, as_mom


@pytest.fixture
def golden(tmp_path):
    """A copy of a golden model that a test may spoil."""
    shutil.copytree(GOLDEN / "default", tmp_path / "golden")
    return tmp_path / "golden"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and its two exports, not to be spoiled."""
    directory = tmp_path_factory.mktemp("exported")
    arrays = make_run(directory / "run", small(vocab_size=300))
    source = open_source(directory / "run")
    to_inference_checkpoint(source, directory / "orbax")
    to_hugging_face(source, directory / "hf")
    return directory, arrays


# Round trips.

FIRST_LAYER = AttentionConfig(layers=(0,), num_heads=4, num_kv_heads=2, window_size=20)  # then a run of two


@pytest.mark.parametrize(
    "kind, model_type",
    [
        ("hybrid", "mom"), ("single_memory", "mom"), ("single_memory", "gated_deltanet"), ("single_kv", "mom"),
        ("all_memories", "mom"),
    ],
)  # fmt: skip
def test_a_run_survives_all_directories(kind, model_type, tmp_path):
    more = dict(tie_embeddings=True, attention=FIRST_LAYER) if kind == "hybrid" else {}
    config = small(kind, vocab_size=300, **more)
    arrays = make_run(tmp_path / "run", config)
    to_inference_checkpoint(open_source(tmp_path / "run"), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "hf", model_type=model_type, max_shard_bytes=3e4)
    to_inference_checkpoint(open_source(tmp_path / "hf"), tmp_path / "again")
    for name in ("run", "orbax", "hf", "again"):
        if name == "hf" and model_type == "gated_deltanet":  # from here on
            arrays = {name: x * (not name.endswith("router.router")) for name, x in arrays.items()}
        assert_equal(mom_jax.load(tmp_path / name).model, arrays)
    assert mom_jax.load(tmp_path / "orbax").model.config == config
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3


def test_run_to_hugging_face_is_run_to_orbax_to_hugging_face(exported, tmp_path):
    directory, _ = exported
    to_hugging_face(open_source(directory / "orbax"), tmp_path / "hf")
    assert (tmp_path / "hf" / CHECKSUMS).read_text() == (directory / "hf" / CHECKSUMS).read_text()


def test_the_selection_biases_come_along_and_stay_float32(tmp_path):
    arrays = make_run(tmp_path / "run", small("not_shared", vocab_size=300))
    assert any(name.startswith("variables.") for name in arrays)
    source = open_source(tmp_path / "run")
    to_inference_checkpoint(source, tmp_path / "orbax", dtype="bfloat16")
    rounded = {name: x.astype(jnp.bfloat16) if name.startswith("params.") else x for name, x in arrays.items()}
    assert_equal(mom_jax.load(tmp_path / "orbax").model, rounded)
    with pytest.raises(ValueError, match="ModelConfig.router_bias_rate = 0.1.*the official layout holds only 0"):
        to_hugging_face(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


TYPES = {
    "float32": lambda name: np.float32,
    "bfloat16": lambda name: ml_dtypes.bfloat16,
    "gates_float32": lambda name: np.float32 if name.endswith(("A_log", "dt_bias")) else ml_dtypes.bfloat16,
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("model", ["default", "gated_deltanet"])
def test_hugging_face_tensors_come_back_to_the_byte(model, types, tmp_path):
    config, tensors = GATED_DELTANET, gated_deltanet_tensors()[0]
    if model == "default":
        tensors, config, _ = load_golden("default")
    tensors = {name: tensor.astype(TYPES[types](name)) for name, tensor in tensors.items()}
    write_model(tmp_path / "hf", config, tensors)
    to_inference_checkpoint(open_source(tmp_path / "hf"), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tensors)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["torch_dtype"] == ("float32" if types == "float32" else "bfloat16")
    assert from_official(written, "float32", {}) == from_official(config, "float32", {})


def test_float16_is_kept_as_float32(tmp_path):
    tensors, config, _ = load_golden("default")
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    to_inference_checkpoint(open_source(write_model(tmp_path / "hf", config, halves)), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "again")
    assert_same_tensors(tmp_path / "again", {name: tensor.astype(np.float32) for name, tensor in halves.items()})


@pytest.mark.parametrize("name", ["default", "left_padded", "no_shared_top1", "single_kv"])
def test_a_golden_model_is_the_same_after_a_round_trip(name, tmp_path):
    """Its configuration and its arrays, to the bit. That its logits are the golden ones: tests/test_hf.py."""
    golden = mom_jax.load_pretrained(GOLDEN / name, dtype="float32", **DEFAULTS)
    to_inference_checkpoint(open_source(GOLDEN / name), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "hf")
    for directory in ("orbax", "hf"):
        model = mom_jax.load(tmp_path / directory, dtype="float32").model
        assert model.config == golden.config
        assert_equal(model, weights_of(golden).shapes)


def test_plain_orbax_reads_an_inference_checkpoint(exported):
    import orbax.checkpoint as ocp

    directory, arrays = exported
    tree = ocp.StandardCheckpointer().restore(directory / "orbax" / "weights" / "state")
    assert np.array_equal(tree["params"]["embedding"], arrays["params.embedding"])
    assert len(jax.tree.leaves(tree)) == len(arrays)


# Gated DeltaNet.


@pytest.mark.parametrize("use_gate", [True, False])
def test_gated_deltanet_is_one_memory(use_gate, tmp_path):
    """Against the independent oracle, which knows it as MoM with one memory and any router."""
    config = GATED_DELTANET | dict(use_gate=use_gate, attn=None)
    tensors, as_mom_tensors, as_mom = gated_deltanet_tensors(config)
    directory = write_model(tmp_path / "hf", config, tensors)
    model = mom_jax.load(directory, dtype="float32", implementation="reference").model
    tokens = np.random.default_rng(0).integers(0, 31, (2, 40))
    expected = oracle_forward(as_mom_tensors, as_mom, tokens, np.ones_like(tokens), np.zeros_like(tokens))
    np.testing.assert_allclose(model(jnp.asarray(tokens)).logits, expected.logits, rtol=0, atol=1e-4)


def test_gated_deltanet_configuration():
    official = to_official(from_official(GATED_DELTANET, None, {}), "gated_deltanet")
    assert {name: official[name] for name in GATED_DELTANET} == GATED_DELTANET
    assert official["architectures"] == ["GatedDeltaNetForCausalLM"]
    silent = from_official({"model_type": "gated_deltanet"}, None, {})
    assert (silent.num_layers, silent.num_heads, silent.expand_v, silent.hidden_size) == (21, 6, 2.0, 2048)
    early = {"model_type": "gated_deltanet", "num_v_heads": 6, "use_l2warp": True, "fuse_norm": False, "attn_mode": "chunk"}
    assert from_official(early, None, {}) == silent
    assert from_official(to_official(mom_jax.gated_deltanet_340m(), "gated_deltanet"), None, {}) == (
        mom_jax.gated_deltanet_340m()
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_v_heads=6), "num_v_heads = 6 is not allowed: only null or num_heads = 3"),
        (dict(allow_neg_eigval=True), "allow_neg_eigval = True is not allowed: only False"),
        (dict(use_short_conv=False), "use_short_conv = False"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(num_memories=2), "unknown fields.*: num_memories"),
        (dict(attn=GATED_DELTANET["attn"] | dict(qkv_bias=True)), "attn.qkv_bias = True"),
        (dict(attn=GATED_DELTANET["attn"] | dict(qk_norm=True)), "attn.qk_norm = True"),
        (dict(head_dim=48), "ModelConfig.head_dim = 48"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_gated_deltanet_has_and_we_do_not_is_refused_by_name(fields, message, tmp_path):
    write_model(tmp_path / "hf", GATED_DELTANET | fields, gated_deltanet_tensors()[0])
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["mom", "one_memory_and_shared"])
def test_more_than_one_memory_is_no_gated_deltanet(kind, tmp_path):
    make_run(tmp_path / "run", small(kind, vocab_size=300))
    with pytest.raises(ValueError, match="ModelConfig.(num_memories|shared_memory) = .* the official layout holds only"):
        to_hugging_face(open_source(tmp_path / "run"), tmp_path / "hf", model_type="gated_deltanet")
    with pytest.raises(ValueError, match="model_type = 'gla' is not allowed: it must be 'mom' or 'gated_deltanet'"):
        to_hugging_face(open_source(tmp_path / "run"), tmp_path / "hf", model_type="gla")


def test_the_unused_parameter_of_early_versions_is_left_out(tmp_path):
    tensors, _, _ = gated_deltanet_tensors()
    extra = {"model.layers.0.attn.D": np.ones(3, np.float32)}
    to_hugging_face(open_source(write_model(tmp_path / "hf", GATED_DELTANET, tensors | extra)), tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tensors)


# Tokenizers.


def test_a_byte_tokenizer_becomes_an_equal_file(exported, tmp_path):
    directory, _ = exported
    text = "To be,\n\tor not \x00\x7f\xad — é 😀 <|endoftext|"
    assert mom_jax.load(directory / "orbax").tokenizer.kind == "bytes"
    to_inference_checkpoint(open_source(directory / "hf"), tmp_path / "again")
    for tokenizer in (mom_jax.load(directory / "hf").tokenizer, mom_jax.load(tmp_path / "again").tokenizer):
        assert tokenizer.encode(text).tolist() == ByteTokenizer().encode(text).tolist()
        assert tokenizer.decode([*tokenizer.encode(text), ByteTokenizer.eos_id]) == text
        assert tokenizer.vocab_size == ByteTokenizer.vocab_size
    settings = json.loads((directory / "hf" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["eos_token"]) == ("PreTrainedTokenizerFast", "<|endoftext|>")
    assert json.loads((directory / "hf" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_a_tokenizer_file_comes_along(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizer_models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    make_run(tmp_path / "run", small(bos_token_id=2, eos_token_id=3), HuggingFaceTokenizer(tokenizer, 3, 2))
    to_inference_checkpoint(open_source(tmp_path / "run"), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "hf")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json")).encode("ab").ids == [2, 0, 1]
    assert json.loads((tmp_path / "hf/special_tokens_map.json").read_text()) == {"bos_token": "<s>", "eos_token": "</s>"}
    for name in ("run", "orbax", "hf"):
        loaded = mom_jax.load(tmp_path / name).tokenizer
        assert (loaded.bos_id, loaded.eos_id, loaded.encode("ab").tolist()) == (2, 3, [0, 1])


def test_files_of_transformers_come_along_as_they_are(golden, tmp_path):
    files = {"tokenizer_config.json": b"{ }", "chat_template.jinja": b"{{x}}", "generation_config.json": b'{"top_k": 3}'}
    for name, content in files.items():
        (golden / name).write_bytes(content)
    (golden / "README.md").write_text("not a part of the model")
    to_inference_checkpoint(open_source(golden), tmp_path / "orbax")
    to_hugging_face(open_source(tmp_path / "orbax"), tmp_path / "hf")
    assert {name: (tmp_path / "hf" / name).read_bytes() for name in files} == files
    assert not (tmp_path / "hf" / "README.md").exists()


# Damage, interruptions and what was there before.


@pytest.mark.filterwarnings("ignore:skipping the damaged checkpoint")
@pytest.mark.parametrize("kind", ["orbax", "hf", "run"])
def test_every_damaged_or_missing_file_is_named(kind, exported, tmp_path):
    directory = shutil.copytree(exported[0] / kind, tmp_path / kind)
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != CHECKSUMS and file.stat().st_size > 1]
    if kind == "run":
        files = [file for file in files if "/state/d/" in str(file)]
    for file in files:
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=file.name) as caught:
            open_source(directory)
        assert "\n" not in str(caught.value) or file.name == "config.json"
        file.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=file.name):
            open_source(directory)
        file.write_bytes(content)
    open_source(directory)
    if kind == "orbax":
        (directory / CHECKSUMS).unlink()
        with pytest.raises(FileNotFoundError, match=f"{directory / CHECKSUMS} is missing"):
            open_source(directory)


@pytest.mark.parametrize("kind, weights", [("run", "checkpoints"), ("orbax", "weights")])
def test_a_directory_of_ours_without_its_weights_is_no_hugging_face_model(kind, weights, exported, tmp_path):
    directory = shutil.copytree(exported[0] / kind, tmp_path / kind)
    shutil.rmtree(directory / weights)
    if kind == "run":
        (directory / "config.json").write_text(json.dumps({"model": to_dict(small())}))
    message = f"{directory} holds no model: it has .*config.json, .*tokenizer; a training run has checkpoints/, an inference"
    with pytest.raises(FileNotFoundError, match=message):
        mom_jax.load(directory)


@pytest.mark.parametrize(
    "module, broken",
    [
        (mom_jax.inference_checkpoint, "write_json"),
        (mom_jax.inference_checkpoint.orbax_v1.partial, "finalize"),
        (mom_jax.interchange, "_write_generation_config"),
    ],
)
def test_an_interrupted_export_leaves_nothing_and_keeps_what_was_there(module, broken, exported, tmp_path, monkeypatch):
    source = open_source(exported[0] / "orbax")
    shutil.copytree(exported[0] / "orbax", tmp_path / "kept")
    before = (tmp_path / "kept" / CHECKSUMS).read_text()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, broken, fail)
    for name in ("kept", "new"):
        with pytest.raises(KeyboardInterrupt):
            to_inference_checkpoint(source, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / CHECKSUMS).read_text() == before
    open_source(tmp_path / "kept")


def test_nothing_already_written_is_lost(exported, tmp_path):
    source, output = open_source(exported[0] / "orbax"), tmp_path / "output"
    output.mkdir()  # empty: anyone's
    to_hugging_face(source, output)
    with pytest.raises(FileExistsError, match="output exists already: choose another output, or --overwrite it"):
        to_hugging_face(source, output)
    to_inference_checkpoint(source, output, overwrite=True)
    assert not (output / "model.safetensors").exists()
    open_source(output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt would be lost"):
        to_hugging_face(source, output, overwrite=True)
    (output / CHECKSUMS).unlink()
    with pytest.raises(FileExistsError, match="is nothing that an export or import wrote"):
        to_hugging_face(source, output, overwrite=True)
    assert (output / "notes.txt").exists() and (output / "weights").exists()


def test_save_pretrained_over_an_export_still_loads(exported, tmp_path):
    directory = shutil.copytree(exported[0] / "hf", tmp_path / "hf")
    model = mom_jax.load(directory).model
    mom_jax.save_pretrained(model, directory, dtype="bfloat16")
    assert not (directory / CHECKSUMS).exists()
    mom_jax.load_pretrained(directory)


def test_arguments_are_checked_before_anything_is_written(exported, tmp_path):
    source = open_source(exported[0] / "orbax")
    for write, arguments in (
        (to_inference_checkpoint, dict(dtype="float16")), (to_hugging_face, dict(dtype="float16")),
        (to_hugging_face, dict(max_shard_bytes=0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} = "):
            write(source, tmp_path / "output", **arguments)
    with pytest.raises(ValueError, match="params.embedding: .* the config wants"):
        open_source(exported[0] / "orbax", vocab_size=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [to_inference_checkpoint, to_hugging_face])
@pytest.mark.parametrize("source", ["run", "orbax", "hf"])
def test_no_more_than_the_largest_array_is_in_memory(source, write, exported, tmp_path):
    """Counted in arrays that were read and are still referenced, which no allocator or page cache blurs."""
    source = open_source(exported[0] / source)
    largest = max(x.size * x.dtype.itemsize for x in source.weights.shapes.values())
    alive = weakref.WeakValueDictionary()

    def parts(name):
        whole = np.zeros(source.weights.shapes[name].shape, source.weights.shapes[name].dtype)
        for index, part in source.weights.parts(name):
            whole[index] = part
        alive[name] = whole
        assert sum(array.nbytes for array in alive.values()) <= largest
        return [((), whole)]

    write(source._replace(weights=source.weights._replace(parts=parts)), tmp_path / "output")
    open_source(tmp_path / "output")


@pytest.mark.parametrize("directory", ["run", "orbax", "hf"])
def test_weights_are_born_split_over_a_mesh(directory, exported):
    """To the bit, each device with its part only."""
    mesh = make_mesh(MeshConfig(fsdp=2, memory=2))
    model = mom_jax.load(exported[0] / directory, mesh=mesh).model
    assert_equal(model, exported[1])
    arrays = weights_of(model).shapes
    with use_mesh(mesh):
        assert {name: x.sharding for name, x in arrays.items()} == by_name(shardings(mesh, parameter_specs(to_tree(arrays))))
    w_k = arrays["params.runs.run_0.mixer.rule.w_k"]
    assert 4 * w_k.addressable_data(0).size == w_k.size
    with pytest.raises(ValueError, match="MeshConfig.memory = 3 is not allowed: it must divide num_memories = 4"):
        mom_jax.load(exported[0] / directory, mesh=make_mesh(MeshConfig(memory=3)))


# The official code.


@pytest.mark.parametrize("kind, model_type", [("mom", "mom"), ("single_memory", "gated_deltanet")])
def test_the_official_code_loads_what_we_export(kind, model_type, tmp_path):
    """Runs where flash-linear-attention can: with torch, transformers, Triton and a GPU."""
    torch = pytest.importorskip("torch", reason="needs torch and flash-linear-attention")
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    if not torch.cuda.is_available():
        pytest.skip("flash-linear-attention's kernels need a GPU")
    from fla.models import GatedDeltaNetForCausalLM, MomForCausalLM

    config = small(kind, vocab_size=300, head_dim=32, expand_v=1.0)
    make_run(tmp_path / "run", config)
    to_hugging_face(open_source(tmp_path / "run"), tmp_path / "hf", model_type=model_type)
    cls = {"mom": MomForCausalLM, "gated_deltanet": GatedDeltaNetForCausalLM}[model_type]
    theirs, report = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = np.random.default_rng(0).integers(0, 300, (2, 40))
    with torch.no_grad():
        expected = theirs.eval().cuda()(torch.tensor(tokens).cuda(), use_cache=False).logits.float().cpu().numpy()
    found = np.asarray(mom_jax.load(tmp_path / "run", dtype="float32").model(jnp.asarray(tokens)).logits)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
