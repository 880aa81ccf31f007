"""Ending a run early by a signal: noted, agreed between all processes, and saved within a deadline."""

import os
import signal
import threading
from collections.abc import Callable
from functools import cache

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mom_jax.processes import end_now

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 2.0
"""Seconds that Python has to end by a second signal in its own way, before it is ended where it stands."""


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered, so that the loop can save and end; a second one ends at once.

    Args:
      deadline: seconds after a SIGTERM at which the process ends all the same; None: never.
      kept: says which checkpoint a run can continue from.
    """

    def __init__(self, deadline: float | None = None, kept: Callable[[], str] = str):
        self._deadline, self._kept, self._done = deadline, kept, threading.Event()

    def __enter__(self):
        self.name: str | None = None
        self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Python calls handlers between two of its instructions; this hears of a signal during a step or a save, too.
        self._heard, self._told = os.pipe()
        os.set_blocking(self._told, False)
        self._old_wakeup = signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def _note(self, number, _frame):
        # Not the other signal's handler, too: that signal may be waiting behind a compilation, and Python cannot deliver it
        # to a handler that is gone.
        signal.signal(number, self._old[number])
        if self.name is not None:
            signal.raise_signal(number)
        self.name = signal.Signals(number).name

    def _wait(self):
        count = 0
        while number := os.read(self._heard, 1):
            count += 1
            if count > 1:
                self._end_after(GRACE, number[0], "a second signal ends the run")
            elif number[0] == signal.SIGTERM and self._deadline is not None:
                late = f"the run has not saved within {self._deadline:g} s and ends"
                threading.Thread(target=self._end_after, args=(self._deadline, number[0], late), daemon=True).start()
        os.close(self._heard)

    def _end_after(self, seconds: float, number: int, why: str):
        if not self._done.wait(seconds):
            end_now(f"{signal.Signals(number).name}: {why}; {self._kept()}", 128 + number)

    def __exit__(self, *_):
        self._done.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._told)


class Vote:
    """Whether any process has noted a signal: one number a device, the largest of which all learn.

    It runs after a step on the devices, like another metric, and is read when the next step is under way: no host waits for
    it, and all stop after the same step.
    """

    def __init__(self, stop: StopSignal, mesh: Mesh):
        self._stop, self._alone = stop, jax.process_count() == 1
        by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(lambda ballots: ballots.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

        @cache
        def ballots(number: int) -> jax.Array:
            return jax.make_array_from_callback((mesh.size,), by_device, lambda _: np.full(1, number, np.int32))

        self._ballots = ballots

    def cast(self) -> jax.Array | None:
        """The largest number of a signal, 0 for none; None where there is nobody to agree with."""
        if self._alone:
            return None
        return self._largest(self._ballots(0 if self._stop.name is None else signal.Signals[self._stop.name].value))

    def outcome(self, cast: jax.Array | None) -> str | None:
        """The name of the signal that ends the run by a vote ``cast`` a step ago, or alone by what was noted until now."""
        if self._alone:
            return self._stop.name
        number = 0 if cast is None else int(cast)
        return signal.Signals(number).name if number else None
