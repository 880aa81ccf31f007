"""Checkpoints of a run: Orbax's CheckpointManager, taught to refuse what does not fit and to skip what is damaged.

    DIRECTORY/STEP/state/           parameters, optimiser state, step, random key, as Orbax writes them
    DIRECTORY/STEP/data_iterator/   JSON: where the Grain iterator stands, the same for any number of processes
    DIRECTORY/STEP/run/metadata     JSON: the resolved config and the held-out loss
    DIRECTORY/STEP/checksums.json   SHA-256 of every file in these folders

Orbax writes into STEP.orbax-checkpoint-tmp and renames it when all is there, the checksums last, and we have seen to it that
it is on disk, so a save that was killed, or lost its power, never looks like a checkpoint. The checksums are ours:
TensorStore returns arrays with flipped bits without a word.
Several processes share one directory, on a local or mounted file system: each writes its part of the arrays, the first
the rest. It alone judges what is whole, and all go by that; any other number of processes may restore.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mom_jax.config import require
from mom_jax.files import CHECKSUMS, checksums_of, fsync_all
from mom_jax.processes import PeerLost, on_first, waiting
from mom_jax.weights import by_name

ITEM_FILES = "*/*"  # of any depth, as fnmatch reads it; not those at the top, where Orbax writes on after the checksums
RUN = "run/metadata"
DATA_ITERATOR = "data_iterator"
TEMPORARY = ".orbax-checkpoint-tmp"
LONGEST_SAVE = 10**8
"""Seconds: no limit. Orbax measures them on the wall clock, and a save must not fail because somebody sets that."""


class Checkpoints(AbstractContextManager):
    """The checkpoints of one run in one directory, saved asynchronously; leaving the context waits for the last save.

    A checkpoint is kept while it is among the newest ``keep_last`` or among the ``keep_best`` of lowest held-out loss.
    Only one run may hold a directory: what a killed save left there is removed, with a warning. All processes of a run
    make the same calls. After ``PeerLost`` nothing is waited for: the others cannot finish their part.

    Raises ``OSError`` naming the path if ``directory`` cannot be made or written.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, keep_best: int = 1):
        require(keep_last > 0, "keep_last", keep_last, "it must be > 0")
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK):
            raise PermissionError(f"the checkpoint directory {self.directory} cannot be written")
        self._policy, self._saving = _NewestAndBest(keep_last, keep_best), None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
            async_options=ocp.options.AsyncOptions(
                LONGEST_SAVE, post_finalization_callback=self._write_checksums, create_directories_asynchronously=False
            ),
        )
        with waiting("opening the checkpoints", self.kept):
            self._policy.losses |= on_first(self._survey)
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def _survey(self) -> dict[int, float | None]:
        """The held-out losses of the checkpoints that are there; warns of the remains of others."""
        for path in self.directory.glob(f"*{TEMPORARY}*"):
            warnings.warn(f"removing {path}, left by a save that did not finish", stacklevel=4)
        paths = {step: self.directory / str(step) for step in _steps(self.directory)}
        return {step: _read_run(path)["held_out_loss"] for step, path in paths.items() if _damage(path, RUN) is None}

    def save(
        self, step: int, state: Any, *, config: dict, data_iterator: Any = None, held_out_loss: float | None = None
    ) -> None:
        """Copy ``state``, a pytree of arrays and typed random keys, to the host and write it in the background.

        On return ``state`` may be donated and ``data_iterator`` (Grain's) advanced. ``config`` is a nested dict that
        JSON can hold. Raises ``ValueError`` if ``step`` is not after the newest checkpoint's. What goes wrong in the
        background is raised by the next ``save``, ``wait`` or ``close``.
        """
        self.wait()
        newest = self.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(f"step {step} is not after the newest checkpoint, {self.directory / str(newest)}")
        held_out_loss = None if held_out_loss is None else float(held_out_loss)
        items = {
            "state": ocp.args.StandardSave(state),
            "run": ocp.args.JsonSave({"config": config, "held_out_loss": held_out_loss}),
        }
        if data_iterator is not None:
            items[DATA_ITERATOR] = ocp.args.JsonSave(data_iterator.get_state())
        self._policy.losses[step] = held_out_loss
        self._saving = step
        with self._waiting_for_save():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self,
        abstract_state: Any,
        *,
        config: dict | None,
        data_iterator: Any = None,
        step: int | None = None,
        ignore: Sequence[str] = (),
    ) -> tuple[int, Any] | None:
        """Return ``(step, state)`` of the newest whole checkpoint, or of ``step``; None if the directory has none.

        ``abstract_state`` is the state with ``jax.ShapeDtypeStruct`` leaves; arrays are born with their shardings,
        whatever they were saved with. ``data_iterator`` is set to where it stood. ``ignore`` names config fields, or
        sections, that may differ; ``config=None`` accepts any. Damaged checkpoints on the way are warned of and renamed
        to STEP.damaged, so that their steps can be saved again.

        Raises:
            ValueError: config or arrays differ from the checkpoint's; every difference is listed.
            FileNotFoundError: there is no checkpoint of ``step``.
            RuntimeError: there are checkpoints, but all of them are damaged.
        """
        self.wait()
        with waiting("restoring the checkpoint", self.kept):
            if on_first(lambda: step is None and not _steps(self.directory)):
                return None
            path, damaged = on_first(lambda: _newest_whole(self.directory, step))
            if config is not None:
                saved = _read_run(path)["config"]
                remedy = "\nchoose another --output, or delete this run"
                _refuse_differences(f"the config of {path} differs", _fields(saved), _fields(config), ignore, remedy)
            _refuse_differences(f"the state in {path} differs", _types(_stored(path)), _types(abstract_state))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            restored = self._manager.restore(int(path.name), args=args)
            if data_iterator is not None:
                # Orbax's name, or Grain's own in checkpoints of before there were several processes.
                names = ("metadata", "process_0-of-1.json")
                (file,) = (file for file in (path / DATA_ITERATOR).iterdir() if file.name in names)
                data_iterator.set_state(json.loads(file.read_text()))
            self._set_aside(damaged)
            return int(path.name), restored["state"]

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, damaged or being saved though it may be; None if there is none."""
        return self._manager.latest_step()

    def kept(self) -> str:
        """What a run that ends now can continue from, for people: the newest checkpoint that is not being saved."""
        steps = _steps(self.directory)
        if not steps:
            return "there was no checkpoint yet"
        return f"the checkpoint of step {steps[-1]} is kept; the same command continues from there"

    def wait(self) -> None:
        """Wait until the last save is on disk; raise what went wrong in it."""
        with self._waiting_for_save():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as ``wait`` does and end the background threads."""
        with self._waiting_for_save():
            self._manager.close()

    def _waiting_for_save(self) -> AbstractContextManager:
        return waiting(f"the save of step {self._saving}", self.kept)

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is not PeerLost:
            self.close()

    def _write_checksums(self) -> None:
        """Orbax calls this on process 0 when all processes have written their files, just before the rename."""
        (path,) = self.directory.glob(f"{self._saving}{TEMPORARY}*")
        (path / CHECKSUMS).write_text(json.dumps(checksums_of(path, ITEM_FILES), indent=1))
        fsync_all(path)

    def _set_aside(self, damaged: Iterable[Path]) -> None:
        if jax.process_index() == 0:
            for path in damaged:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        ocp.multihost.sync_global_processes("mom_jax damaged checkpoints set aside")
        self._manager.reload()


def find_step(directory: str | os.PathLike, best: bool = False) -> int:
    """Return the step of the newest whole checkpoint, or of the one with the lowest held-out loss.

    Raises ``FileNotFoundError`` if there is no checkpoint, or for ``best`` no whole one with a held-out loss, and
    ``RuntimeError`` if all are damaged.
    """
    directory = Path(directory).absolute()
    if not best:
        return int(_newest_whole(directory, None)[0].name)
    whole = [step for step in _steps(directory) if _damage(directory / str(step), ITEM_FILES) is None]
    losses = {step: _read_run(directory / str(step))["held_out_loss"] for step in whole}
    rated = [step for step, loss in losses.items() if loss is not None and not math.isnan(loss)]
    if not rated:
        raise FileNotFoundError(f"{directory} has no whole checkpoint with a held-out loss")
    return min(rated, key=losses.get)


def load_config(directory: str | os.PathLike, step: int | None = None) -> dict:
    """Return the config in the newest checkpoint, or that of ``step``.

    Raises ``FileNotFoundError`` if there is no checkpoint and ``RuntimeError`` if the config is damaged in all.
    """
    path, _ = _newest_whole(Path(directory).absolute(), step, RUN)
    return _read_run(path)["config"]


@dataclass
class _NewestAndBest:
    """A PreservationPolicy of Orbax, whose own BestN reads metrics from files that may be damaged."""

    keep_last: int
    keep_best: int
    losses: dict[int, float | None] = field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        rated = [step for step in steps if self.losses.get(step) is not None and not math.isnan(self.losses[step])]
        best = sorted(rated, key=self.losses.get)[: self.keep_best]
        return [step in best or step in steps[-self.keep_last :] for step in steps]


def _steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint, damaged or not, ascending."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _newest_whole(directory: Path, step: int | None, files: str = ITEM_FILES) -> tuple[Path, list[Path]]:
    """The newest checkpoint, or that of ``step``, whose ``files`` are whole, and the newer ones whose files are not."""
    steps = [saved for saved in _steps(directory) if step in (None, saved)]
    if not steps:
        raise FileNotFoundError(f"{directory} has no checkpoint" + ("" if step is None else f" of step {step}"))
    damages = {}
    for path in (directory / str(step) for step in reversed(steps)):
        damage = _damage(path, files)
        if damage is None:
            return path, list(damages)
        warnings.warn(f"skipping the damaged checkpoint {path}: {damage}", stacklevel=3)
        damages[path] = damage
    listing = "".join(f"\n  {path}: {damage}" for path, damage in damages.items())
    raise RuntimeError(f"no whole checkpoint; move the damaged away to start anew:{listing}")


def _damage(path: Path, files: str) -> str | None:
    """What is wrong with the files of the checkpoint ``path`` that match the pattern ``files``; None: nothing."""
    try:
        saved = json.loads((path / CHECKSUMS).read_text())
        found = checksums_of(path, files)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    names = sorted(name for name in saved.keys() | found.keys() if fnmatchcase(name, files))
    changed = [name for name in names if saved.get(name) != found.get(name)]
    return f"missing, added or changed: {', '.join(changed)}" if changed else None


def _read_run(path: Path) -> dict:
    return json.loads((path / RUN).read_text())


def _stored(path: Path) -> Any:
    """The saved state as nested containers with a shape and a dtype at each leaf."""
    return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def _fields(config: dict) -> dict[str, Any]:
    """Values by dotted name, as they come back from JSON (tuples as lists)."""
    return by_name(json.loads(json.dumps(config)), is_leaf=lambda value: not isinstance(value, dict))


def _types(arrays: Any) -> dict[str, str]:
    """Dtypes and shapes by dotted name, random keys as the raw data that Orbax stores."""

    def describe(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return f"{x.dtype}{list(x.shape)}"

    return {name: describe(x) for name, x in by_name(arrays).items()}


def _refuse_differences(what: str, saved: dict, wanted: dict, ignore: Sequence[str] = (), remedy: str = "") -> None:
    differences = [
        f"\n  {name}: checkpoint {saved.get(name, 'absent')}, command {wanted.get(name, 'absent')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name, "absent") != wanted.get(name, "absent")
        and not any(f"{name}.".startswith(f"{free}.") for free in ignore)
    ]
    if differences:
        raise ValueError(what + ":" + "".join(differences) + remedy)
