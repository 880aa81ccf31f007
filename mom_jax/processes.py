"""Several processes that train one model, each with its own devices, on one host or many: how they meet and how they end.

``jax.distributed`` brings them together, XLA's collectives carry the numbers, Orbax the checkpoints. Here is what is left:
which process reads which rows, what only one of them does, and that none waits for ever for another. A process that dies
takes all with it, and so does one that is stuck: those that wait for it (:func:`waiting`) end after ``peer_timeout`` with a
message of ours; where process 0 died, or nobody waits, JAX itself ends them (SIGABRT, "the JAX distributed service detected
fatal errors"). The same commands, on as many processes as there are then, continue from the last checkpoint.
"""

import contextlib
import functools
import os
import pickle
import re
import secrets
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mom_jax.config import require
from mom_jax.sharding import spec

MARGIN = 15
"""Seconds that JAX's own limits, which abort without saying what to do, come after ours."""
SLOW = 600
"""Seconds more for what some processes do faster than others: the start, restoring, compiling, saving, the end."""
SEEN = 30
"""Seconds in which a shared file system shows what another process has written."""


class PeerLost(ConnectionError):
    """A collective failed: most likely another process has ended."""


@dataclass(frozen=True)
class DistributedConfig:
    """How this process finds the others. Without any of it there are no others."""

    auto: bool = False
    """Whether the environment says it all: Slurm, Cloud TPU, Open MPI or Kubernetes."""
    coordinator: str | None = None
    """HOST:PORT where process 0 listens; the same for all processes."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    join_timeout: int = 300
    """Seconds within which all processes must have started."""
    peer_timeout: int = 300
    """Seconds that a step may keep this process waiting for the others; the start and saves have ten minutes more."""

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        for name, value in given.items():
            needed = any(other is not None for other in given.values()) and not self.auto
            require(value is not None or not needed, f"DistributedConfig.{name}", value, f"{', '.join(given)} go together")
            require(value is None or not self.auto, f"DistributedConfig.{name}", value, "auto finds it; give only one")
        for name in ("join_timeout", "peer_timeout"):
            require(getattr(self, name) > 0, f"DistributedConfig.{name}", getattr(self, name), "it must be > 0")
        if self.coordinator is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16,
            "DistributedConfig.coordinator", self.coordinator, "it must be HOST:PORT, such as node-0:12345",
        )  # fmt: skip
        require(self.num_processes > 0, "DistributedConfig.num_processes", self.num_processes, "it must be > 0")
        require(
            0 <= self.process_id < self.num_processes,
            "DistributedConfig.process_id", self.process_id, f"it must be in [0, {self.num_processes})",
        )  # fmt: skip


_peer_timeout: float | None = None  # of the config that this process joined the others with; None: it waits for ever


def join(config: DistributedConfig) -> None:
    """Wait for the other processes, if ``config`` names any; to be called before anything uses a device.

    From then on whatever keeps this process waiting for others has ``peer_timeout``: see :func:`waiting`.

    Raises ``ValueError`` if ``auto`` finds no cluster, ``OSError`` if process 0 cannot listen. Ends the process if not all
    have come within ``join_timeout``.
    """
    if not config.auto and config.coordinator is None:
        return
    which = "" if config.auto else f" {config.process_id} of {config.num_processes} at {config.coordinator}"

    def late():
        found = "" if config.auto else _unknown(config.coordinator)
        together = f"not all processes came together within {config.join_timeout} s{found}"
        return f"process{which}: {together}; see the logs of the others, and whether each id was started once"

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself; see stopping.py
    if config.process_id == 0:
        _require_free(config.coordinator)
    try:
        with patience(config.join_timeout, late):
            jax.distributed.initialize(
                config.coordinator, config.num_processes, config.process_id,
                cluster_detection_method=None if config.auto else "deactivate",
                initialization_timeout=config.join_timeout + MARGIN,
                heartbeat_timeout_seconds=config.peer_timeout + MARGIN, shutdown_timeout_seconds=SLOW,
            )  # fmt: skip
    except ValueError as error:
        require(not config.auto, "DistributedConfig.auto", True, f"JAX recognises no cluster here ({error})")
        raise
    except jax.errors.JaxRuntimeError as error:
        raise OSError(f"process{which} cannot join the others: {_first_line(error)}") from error
    global _peer_timeout
    _peer_timeout = config.peer_timeout
    if is_first():
        print(f"{jax.process_count()} processes, {jax.device_count()} devices in all", file=sys.stderr, flush=True)


def _require_free(coordinator: str) -> None:
    """``OSError`` if its port is taken: JAX then fails in ways that differ from time to time, crashes among them."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise OSError(f"process 0 cannot listen at {coordinator}: {error.strerror}") from error


def _unknown(coordinator: str) -> str:
    """That its host is not found, if so: said only when time is up, since Kubernetes makes names known late."""
    host = coordinator.rpartition(":")[0]
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except OSError as error:
        return f": the host {host} is not found ({error.strerror})"
    return ""


def is_first() -> bool:
    """Whether this is the process that writes: logs, pictures, texts."""
    return jax.process_index() == 0


def console() -> TextIO:
    """Where this process reports its progress: stderr, or nowhere."""
    return sys.stderr if is_first() else _nowhere()


@functools.cache
def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def on_first[Value](function: Callable[[], Value], what: str = "the start", kept: Callable[[], str] | None = None) -> Value:
    """What ``function()`` gives on process 0, in every process; what it raises there is raised in every process.

    Meanwhile the others are :func:`waiting` for ``what``.
    """
    if jax.process_count() == 1:
        return function()
    outcome = b""
    if is_first():
        try:
            outcome = pickle.dumps((function(), None))
        except Exception as error:
            try:
                outcome = pickle.dumps((None, error))
            except Exception:  # the others wait for something to be raised
                outcome = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    with waiting(what, kept):
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(outcome))))
        data = np.frombuffer(outcome.ljust(size, b"\0"), np.uint8)
        value, error = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8).tobytes())
    if error is not None:
        raise error
    return value


def require_same(settings: dict[str, Any], but: Sequence[str] = ()) -> None:
    """Settings and tables of them with which all processes must have been started. Raises ``ValueError`` in all if not.

    Args:
      but: settings, such as "data.path", and whole tables that may differ: where files lie may from host to host.
    """
    if jax.process_count() == 1:
        return
    own = {}
    for name, value in settings.items():
        own |= {f"{name}.{field}": x for field, x in value.items()} if isinstance(value, dict) else {name: value}
    own = {name: x for name, x in own.items() if name not in but and name.split(".")[0] not in but}
    first = on_first(lambda: own)
    me = f"process {jax.process_index()}"
    found = [f"{me} has {name} = {x!r}, process 0 {first.get(name)!r}" for name, x in own.items() if x != first.get(name)]
    message = f"{'; '.join(found)}: start all with the same but for their ids"
    _require_everywhere(not found, "other settings than process 0", message)


def require_shared(directory: Path) -> None:
    """That what process 0 writes into the directory is seen by all. Raises ``ValueError`` in all processes if not."""
    if jax.process_count() == 1:
        return
    probe, written = directory / ".shared", secrets.token_hex()

    def write():
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text(written)
        return written

    written, until = on_first(write), time.monotonic() + SEEN
    while not (is_seen := probe.is_file() and probe.read_text() == written) and time.monotonic() < until:
        time.sleep(0.1)
    try:
        _require_everywhere(
            is_seen, f"an --output {directory} of its own",
            f"process {jax.process_index()} does not see what process 0 writes into {directory}: all must share --output",
        )  # fmt: skip
    finally:
        on_first(lambda: probe.unlink(missing_ok=True))


def _require_everywhere(is_right: bool, what: str, message: str) -> None:
    """``ValueError`` with ``message`` in the processes where it is not right, and with their number in the others."""
    with waiting("the start"):
        wrong = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.bool_(is_right)), bool)).tolist()
    if wrong:
        raise ValueError(message if not is_right else f"process {wrong[0]} has {what}: see its log")


@functools.cache
def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of the rows of a batch cut in ``count`` equal parts this process needs the one of this index.

    Processes that split only what is not rows (tokens, memories, heads) read the same part. The parts, put together, are the
    batch of a single process, in its order where the mesh lists the devices process by process, as it does but on TPUs,
    whose topology may shuffle the parts.

    Raises ``ValueError`` if a process has no device in the mesh, or two share some of their rows but not all.
    """
    blocks = defaultdict(set)
    for device, (rows,) in NamedSharding(mesh, spec("b")).devices_indices_map((mesh.size,)).items():
        blocks[device.process_index].add(rows.start or 0)
    require(
        len(blocks) == jax.process_count(),
        "the number of mesh devices", mesh.size, f"all {jax.device_count()} devices of all processes must take part",
    )  # fmt: skip
    shares = sorted({tuple(sorted(own)) for own in blocks.values()})
    require(
        len({len(share) for share in shares}) == 1 and len(set().union(*shares)) == sum(map(len, shares)),
        "the mesh", dict(mesh.shape), "the rows of a process must be those of another or all different: let mesh.memory * "
        f"mesh.tensor * mesh.sequence divide the {jax.local_device_count()} devices of a process, or be a multiple of them",
    )  # fmt: skip
    return shares.index(tuple(sorted(blocks[jax.process_index()]))), len(shares)


@contextlib.contextmanager
def patience(seconds: float | None, message: str | Callable[[], str], status: int = 1) -> Iterator[None]:
    """Ends the process with ``message`` and ``status`` if the block lasts longer; None: it may.

    A thread does it: the block may well be stuck where no exception reaches it. What the thread leaves undone is what a
    killed process would: checkpoints are whole or not there.
    """
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, lambda: end_now(message if isinstance(message, str) else message(), status))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_now(message: str, status: int) -> NoReturn:
    """Prints ``message`` and ends the process, whatever its other threads do or hold."""
    os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
    os._exit(status)


@contextlib.contextmanager
def waiting(what: str, kept: Callable[[], str] | None = None, *, slow: bool = True) -> Iterator[None]:
    """For a block that needs the other processes: it waits for them, but not for ever.

    Ends this process if the block lasts longer than the ``peer_timeout`` that it joined with, and SLOW seconds if ``slow``.

    Args:
      what: is waited for.
      kept: says which checkpoint a run can continue from.

    Raises ``PeerLost`` if working with the others fails.
    """
    limit = None
    if jax.process_count() > 1 and _peer_timeout is not None:
        # Process 0 last: when it ends, JAX aborts the others before they have said why.
        limit = _peer_timeout + SLOW * slow + 2.0 * is_first()

    def message():
        late = f"{what} has not ended within {limit:g} s: another process has died, or is late"
        return _lost(f"{late} (--distributed.peer-timeout); see its log", kept)

    with patience(limit, message), raising(kept):
        yield


@contextlib.contextmanager
def raising(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns the failure of a collective into ``PeerLost``."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # One that fails as it is started is a ValueError to jaxlib; its messages begin with a status, such as UNKNOWN.
        is_ours = isinstance(error, ValueError) and not re.match("[A-Z_]+: ", str(error))
        if is_ours or jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise PeerLost(_lost(f"working with the others failed: {_first_line(error)}; see their logs", kept)) from error


def _lost(why: str, kept: Callable[[], str] | None) -> str:
    message = f"process {jax.process_index()} of {jax.process_count()}: {why}"
    return message if kept is None else f"{message}; {kept()}"


class Peers:
    """The other processes as the loop sees them: what each program makes it wait for them, slowly when it is compiled.

    Args:
      kept: says which checkpoint a run can continue from.
    """

    def __init__(self, kept: Callable[[], str]):
        self._kept, self._compiled = kept, set()

    def start(self, run: Callable[[], Any], program: str, step: int) -> Any:
        """``run()``, which starts ``program`` on the devices; it may wait there, for a compilation or for the others."""
        return self._await(run, program, step, ("start", program))

    def fetch(self, values: Any, program: str, step: int) -> Any:
        """``jax.device_get`` of what ``program`` computes at ``step``."""
        return self._await(lambda: jax.device_get(values), program, step, program)

    def _await(self, result, program, step, key):
        is_first_time = key not in self._compiled
        self._compiled.add(key)
        with waiting(f"{program} {step}", self._kept, slow=is_first_time):
            return result()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
