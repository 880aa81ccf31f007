"""Loss, optimiser, train step and the fit loop, in this process; tests/test_experiments.py kills and resumes whole runs.

    python tests/test_training.py        writes data/golden_metrics.json anew, after a change that is meant to change them
"""

import dataclasses
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache as persistent_cache
from jaxprs import equations, results
from models import draw_params, small
from numerics import LIMITS, assert_close, relative_l2

from mom_jax import fit as fit_loop
from mom_jax import training
from mom_jax.checkpoint import Checkpoints
from mom_jax.config import AttentionConfig, MeshConfig, ModelConfig, TrainConfig
from mom_jax.config_io import to_dict
from mom_jax.fit import Fitted, fit
from mom_jax.inference_checkpoint import open_state
from mom_jax.layers import cast_weights
from mom_jax.model import bind, init_params
from mom_jax.reports import read_metrics
from mom_jax.sharding import leaf_name, make_mesh, use_mesh
from mom_jax.training import (
    abstract_state,
    cross_entropy,
    evaluate,
    learning_rate_schedule,
    loss_and_metrics,
    make_optimizer,
    make_state,
    make_train_step,
    place,
)
from mom_jax.weights import by_name

GOLDEN = Path(__file__).parent / "data" / "golden_metrics.json"
MODEL = small()
SHORT = small(num_layers=1, balance_loss_scale=0.0)  # for rows of 16 tokens: compiles soonest
TRAIN = TrainConfig(
    steps=60, stop_after=6, learning_rate=1e-2, warmup_steps=5, loss_chunk=32, log_every=1, eval_every=3,
    checkpoint_every=2,
)  # fmt: skip
ONE_DEVICE = MeshConfig()


def make_batch(seed: int, rows: int, length: int, vocab_size: int = 61, ignored: float = 0.1) -> dict[str, np.ndarray]:
    """Random tokens, each row's next ones as targets, some of them ignored."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=(rows, length + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": np.where(rng.uniform(size=(rows, length)) < ignored, -1, tokens[:, 1:]),
    }


BATCHES = [make_batch(seed, rows=2, length=70) for seed in range(4)]


def random_state(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    params, variables = draw_params(model)
    return {
        "step": jnp.int32(0), "params": params, "variables": variables, "optimizer": make_optimizer(train).init(params),
        "key": jax.random.key(1),
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mom", "hybrid", "single_kv", "all_memories"])
def test_the_kernels_train_as_plain_jax_does(kind):
    """Loss, load and every gradient of a model, over packed documents and padding."""
    batch = make_batch(0, rows=2, length=130)
    batch["document_ids"] = np.sort(np.random.default_rng(0).integers(3, size=(2, 130)), axis=1).astype(np.int32)
    batch["attention_mask"] = np.arange(130) < np.array([[130], [100]])
    batch["targets"] = np.where(batch["attention_mask"], batch["targets"], -1)
    batch = jax.tree.map(jnp.asarray, batch)

    def run(implementation):
        config = small(kind, implementation=implementation)
        params, variables = draw_params(config)

        def loss(params):
            return loss_and_metrics(bind(config, params, variables), batch, 64)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    assert_close(run("triton"), run("chunked"), LIMITS["float32"])


def one_step(model: ModelConfig, train: TrainConfig, batch, **changes) -> tuple[dict, dict]:
    step = jax.jit(make_train_step(model, train))
    return step(random_state(model, train) | changes, batch)


def names_in(tree) -> set[str]:
    return {leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


# The loss


def plain_cross_entropy(model, hidden, targets, chunk=None):
    logits = model.logits(hidden)
    log_probabilities = jax.nn.log_softmax(logits)
    label = jnp.take_along_axis(log_probabilities, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    hits = jnp.sum((jnp.argmax(logits, axis=-1) == targets) & (targets >= 0))
    return -jnp.sum(jnp.where(targets >= 0, label, 0)), hits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk", [1, 32, 70, 500])
def test_cross_entropy_is_the_plain_one(chunk, tied):
    config = dataclasses.replace(SHORT, tie_embeddings=tied)
    params, _ = draw_params(config)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, 70, 32)), jnp.float32)
    targets = jnp.asarray(make_batch(0, rows=2, length=70, ignored=0.3)["targets"])

    def value_and_gradients(function):
        @jax.jit
        def run(params, hidden):
            def loss(params, hidden):
                return function(bind(config, params, {}), hidden, targets, chunk)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)

        return run(params, hidden)

    (nats, correct), gradients = value_and_gradients(cross_entropy)
    (expected_nats, expected_correct), expected_gradients = value_and_gradients(plain_cross_entropy)
    assert relative_l2(nats, expected_nats) < LIMITS["float32"]
    assert correct == expected_correct
    assert_close(gradients, expected_gradients, LIMITS["float32"])


def test_a_batch_without_targets_has_no_loss():
    model = bind(SHORT, *draw_params(SHORT))
    nats, correct = cross_entropy(model, jnp.ones((2, 8, 32)), jnp.full((2, 8), -1), 4)
    assert nats == correct == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_of_all_logits_exists(dtype, monkeypatch):
    config = dataclasses.replace(MODEL, vocab_size=4096, dtype=dtype)
    batch = jax.tree.map(jnp.asarray, make_batch(0, rows=2, length=70, vocab_size=4096))
    params, variables = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def largest_array():
        def loss(params):
            return loss_and_metrics(bind(config, params, variables), batch, chunk=32)

        return max(x.size for x in results(jax.value_and_grad(loss, has_aux=True), params))

    assert largest_array() < 2 * 70 * 4096
    monkeypatch.setattr(training, "cross_entropy", plain_cross_entropy)
    assert largest_array() >= 2 * 70 * 4096


def test_router_z_loss_enters_the_loss():
    batch = jax.tree.map(jnp.asarray, make_batch(0, rows=2, length=16))
    params, _ = draw_params(SHORT)

    @jax.jit
    def run(params):
        on, off = (dataclasses.replace(SHORT, router_z_loss_scale=scale) for scale in (0.5, 0.0))
        logits = bind(on, params, {}).hidden(batch["tokens"]).router.logits
        return *(loss_and_metrics(bind(config, params, {}), batch, 8) for config in (on, off)), logits

    (loss, metrics), (loss_without, _), logits = run(params)
    expected = np.mean(np.square(jax.nn.logsumexp(logits, axis=-1)))
    np.testing.assert_allclose(metrics["z_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss - loss_without, 0.5 * expected, rtol=1e-4)
    assert metrics["loss"] == loss_without


# Optimiser and schedules

UNDECAYED = {
    "mixer_norm", "mlp_norm", "out_norm", "final_norm", "a_log", "dt_bias", "conv_q_bias", "conv_k_bias", "conv_v_bias",
}  # fmt: skip


def test_weight_decay_goes_by_name():
    """With zero gradients a step moves exactly what is decayed."""
    hybrid = AttentionConfig(layers=(1,), num_heads=2)
    model = dataclasses.replace(MODEL, conv_bias=True, attention=hybrid, router_bias_rate=0.1)
    train = dataclasses.replace(TRAIN, weight_decay=0.1)
    params, _ = draw_params(model)
    optimizer = make_optimizer(train)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert UNDECAYED < names_in(params)
    assert params["runs"]["run_0"]["mixer_norm"].ndim == 2  # so that a choice by rank would be seen
    rate = learning_rate_schedule(train)(0)
    for (path, update), (_, value) in zip(
        *map(jax.tree_util.tree_leaves_with_path, (updates, params)), strict=True
    ):  # fmt: skip
        expected = 0 if leaf_name(path) in UNDECAYED else -rate * 0.1 * value
        np.testing.assert_allclose(update, np.broadcast_to(expected, value.shape), rtol=1e-5, err_msg=str(path))


def rates(**settings) -> np.ndarray:
    config = TrainConfig(learning_rate=1.0, **settings)
    return np.asarray(jax.vmap(learning_rate_schedule(config))(jnp.arange(config.steps + 1)))


def test_cosine_schedule():
    rate = rates(steps=100, warmup_steps=10, schedule="cosine", final_learning_rate=0.1)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)  # the first step is not lost
    np.testing.assert_allclose(rate[[10, 55, 100]], [1, 0.55, 0.1], rtol=1e-6)
    assert (np.diff(rate[10:]) < 0).all()


def test_warmup_stable_decay_schedule():
    rate = rates(steps=100, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_learning_rate=0.1)
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rate[10:81], 1, rtol=1e-6)
    np.testing.assert_allclose(rate[80:], np.linspace(1, 0.1, 21), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warmup_of_none_or_one_step_begins_at_the_peak(schedule):
    for warmup in (0, 1):
        np.testing.assert_allclose(rates(steps=10, warmup_steps=warmup, schedule=schedule)[:2], 1, atol=0.03)


@pytest.mark.parametrize("decay_fraction", [0.0, 0.5, 1.0])
def test_decay_never_cuts_into_the_warmup(decay_fraction):
    rate = rates(steps=10, warmup_steps=8, schedule="wsd", decay_fraction=decay_fraction, final_learning_rate=0.0)
    np.testing.assert_allclose(rate[:9], [*np.arange(1, 9) / 8, 1], rtol=1e-6)
    np.testing.assert_allclose(rate[10], 0, atol=1e-6)


@pytest.mark.parametrize("norm, scale", [(10.0, 0.1), (0.5, 1.0)])
def test_gradients_are_clipped_to_the_global_norm(norm, scale):
    gradients = {"a": jnp.full(9, norm / 5), "b": jnp.full(16, norm / 5)}
    optimizer = make_optimizer(dataclasses.replace(TRAIN, clip_norm=1.0))
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    mean = optax.tree.get(state, "mu")
    assert_close(mean, jax.tree.map(lambda g: 0.1 * scale * g, gradients), 1e-6)


# The train step


def uneven_batch() -> dict[str, np.ndarray]:
    """Four rows with 16, 5, 1 and no targets."""
    batch = make_batch(0, rows=4, length=16, ignored=0)
    counts = np.array([16, 5, 1, 0])
    return batch | {"targets": np.where(np.arange(16) < counts[:, None], batch["targets"], -1)}


@pytest.fixture(scope="module")
def whole_batch_step():
    return one_step(SHORT, TRAIN, uneven_batch())


def test_norms_and_rate_in_the_metrics(whole_batch_step):
    """The gradient's before the clipping, here to 1; the parameters' after the step."""
    state, metrics = whole_batch_step
    assert metrics["grad_norm"] > 1
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state["optimizer"], "mu")), 0.1, rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state["params"]), rtol=1e-5)
    assert metrics["learning_rate"] == learning_rate_schedule(TRAIN)(0)


def test_accumulation_equals_the_whole_batch(whole_batch_step):
    state, metrics = one_step(SHORT, dataclasses.replace(TRAIN, accumulation=4), uneven_batch())
    expected_state, expected_metrics = whole_batch_step
    for name in ("loss", "accuracy", "z_loss", "load", "grad_norm"):  # the balance loss is each piece's own
        assert relative_l2(metrics[name], expected_metrics[name]) < LIMITS["float32"], name
    for name in ("mu", "nu"):
        assert_close(*(optax.tree.get(s["optimizer"], name) for s in (state, expected_state)), LIMITS["float32"], name)
    assert_close(state["params"], expected_state["params"], LIMITS["float32"])


def test_router_bias_moves_against_the_load_and_is_not_trained(whole_batch_step):
    model = dataclasses.replace(SHORT, router_bias_rate=0.01)
    bias = jnp.full((1, 4), 0.5)  # the same for all, so that it does not change the selection
    variables = {"runs": {"run_0": {"mixer": {"router": {"router_bias": bias}}}}}
    state, metrics = one_step(model, TRAIN, uneven_batch(), variables=variables)
    load = np.asarray(metrics["load"])
    assert np.ptp(load) > 0
    expected = 0.5 - 0.01 * np.sign(load - load.mean(axis=1, keepdims=True))
    assert_close(state["variables"], jax.tree.map(lambda _: expected, variables), 1e-6)
    assert "router_bias" not in names_in((state["params"], state["optimizer"]))
    assert_close(state["params"], whole_batch_step[0]["params"], LIMITS["float32"])


def test_without_router_bias_there_is_nothing_beside_the_parameters(whole_batch_step):
    state, _ = whole_batch_step
    assert state["variables"] == {}
    assert "router_bias" not in names_in(state)


def test_bfloat16_compute_leaves_parameters_float32():
    model = dataclasses.replace(MODEL, dtype="bfloat16", remat="full")
    state = jax.eval_shape(lambda: random_state(model, TRAIN))
    step = make_train_step(model, TRAIN)
    new, metrics = jax.eval_shape(step, state, BATCHES[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    trees = (new["params"], optax.tree.get(new["optimizer"], "mu"), optax.tree.get(new["optimizer"], "nu"), metrics)
    assert {x.dtype for x in jax.tree.leaves(trees)} == {jnp.dtype("float32")}

    products = [e for e in equations(step, state, BATCHES[0]) if e.primitive.name == "dot_general"]
    weights = [x.aval for e in products for x in e.invars if x.aval.shape in {(32, 61), (32, 48), (48, 32)}]
    assert weights and {x.dtype for x in weights} == {jnp.dtype("bfloat16")}


def test_weights_of_matmuls_are_cast_once_and_change_nothing():
    model = dataclasses.replace(SHORT, dtype="bfloat16")
    batch = jax.tree.map(jnp.asarray, make_batch(0, rows=2, length=16))
    params, _ = draw_params(model)

    def loss(params):
        return loss_and_metrics(bind(model, params, {}), batch, 16)[0]

    def cast_loss(params):
        return loss(cast_weights(params, "bfloat16"))

    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(jax.value_and_grad(f))(params) for f in (loss, cast_loss)))
    cast = jax.tree_util.tree_leaves_with_path(cast_weights(params, "bfloat16"))
    others = ("embedding", "head", "router", "a_log", "dt_bias", "conv_q", "conv_k", "conv_v")
    norms = ("out_norm", "mixer_norm", "mlp_norm", "final_norm")
    assert {leaf_name(path) for path, x in cast if x.dtype == jnp.float32} == {*others, *norms} & names_in(params)


def test_remat_settings_recompute_nothing_or_all_but_products_or_everything():
    """That they change no gradient: tests/test_model.py."""
    batch = jax.tree.map(jnp.asarray, make_batch(0, rows=2, length=16))
    params, _ = draw_params(SHORT)
    products = []
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(SHORT, remat=remat)

        def loss(params, config=config):
            return loss_and_metrics(bind(config, params, {}), batch, 16)[0]

        products.append(sum(e.primitive.name == "dot_general" for e in equations(jax.grad(loss), params)))
    assert products == sorted(set(products))


# The fit loop


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every fit makes its own train step; programs that were compiled before are taken from here."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        persistent_cache.reset_cache()
        if values is settings:
            yield


def run_fit(directory: Path, train: TrainConfig = TRAIN, mesh: MeshConfig = ONE_DEVICE, valid_data=None) -> Fitted:
    """Fits MODEL to the four batches in turn."""
    return fit(
        directory, MODEL, train, make_mesh(mesh, MODEL),
        grain.MapDataset.source(BATCHES).repeat().to_iter_dataset(), valid_data or (lambda: BATCHES[:2]),
        run_config={"model": to_dict(MODEL), "train": to_dict(train)}, tensorboard=False,
    )  # fmt: skip


def losses(directory: Path) -> dict[tuple[int, str], float]:
    return {(record["step"], record["split"]): record["loss"] for record in read_metrics(directory)}


class Run(NamedTuple):
    directory: Path
    first_state: dict
    last_state: dict
    traces: Counter
    """Traces of the train step and the eval step."""
    compilations: Counter
    """Of both together; a change of shardings compiles again without a trace."""


def watched_fit(directory: Path, mesh: MeshConfig) -> Run:
    """Six steps, evaluations after 3 and 6, checkpoints after 2, 4 and 6."""
    traces, compilations, first_states = Counter(), Counter(), []

    def counted(name):
        make = getattr(fit_loop, f"make_{name}")

        def make_counted(*arguments):
            step = make(*arguments)

            @functools.wraps(step)  # under the same name, so that other fits find the program in the cache
            def counting(*arguments):
                traces[name] += 1
                return step(*arguments)

            return counting

        return make_counted

    class Compilations(logging.Handler):
        def emit(self, record):
            compilations.update(["step"] if "Compiling jit(step)" in record.getMessage() else [])

    def kept_state(*arguments, make_state=fit_loop.make_state):
        first_states.append(make_state(*arguments))
        return first_states[-1]

    handler, logger = Compilations(), logging.getLogger("jax")
    with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
        for name in ("train_step", "eval_step"):
            patch.setattr(fit_loop, f"make_{name}", counted(name))
        patch.setattr(fit_loop, "make_state", kept_state)
        patch.setattr(logger, "propagate", False)
        logger.addHandler(handler)
        try:
            last_state = run_fit(directory, mesh=mesh).state
        finally:
            logger.removeHandler(handler)
    return Run(directory, first_states[0], last_state, traces, compilations)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return watched_fit(tmp_path_factory.mktemp("run"), ONE_DEVICE)


@pytest.fixture(scope="module")
def mesh_run(tmp_path_factory):
    return watched_fit(tmp_path_factory.mktemp("mesh_run"), MeshConfig(data=2, memory=2))


@pytest.mark.parametrize("name", ["run", "mesh_run"])
def test_a_run_compiles_each_step_once(name, request):
    run = request.getfixturevalue(name)
    assert run.traces == {"train_step": 1, "eval_step": 1}
    assert run.compilations == {"step": 2}


@pytest.mark.parametrize("name", ["run", "mesh_run"])
def test_the_state_is_donated(name, request):
    run = request.getfixturevalue(name)
    alive = [path for path, x in jax.tree_util.tree_leaves_with_path(run.first_state) if not x.is_deleted()]
    assert not alive
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.last_state["params"]))


def test_records_evaluations_and_checkpoints_come_when_they_should(run):
    train_steps = [(step, "train") for step in range(1, 7)]
    assert sorted(losses(run.directory)) == sorted([*train_steps, (3, "valid"), (6, "valid")])
    assert sorted(path.name for path in (run.directory / "checkpoints").iterdir()) == ["4", "6"]
    saved, last = open_state(run.directory / "checkpoints/6/state", MODEL), by_name({"params": run.last_state["params"]})
    assert_close({name: saved.read(name) for name in last}, last, 0)
    assert (run.directory / "loss_curves.png").stat().st_size > 0
    assert (run.directory / "routing.png").stat().st_size > 0


def golden_metrics(directory: Path) -> dict[str, dict[str, float]]:
    return {
        str(record["step"]): {name: record[name] for name in ("loss", "grad_norm")}
        for record in read_metrics(directory)
        if record["split"] == "train" and record["step"] in (1, 5)
    }


def test_metrics_after_one_and_five_steps_are_golden(run):
    metrics = golden_metrics(run.directory)
    for step, expected in json.loads(GOLDEN.read_text()).items():
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[step][name], value, rtol=1e-5, err_msg=f"step {step}: {name}")


def test_data_and_memory_mesh_gives_the_losses_of_one_device(run, mesh_run):
    w_k = mesh_run.last_state["params"]["runs"]["run_0"]["mixer"]["rule"]["w_k"]
    assert len(w_k.sharding.device_set) == 4 and w_k.addressable_shards[0].data.shape[1] == w_k.shape[1] // 2
    expected = losses(run.directory)
    for key, loss in losses(mesh_run.directory).items():
        assert relative_l2(loss, expected[key]) < LIMITS["float32"], key


def test_one_batch_is_learnt_by_heart(run):
    step, mesh = jax.jit(make_train_step(MODEL, TRAIN), donate_argnums=0), make_mesh(ONE_DEVICE)
    with use_mesh(mesh):  # the very program of the run, and so in the cache
        state, batch = make_state(MODEL, TRAIN, mesh), place(BATCHES[0], mesh)
        for _ in range(30):
            state, metrics = step(state, batch)
    assert metrics["loss"] < 0.1
    assert metrics["accuracy"] == 1


def test_a_signal_during_an_evaluation_saves_and_the_run_goes_on_exactly(run, tmp_path, capsys):
    """The resumed run may save and keep other checkpoints than the first."""

    def valid_data():
        os.kill(os.getpid(), signal.SIGTERM)
        return BATCHES[:2]

    handler = signal.getsignal(signal.SIGTERM)
    rarely_saved = dataclasses.replace(TRAIN, checkpoint_every=100)
    assert run_fit(tmp_path, rarely_saved, valid_data=valid_data).stopped_by == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "SIGTERM: saved step 4; the same command continues from there" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]

    run_fit(tmp_path, dataclasses.replace(TRAIN, checkpoint_every=5, keep_last=1, keep_best=0))
    assert losses(tmp_path) == losses(run.directory)
    run_fit(tmp_path)
    assert "nothing to do: the run already stands at step 6 of 6" in capsys.readouterr().err


def test_two_signals_that_waited_behind_a_compilation_end_the_program_without_a_word():
    program = """if True:
        import signal
        from mom_jax.stopping import StopSignal
        with StopSignal() as stop:
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
            print("alive")
    """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize("broken", ["loss", "grad_norm", "param_norm"])
def test_a_metric_that_is_not_finite_stops_and_keeps_the_checkpoint_before(broken, run, tmp_path, monkeypatch):
    def make_broken_step(model, train):
        def step(state, batch):
            metrics = dict.fromkeys(("loss", "grad_norm", "param_norm"), jnp.ones(()))
            done = state["step"] + 1
            return state | {"step": done}, metrics | {broken: jnp.where(done == 4, jnp.nan, 1.0)}

        return step

    monkeypatch.setattr(fit_loop, "make_train_step", make_broken_step)
    with pytest.raises(FloatingPointError, match=f"step 4: the {broken} is nan; the checkpoint of step 2 is kept"):
        run_fit(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        done, state = checkpoints.restore(abstract_state(MODEL, TRAIN, make_mesh(ONE_DEVICE)), config=None)
    assert done == state["step"] == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_evaluation_needs_a_batch(unchecked_shapes):
    with pytest.raises(ValueError, match="the number of evaluation batches = 0 is not allowed"):
        evaluate(None, {}, [])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        run_fit(Path(temporary))
        GOLDEN.write_text(json.dumps(golden_metrics(Path(temporary)), indent=1) + "\n")
