"""Checkpoints: exact, retained as told, refused where they do not fit, passed over where they are damaged."""

import json
import random
import resource
import shutil
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import flip_a_bit, truncate
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mom_jax import files
from mom_jax.checkpoint import CHECKSUMS, Checkpoints, find_step, load_config
from mom_jax.files import checksums_of

CONFIG = {"model": {"hidden_size": 8, "layers": (1, 2), "dtype": "bfloat16"}, "train": {"log_every": 10, "steps": 100}}


class Moments(NamedTuple):
    count: jax.Array
    mean: dict


def make_state(seed: int) -> dict:
    key = jax.random.key(seed)
    w = jax.random.normal(key, (64, 64))
    params = {"embed": {"w": w}, "head": w[:3].astype(jnp.bfloat16)}
    optimiser = (Moments(jnp.int32(seed), {"w": w**2}), ())
    return {"params": params, "optimiser": optimiser, "step": jnp.int32(seed), "key": jax.random.key(seed, impl="rbg")}


def abstract(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, e = jax.random.key_data(a), jax.random.key_data(e)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def save_steps(directory: Path, *steps: int) -> None:
    with Checkpoints(directory, keep_last=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), config=CONFIG)


def restore(directory: Path, **arguments):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), **{"config": CONFIG} | arguments)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir())


def test_round_trip_is_exact(tmp_path):
    assert restore(tmp_path) is None
    save_steps(tmp_path, 3, 7)
    step, state = restore(tmp_path)
    assert step == 7
    assert_same(state, make_state(7))
    step, state = restore(tmp_path, step=3)
    assert step == 3
    assert_same(state, make_state(3))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
        restore(tmp_path, step=5)


def test_the_config_loads_without_the_rest(tmp_path):
    save_steps(tmp_path, 1, 2)
    assert load_config(tmp_path) == load_config(tmp_path, 1) == json.loads(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="nothing_here has no checkpoint"):
        load_config(tmp_path / "nothing_here")


def test_the_best_step_is_the_whole_one_of_lowest_held_out_loss(tmp_path):
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step, loss in enumerate((0.5, 0.2, 0.3, None), start=1):
            checkpoints.save(step, {"params": jnp.ones(3)}, config=CONFIG, held_out_loss=loss)
    assert (find_step(tmp_path), find_step(tmp_path, best=True)) == (4, 2)
    flip_a_bit(largest_file(tmp_path / "2"))
    assert find_step(tmp_path, best=True) == 3
    save_steps(tmp_path / "unrated", 1)
    with pytest.raises(FileNotFoundError, match="unrated has no whole checkpoint with a held-out loss"):
        find_step(tmp_path / "unrated", best=True)


def test_arrays_are_born_on_another_mesh(tmp_path):
    """Saved on 8 devices split one way, restored on 4 split the other way."""
    devices = np.array(jax.devices())
    before = NamedSharding(Mesh(devices[:8], "data"), PartitionSpec("data"))
    after = NamedSharding(Mesh(devices[:4], "memory"), PartitionSpec(None, "memory"))
    replicated = NamedSharding(after.mesh, PartitionSpec())
    key = jax.random.key(0)
    params = {"w": jax.device_put(jax.random.normal(key, (16, 32)), before)}
    wanted = {"params": abstract(params, after), "key": abstract(key, replicated)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params, "key": key}, config=CONFIG)
        _, state = checkpoints.restore(wanted, config=CONFIG)
    assert_same(state, {"params": params, "key": key})
    assert state["key"].sharding == replicated
    assert state["params"]["w"].sharding == after


def test_newest_and_best_are_kept_across_restarts(tmp_path):
    losses = {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: float("nan"), 6: 4.0, 7: 5.0}
    kept = []
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
            checkpoints.save(step, {"params": jnp.ones(3)}, config=CONFIG, held_out_loss=loss)
        kept.append(steps_in(tmp_path))
    assert kept == [[1], [1, 2], [1, 2, 3], [3, 4], [3, 4, 5], [3, 4, 5, 6], [3, 4, 6, 7]]


def test_state_may_be_donated_and_iterator_advanced_right_after_save(tmp_path):
    train_step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    rows = iter(grain.MapDataset.range(10).to_iter_dataset())
    x = train_step(jnp.arange(4_000_000, dtype=jnp.float32))
    expected = np.array(x, copy=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, config=CONFIG, data_iterator=rows)
        wanted = abstract({"x": x})
        for _ in range(5):
            x = train_step(x)
            next(rows)
        _, state = checkpoints.restore(wanted, config=CONFIG, data_iterator=rows)
    np.testing.assert_array_equal(state["x"], expected)
    assert next(rows) == 0


def test_grain_iterator_continues_where_it_stood(tmp_path):
    def batches():
        return iter(grain.MapDataset.range(100).seed(3).shuffle().repeat().batch(4).to_iter_dataset())

    rows = batches()
    for _ in range(30):
        next(rows)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(30, make_state(0), config=CONFIG, data_iterator=rows)
    fresh = batches()
    restore(tmp_path, data_iterator=fresh)
    for _ in range(30):
        np.testing.assert_array_equal(next(fresh), next(rows))


def test_an_iterator_that_grain_itself_saved_continues_too(tmp_path):
    """As checkpoints hold it that are older than several processes."""
    rows = iter(grain.MapDataset.range(100).to_iter_dataset())
    next(rows)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(0), config=CONFIG, data_iterator=rows)
    directory = tmp_path / "1" / "data_iterator"
    (directory / "metadata").unlink()
    grain.checkpoint.CheckpointHandler().save(directory, rows)
    (tmp_path / "1" / CHECKSUMS).write_text(json.dumps(checksums_of(tmp_path / "1", "*/*")))
    fresh = iter(grain.MapDataset.range(100).to_iter_dataset())
    restore(tmp_path, data_iterator=fresh)
    assert next(fresh) == 1


def test_another_config_is_refused_with_every_difference(tmp_path):
    save_steps(tmp_path, 1)
    other = {"model": {"hidden_size": 16, "layers": [1], "dtype": "bfloat16"}, "train": {"log_every": 5}, "new": None}
    with pytest.raises(ValueError) as error:
        restore(tmp_path, config=other, ignore=("train.log_every",))
    assert str(error.value).splitlines() == [
        f"the config of {tmp_path / '1'} differs:",
        "  model.hidden_size: checkpoint 8, command 16",
        "  model.layers: checkpoint [1, 2], command [1]",
        "  new: checkpoint absent, command None",
        "  train.steps: checkpoint 100, command absent",
        "choose another --output, or delete this run",
    ]
    assert restore(tmp_path, config=other, ignore=("model", "train", "new"))[0] == 1
    assert restore(tmp_path, config=None)[0] == 1


def test_another_state_is_refused_with_every_difference(tmp_path):
    save_steps(tmp_path, 1)
    wanted = abstract(make_state(0))
    wanted["params"]["head"] = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    wanted["params"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    del wanted["step"]
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(wanted, config=CONFIG)
    assert str(error.value).splitlines() == [
        f"the state in {tmp_path / '1'} differs:",
        "  params.bias: checkpoint absent, command float32[3]",
        "  params.head: checkpoint bfloat16[3, 64], command float32[3, 64]",
        "  step: checkpoint int32[], command absent",
    ]


def largest_file(checkpoint: Path) -> Path:
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "array_bit_flipped": lambda path: flip_a_bit(largest_file(path)),
    "array_truncated": lambda path: truncate(largest_file(path)),
    "array_deleted": lambda path: largest_file(path).unlink(),
    "array_tree_deleted": lambda path: (path / "state" / "_METADATA").unlink(),
    "state_deleted": lambda path: shutil.rmtree(path / "state"),
    "run_unreadable": lambda path: truncate(path / "run" / "metadata"),
    "run_bit_flipped": lambda path: flip_a_bit(path / "run" / "metadata"),
    "checksums_deleted": lambda path: (path / CHECKSUMS).unlink(),
    "checksums_truncated": lambda path: truncate(path / CHECKSUMS),
    "checksums_bit_flipped": lambda path: flip_a_bit(path / CHECKSUMS),
    "all_deleted": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_and_can_be_saved_again(tmp_path, damage):
    save_steps(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "2")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match=f"skipping the damaged checkpoint {tmp_path / '2'}: "):
            step, state = checkpoints.restore(abstract(make_state(0)), config=CONFIG)
        assert step == 1
        assert_same(state, make_state(1))
        checkpoints.save(2, make_state(2), config=CONFIG)
    assert_same(restore(tmp_path)[1], make_state(2))
    assert (tmp_path / "2.damaged").exists()


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(files, "fsync", lambda path: synced.add(path.relative_to(tmp_path).parts[1:]))
    save_steps(tmp_path, 1)
    found = {path.relative_to(tmp_path / "1").parts for path in (tmp_path / "1").rglob("*")}
    assert found - synced <= {("_CHECKPOINT_METADATA",), ("commit_success.txt",)}  # see the next test


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_files_without_a_checksum_are_not_needed(tmp_path, file):
    save_steps(tmp_path, 1)
    (tmp_path / "1" / file).write_bytes(b"\0damaged")
    assert_same(restore(tmp_path)[1], make_state(1))
    (tmp_path / "1" / file).unlink()
    assert_same(restore(tmp_path)[1], make_state(1))


def test_every_flipped_bit_is_found(tmp_path):
    """TensorStore alone finds none of those in array values."""
    save_steps(tmp_path, 1)
    generator = random.Random(0)
    files = [path for path in (tmp_path / "1").glob("*/**/*") if path.is_file()]
    for file in generator.choices(files, k=100):
        whole = file.read_bytes()
        position, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.warns(UserWarning, match="skipping"), pytest.raises(RuntimeError, match=file.name):
            find_step(tmp_path)
        file.write_bytes(whole)


def test_nothing_starts_silently_over_damaged_checkpoints(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_a_bit(largest_file(tmp_path / "1"))
    (tmp_path / "2" / CHECKSUMS).unlink()
    for attempt in (restore, find_step):
        with pytest.warns(UserWarning, match="skipping"), pytest.raises(RuntimeError) as error:
            attempt(tmp_path)
        assert f"{tmp_path / '1'}: missing, added or changed: state/" in str(error.value)
        assert f"{tmp_path / '2'}: FileNotFoundError" in str(error.value)
    assert steps_in(tmp_path) == [1, 2]


def test_remains_of_a_killed_save_are_removed(tmp_path):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2.orbax-checkpoint-tmp" / "state")
    with pytest.warns(UserWarning, match=f"removing {tmp_path / '2.orbax-checkpoint-tmp'}"):
        checkpoints = Checkpoints(tmp_path)
    with checkpoints:
        assert checkpoints.restore(abstract(make_state(0)), config=CONFIG)[0] == 1
        checkpoints.save(2, make_state(2), config=CONFIG)
    assert steps_in(tmp_path) == [1, 2]
    assert_same(restore(tmp_path)[1], make_state(2))


# Orbax closes its event loop while TensorStore still has failures to report to it.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_failed_save_is_raised_and_the_one_before_stays(tmp_path):
    """A limit on the size of files stands for a full disk."""
    save_steps(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            checkpoints.save(2, make_state(2), config=CONFIG)
            with pytest.raises(ValueError, match=str(tmp_path / "2")):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.restore(abstract(make_state(0)), config=CONFIG)[0] == 1
        checkpoints.save(2, make_state(2), config=CONFIG)
    assert_same(restore(tmp_path)[1], make_state(2))


def test_steps_must_ascend(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, make_state(2), config=CONFIG)
        assert checkpoints.latest_step() == 2
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"step {step} is not after the newest checkpoint, {tmp_path / '2'}"):
                checkpoints.save(step, make_state(step), config=CONFIG)


def test_unusable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        Checkpoints(tmp_path / "file")
