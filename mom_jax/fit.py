"""The loop around the train step: data, evaluation, checkpoints, reports, and what may go wrong."""

import itertools
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from mom_jax.checkpoint import Checkpoints
from mom_jax.config import ModelConfig, TrainConfig
from mom_jax.reports import ProgressBar, RunLog, plot_loss_curves, plot_routing
from mom_jax.sharding import use_mesh
from mom_jax.training import (
    Metrics,
    State,
    abstract_state,
    evaluate,
    make_eval_step,
    make_state,
    make_train_step,
    place,
)

# Settings that a resumed run may change: they decide when it stops and reports, not what it computes.
FREE_SETTINGS = tuple(
    f"train.{name}"
    for name in ("stop_after", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last", "keep_best")
)


class Fitted(NamedTuple):
    """The state after the last step, and the name of the signal that ended the run early, if one did."""

    state: State
    stopped_by: str | None


class _StopSignal:
    """Notes SIGTERM and SIGINT while it is entered, so that the loop can save and end; a second one ends at once."""

    def __enter__(self):
        self.name: str | None = None
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _frame):
        # Not the other signal's handler, too: that signal may be waiting behind a compilation, and Python cannot deliver it
        # to a handler that is gone.
        signal.signal(number, self._old[number])
        if self.name is not None:
            signal.raise_signal(number)
        self.name = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def fit(
    directory: str | Path,
    model: ModelConfig,
    train: TrainConfig,
    mesh: Mesh,
    train_data: grain.IterDataset,
    valid_data: Callable[[], Iterable[dict[str, np.ndarray]]],
    *,
    run_config: dict[str, Any],
    tokens_per_byte: dict[str, float] | None = None,
    tensorboard: bool = True,
) -> Fitted:
    """Trains, evaluates, saves and reports; continues exactly where the newest whole checkpoint in ``directory`` stands.

    Writes ``config.json``, ``checkpoints/``, ``metrics.jsonl``, TensorBoard events and, at the end, ``loss_curves.png`` and
    ``routing.png``. SIGTERM and SIGINT save and end the run early, without the pictures.

    Args:
      train_data: endless batches; its iterator's state is saved with every checkpoint.
      valid_data: gives the held-out batches afresh at each call.
      run_config: the resolved configuration of the command, saved with every checkpoint.
      tokens_per_byte: of the text of "train" and of "valid", for bits per byte; None: leave them out.

    Raises:
      NotImplementedError: there are several processes. ValueError: the checkpoint is of another configuration.
      FloatingPointError: a loss, a gradient or the parameters
      after a step are not finite; the newest checkpoint is from before.
    """
    if jax.process_count() > 1:
        raise NotImplementedError("training over several processes: logs and stop signals are not yet agreed between them")
    directory = Path(directory)
    batches = iter(train_data)
    with use_mesh(mesh), Checkpoints(
        directory / "checkpoints", keep_last=train.keep_last, keep_best=train.keep_best
    ) as checkpoints:  # fmt: skip
        restored = checkpoints.restore(
            abstract_state(model, train, mesh), config=run_config, data_iterator=batches, ignore=FREE_SETTINGS
        )
        done, state = restored or (0, make_state(model, train, mesh))
        (directory / "config.json").write_text(json.dumps(run_config, indent=2) + "\n", encoding="utf-8")
        with RunLog(directory, done if restored else None, tensorboard) as log, _StopSignal() as stop:
            loop = _Loop(model, train, mesh, valid_data, run_config, tokens_per_byte, checkpoints, log, batches)
            fitted = loop.run(done, state, stop)
    if fitted.stopped_by is not None:
        return fitted
    plot_loss_curves(directory)
    if loop.load is not None and loop.load.size:
        layers = [layer for layer in range(model.num_layers) if layer not in model.attention.layers]
        plot_routing(loop.load, directory / "routing.png", layers=layers)
    return fitted


class _Loop:
    """The fit loop, with what it needs at hand."""

    def __init__(self, model, train, mesh, valid_data, run_config, tokens_per_byte, checkpoints, log, batches):
        self.model, self.train, self.mesh, self.run_config = model, train, mesh, run_config
        self.valid_data, self.tokens_per_byte = valid_data, tokens_per_byte
        self.checkpoints, self.log, self.batches = checkpoints, log, batches
        self.train_step = jax.jit(make_train_step(model, train), donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(model, train.loss_chunk))
        self.load: np.ndarray | None = None

    def run(self, done: int, state: State, stop: _StopSignal) -> Fitted:
        train = self.train
        last = min(train.steps, train.stop_after or train.steps)
        if done >= last:
            print(f"nothing to do: the run already stands at step {done} of {last}", file=sys.stderr)
            return Fitted(state, None)
        bar, saved, stopped_by = None, done, None
        try:
            pending = None
            for step in range(done + 1, last + 1):
                batch = next(self.batches)
                if bar is None:
                    bar = ProgressBar(last, batch["tokens"].size * jax.process_count(), done)
                state, metrics = self.train_step(state, place(batch, self.mesh))
                # One step behind, so that the check of the loss does not hold the device up.
                if pending is not None:
                    self.report(*pending, bar)
                pending = step, metrics
                # Read once: a signal that comes during the evaluation or the save below ends the next step. At the last
                # step there is nothing to cut short.
                stopped_by = stop.name if step < last else None
                is_last = step == last or stopped_by is not None
                valid_loss = None
                if is_last or step % train.eval_every == 0 or step % train.checkpoint_every == 0:
                    self.report(*pending, bar)
                    pending = None
                if step == last or step % train.eval_every == 0:
                    valid_loss = self.evaluate(step, state)
                    bar.update(step, valid_loss=valid_loss)
                if is_last or step % train.checkpoint_every == 0:
                    self.save(step, state, valid_loss)
                    saved = step
                if pending is None:
                    bar.restart_clock()
                if stopped_by is not None:
                    bar.write(f"{stopped_by}: saved step {step}; the same command continues from there")
                    break
        except FloatingPointError as error:
            kept = f"the checkpoint of step {saved} is kept" if saved else "there was no checkpoint yet"
            raise FloatingPointError(f"{error}; {kept}") from None
        finally:
            if bar is not None:
                bar.close()
        return Fitted(state, stopped_by)

    def report(self, step: int, metrics: Metrics, bar: ProgressBar) -> None:
        """Checks and records a finished step."""
        metrics = jax.device_get(metrics)
        for name in ("loss", "grad_norm", "param_norm"):
            if not np.isfinite(metrics[name]):
                raise FloatingPointError(f"step {step}: the {name} is {metrics[name]}")
        bar.update(step, loss=float(metrics["loss"]))
        if step % self.train.log_every == 0 or step == 1:
            record = {name: value for name, value in metrics.items() if name != "load"}
            memory = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
            if "peak_bytes_in_use" in memory:
                record["peak_gib"] = memory["peak_bytes_in_use"] / 2**30
            speed = bar.tokens_per_second
            self.log.write(step, "train", **record, **self.bits("train", metrics["loss"]), tokens_per_second=speed)

    def bits(self, split: str, loss) -> dict[str, float]:
        if self.tokens_per_byte is None:
            return {}
        return {"bits_per_byte": float(loss) * self.tokens_per_byte[split] / math.log(2)}

    def evaluate(self, step: int, state: State) -> float:
        batches = itertools.islice(self.valid_data(), self.train.eval_batches)
        result = evaluate(self.eval_step, state, (place(batch, self.mesh) for batch in batches))
        self.load = result.pop("load")
        self.log.write(step, "valid", **result, **self.bits("valid", result["loss"]), load=self.load)
        return result["loss"]

    def save(self, step: int, state: State, held_out_loss: float | None) -> None:
        self.checkpoints.save(
            step, state, config=self.run_config, data_iterator=self.batches, held_out_loss=held_out_loss
        )  # fmt: skip


