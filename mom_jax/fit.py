"""The loop around the train step: data, evaluation, checkpoints, reports, and what may go wrong.

Several processes run the same loop, each with its rows; the first alone reports.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mom_jax.checkpoint import Checkpoints
from mom_jax.config import ModelConfig, TrainConfig
from mom_jax.processes import Peers, console, is_first, on_first, raising
from mom_jax.reports import ProgressBar, RunLog, plot_loss_curves, plot_routing
from mom_jax.sharding import use_mesh
from mom_jax.stopping import StopSignal, Vote
from mom_jax.training import (
    Metrics,
    State,
    abstract_state,
    evaluate,
    jit_step,
    make_eval_step,
    make_state,
    make_train_step,
    place,
)

# Settings that a resumed run may change: they decide when it stops and reports, not what it computes.
FREE_SETTINGS = tuple(
    f"train.{name}"
    for name in (
        "stop_after", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_last", "keep_best",
        "preemption_deadline",
    )
)  # fmt: skip


class Fitted(NamedTuple):
    """The state after the last step, and the name of the signal that ended the run early, if one did."""

    state: State
    stopped_by: str | None


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
    ``routing.png``. SIGTERM and SIGINT, to any of the processes, save and end the run early, without the pictures.

    Args:
      mesh: over the devices of all processes.
      train_data: endless batches, of them this process's share (``row_share``); its iterator's state, the same in all
        processes, is saved with every checkpoint.
      valid_data: gives the held-out batches afresh at each call.
      run_config: the resolved configuration of the command, saved with every checkpoint.
      tokens_per_byte: of the text of "train" and of "valid", for bits per byte; None: leave them out.

    Raises:
      ValueError: the checkpoint is of another configuration. FloatingPointError: a loss, a gradient or the parameters
      after a step are not finite; the newest checkpoint is from before. PeerLost: working with another process failed.
    """
    directory = Path(directory)
    batches = iter(train_data)
    with use_mesh(mesh), Checkpoints(
        directory / "checkpoints", keep_last=train.keep_last, keep_best=train.keep_best
    ) as checkpoints:  # fmt: skip
        peers = Peers(checkpoints.kept)
        with raising(checkpoints.kept):
            wanted = abstract_state(model, train, mesh)
            restored = checkpoints.restore(wanted, config=run_config, data_iterator=batches, ignore=FREE_SETTINGS)
            done, state = restored or (0, make_state(model, train, mesh))
            if is_first():
                (directory / "config.json").write_text(json.dumps(run_config, indent=2) + "\n", encoding="utf-8")
            with (
                RunLog(directory, done if restored else None, tensorboard) if is_first() else nullcontext() as log,
                StopSignal(train.preemption_deadline, checkpoints.kept) as stop,
            ):
                loop = _Loop(model, train, mesh, valid_data, run_config, tokens_per_byte, checkpoints, log, batches, peers)
                fitted = loop.run(done, state, stop)

    def draw():
        plot_loss_curves(directory)
        if loop.load is not None and loop.load.size:
            layers = [layer for layer in range(model.num_layers) if layer not in model.attention.layers]
            plot_routing(loop.load, directory / "routing.png", layers=layers)

    if fitted.stopped_by is None:
        on_first(draw, "drawing", checkpoints.kept)
    return fitted


class _Loop:
    """The fit loop, with what it needs at hand."""

    def __init__(self, model, train, mesh, valid_data, run_config, tokens_per_byte, checkpoints, log, batches, peers):
        self.model, self.train, self.mesh, self.run_config = model, train, mesh, run_config
        self.valid_data, self.tokens_per_byte = valid_data, tokens_per_byte
        self.checkpoints, self.log, self.batches, self.peers = checkpoints, log, batches, peers
        self.train_step = jit_step(make_train_step(model, train), model, train, mesh)
        # Whole on every device, so that every process can read it.
        whole = NamedSharding(mesh, PartitionSpec())
        self.eval_step = jax.jit(make_eval_step(model, train.loss_chunk), out_shardings=whole)
        self.load: np.ndarray | None = None

    def run(self, done: int, state: State, stop: StopSignal) -> Fitted:
        train = self.train
        last = min(train.steps, train.stop_after or train.steps)
        if done >= last:
            print(f"nothing to do: the run already stands at step {done} of {last}", file=console())
            return Fitted(state, None)
        bar, saved, stopped_by, vote = None, done, None, Vote(stop, self.mesh)
        try:
            pending = cast = None
            for step in range(done + 1, last + 1):
                batch = place(next(self.batches), self.mesh)
                if bar is None:
                    bar = ProgressBar(last, batch["tokens"].size, done, console())
                start = functools.partial(self.train_step, state, batch)
                state, metrics = self.peers.start(start, "step", step)
                cast_before, cast = cast, self.peers.start(vote.cast, "the vote after step", step)
                # One step behind, so that the check of the loss does not hold the device up.
                if pending is not None:
                    self.report(*pending, bar)
                pending = step, metrics
                # Read once: a signal that comes during the evaluation or the save below ends the next step, or the one after
                # that if others must hear of it. At the last step there is nothing to cut short.
                outcome = functools.partial(vote.outcome, cast_before)
                stopped_by = self.peers.start(outcome, "the vote after step", step - 1) if step < last else None
                is_last = step == last or stopped_by is not None
                valid_loss = None
                if is_last or step % train.eval_every == 0 or step % train.checkpoint_every == 0:
                    self.report(*pending, bar)
                    pending = None
                if step == last or step % train.eval_every == 0:
                    valid_loss = self.evaluate(step, state)
                    bar.update(step, valid_loss=valid_loss)
                if is_last or step % train.checkpoint_every == 0:
                    self.checkpoints.save(
                        step, state, config=self.run_config, data_iterator=self.batches, held_out_loss=valid_loss
                    )
                    saved = step
                if pending is None:
                    bar.restart_clock()
                if is_last:
                    self.checkpoints.wait()
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
        metrics = self.peers.fetch(metrics, "step", step)
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
            self.record(step, "train", **record, **self.bits("train", metrics["loss"]), tokens_per_second=speed)

    def record(self, step: int, split: str, **metrics: Any) -> None:
        if self.log is not None:
            self.log.write(step, split, **metrics)

    def bits(self, split: str, loss) -> dict[str, float]:
        if self.tokens_per_byte is None:
            return {}
        return {"bits_per_byte": float(loss) * self.tokens_per_byte[split] / math.log(2)}

    def evaluate(self, step: int, state: State) -> float:
        batches = itertools.islice(self.valid_data(), self.train.eval_batches)
        placed = (place(batch, self.mesh) for batch in batches)
        fetch = functools.partial(self.peers.fetch, program="the evaluation at step", step=step)

        def eval_step(*arguments):
            start = functools.partial(self.eval_step, *arguments)
            return self.peers.start(start, "the evaluation at step", step)

        result = evaluate(eval_step, state, placed, fetch)
        self.load = result.pop("load")
        self.record(step, "valid", **result, **self.bits("valid", result["loss"]), load=self.load)
        return result["loss"]
