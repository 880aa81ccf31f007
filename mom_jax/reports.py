"""What a training run writes for people: metrics, a progress bar and pictures.

Everything here runs on the host and takes plain numbers or arrays. matplotlib and tensorboardX are imported where they
are used, so that a machine without them can still train.
"""

import importlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TextIO

import numpy as np
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
SPEED_WINDOW = 30.0
"""Seconds over which the progress bar measures tokens per second."""
PLAIN_LINE_EVERY = 15.0
"""Seconds between the progress bar's lines where there is no terminal."""
TRAIN_COLOUR, VALID_COLOUR = "#2f6f9f", "#d1495b"


def _import(module: str, purpose: str) -> ModuleType:
    """The imported ``module``, or ``ModuleNotFoundError`` that says what to install for ``purpose``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(f"{purpose} need the package {package}: pip install {package}") from error


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` in ``directory``, in the order written; none if there is no such file.

    A last line without its end, left by a run that was killed while writing, is dropped. Any other line that is not
    JSON raises ``ValueError`` naming the place.
    """
    path = Path(directory) / METRICS_FILE
    if not path.exists():
        return []
    records = []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {line!r}") from error
    return records


class RunLog:
    """Appends a run's metrics to ``metrics.jsonl`` and to TensorBoard's event files in ``directory``.

    ``resume_step`` is the last step of the checkpoint that the run continues: records of later steps are dropped, since
    the run makes them again. None begins anew. ``tensorboard=False`` leaves the event files out. Only one process of a
    run may hold a log.
    """

    def __init__(self, directory: str | os.PathLike, resume_step: int | None = None, tensorboard: bool = True):
        last_step = -1 if resume_step is None else resume_step
        self._events = None
        if tensorboard:
            tensorboardx = _import("tensorboardX", "TensorBoard events")
            self._events = tensorboardx.SummaryWriter(str(directory), purge_step=last_step + 1)
        path = Path(directory) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(directory) if record["step"] <= last_step]
        # A crash while rewriting must not cost the history: the new file takes the old one's place only when complete.
        rewritten = path.with_suffix(".jsonl.tmp")
        with rewritten.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        rewritten.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, split: Literal["train", "valid"], **metrics: Any) -> None:
        """Record ``metrics``, Python numbers or arrays, of ``step``; scalars also go to TensorBoard as ``split/name``.

        Floats keep every digit, so equal losses in the file are losses equal to the bit.
        """
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "split": split} | plain) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in plain.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class ProgressBar:
    """A run's step, losses, tokens per second and time left: a bar on a terminal, now and then a line elsewhere.

    ``tokens_per_second`` (None until two steps are done) is measured over the last half minute of updates. The clock
    starts with the first update, so that the compilation in the first step does not count.
    """

    def __init__(self, total_steps: int, tokens_per_step: int, start_step: int = 0, file: TextIO | None = None):
        self.tokens_per_second: float | None = None
        self._total, self._tokens_per_step = total_steps, tokens_per_step
        self._file = file or sys.stderr
        self._losses: dict[str, float] = {}
        self._marks: deque[tuple[float, int]] = deque()  # (time, step) of the updates inside the window
        self._next_line = 0.0
        self._bar = None
        if self._file.isatty():
            bar_format = "{percentage:3.0f}%|{bar:20}| step {n}/{total}{desc}"
            self._bar = tqdm(total=total_steps, initial=start_step, file=self._file, bar_format=bar_format)

    def update(self, step: int, loss: float | None = None, valid_loss: float | None = None) -> None:
        """``step`` steps are done; a loss that is not given stays as it was."""
        self._losses |= {name: value for name, value in (("loss", loss), ("held-out", valid_loss)) if value is not None}
        now = time.monotonic()
        self._measure(now, step)
        text = "".join(f" · {name} {value:.4f}" for name, value in self._losses.items())
        if self.tokens_per_second:
            seconds_left = (self._total - step) * self._tokens_per_step / self.tokens_per_second
            text += f" · {self.tokens_per_second:,.0f} tokens/s · {tqdm.format_interval(seconds_left)} left"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now >= self._next_line or step == self._total:
            self._next_line = now + PLAIN_LINE_EVERY
            self.write(f"step {step}/{self._total}{text}")

    def _measure(self, now: float, step: int) -> None:
        if self._marks and self._marks[-1][1] == step:
            return  # an evaluation after the step, which would count as the step's time
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_WINDOW:
            self._marks.popleft()
        then, first_step = self._marks[0]
        if now > then:
            self.tokens_per_second = (step - first_step) * self._tokens_per_step / (now - then)

    def restart_clock(self) -> None:
        """Begin a new window: called after an evaluation or a checkpoint, before the next step, it leaves them out."""
        self._marks.clear()

    def write(self, line: str) -> None:
        """Print ``line`` above the bar."""
        tqdm.write(line, file=self._file)
        self._file.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


def plot_loss_curves(directory: str | os.PathLike, log_steps: bool = False) -> Path:
    """Draw the training and held-out loss in ``directory``'s metrics as its ``loss_curves.png``; the picture's path.

    In bits per byte where every record holds ``bits_per_byte``, else in nats per token (``loss``). ``log_steps`` makes
    the step axis logarithmic. The single training losses lie faint behind their moving average over 1/50 of the run.
    """
    records = read_metrics(directory)
    if not records:
        raise ValueError(f"{Path(directory) / METRICS_FILE}: no metrics to draw")
    in_bits = all("bits_per_byte" in record for record in records)
    key = "bits_per_byte" if in_bits else "loss"

    figure, axes = _figure(8, 4.8)
    for split, name, colour in (("train", "training", TRAIN_COLOUR), ("valid", "held-out", VALID_COLOUR)):
        points = [(record["step"], record[key]) for record in records if record["split"] == split]
        if not points:
            continue
        steps, losses = np.array(points, dtype=float).T
        if split == "train":
            window = np.ones(max(1, len(losses) // 50))
            mean = np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            axes.plot(steps, mean, color=colour, linewidth=1.8, label=f"{name}, last {mean[-1]:.3f}")
        else:
            best = int(np.argmin(losses))
            label = f"{name}, lowest {losses[best]:.3f} at step {steps[best]:,.0f}"
            axes.plot(steps, losses, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.set_xscale("log" if log_steps else "linear")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if in_bits else "nats per token")
    axes.set_title(f"Loss of {Path(directory).resolve().name}", loc="left", fontweight="bold")
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(directory) / "loss_curves.png"
    figure.savefig(path)
    return path


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of ``width`` x ``height`` inches and its axes, made without pyplot and so without global state."""
    figure = _import("matplotlib.figure", "Pictures").Figure((width, height), dpi=160, layout="constrained")
    return figure, figure.subplots()


def plot_routing(
    load_LM: Any, path: str | os.PathLike, title: str | None = None, layers: Sequence[int] | None = None
) -> None:
    """Draw how each layer's router spreads tokens over the memories: a heat map with the shares in its cells.

    ``load_LM`` [L, M] counts, in any unit, the tokens that each MoM layer sent to each memory; a row is shown as shares
    of its sum. ``layers`` are the rows' indices in the model, where attention layers stand between them; None: 0 to
    L - 1. A share of 1/M is even; the colour bar marks it.
    """
    load_LM = np.asarray(load_LM, dtype=float)
    share_LM = load_LM / load_LM.sum(axis=1, keepdims=True)
    num_layers, num_memories = share_LM.shape
    even = 1 / num_memories
    top = max(share_LM.max(), min(1.0, 2 * even))

    figure, axes = _figure(2.6 + 0.75 * num_memories, 1.5 + 0.36 * num_layers)
    image = axes.imshow(share_LM, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for (layer, memory), share in np.ndenumerate(share_LM):
        colour = "white" if share > 0.6 * top else "0.15"
        axes.text(memory, layer, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(num_memories))
    axes.set_yticks(range(num_layers), layers or range(num_layers))
    axes.set_xlabel("memory")
    axes.set_ylabel("layer")
    axes.set_title(title or "Share of tokens by memory", loc="left", fontweight="bold")
    axes.set_xticks(np.arange(num_memories - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(num_layers - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)

    bar = figure.colorbar(image, ax=axes, aspect=25, pad=0.03)
    marks = {0.0: "0%", top: f"{top:.0%}", even: f"even: {100 * even:.3g}%"}
    bar.set_ticks(list(marks), labels=list(marks.values()))
    bar.ax.axhline(even, color=VALID_COLOUR, linewidth=2)
    bar.outline.set_visible(False)
    figure.savefig(path)


def plot_routing_text(
    tokens: Sequence[str],
    choice_LT: Any,
    path: str | os.PathLike,
    title: str | None = None,
    layers: Sequence[int] | None = None,
    columns: int = 96,
) -> None:
    """Draw the text of ``tokens`` in lines, and below each line one strip a layer in the colours of its memories.

    ``choice_LT`` [L, T] holds the memory that each MoM layer chose first for each token; ``layers`` as in
    ``plot_routing``. Lines end after a line break (shown as \u21b5) or before ``columns`` characters.
    """
    choice_LT = np.asarray(choice_LT)
    num_layers, num_memories = len(choice_LT), choice_LT.max() + 1
    shown = ["".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\u00b7" for c in token) for token in tokens]
    places = []  # (line, column) of each token
    line, column = 0, 0
    for text in shown:
        if column > 0 and column + len(text) > columns:
            line, column = line + 1, 0
        places.append((line, column))
        line, column = (line + 1, 0) if text.endswith("\u21b5") else (line, column + len(text))

    # One unit of x is a character of the monospaced font, one unit of y a line of text.
    font_size, margin, strip_height = 8, 9, 0.4
    line_height = 1.7 + strip_height * num_layers
    height = line_height * (places[-1][0] + 1)
    character_inches = 0.602 * font_size / 72
    figure, axes = _figure((margin + columns) * character_inches + 0.1, height * 1.25 * font_size / 72 + 0.6)
    axes.set(xlim=(-margin, columns), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title(title or "Memory chosen first", loc="left", fontweight="bold")
    colours = _import("matplotlib", "Pictures").colormaps["tab10" if num_memories <= 10 else "tab20"].colors
    colour_LT = np.array(colours)[choice_LT % len(colours)]
    strip_tops = 1.25 + strip_height * np.arange(num_layers)
    for (line, column), text, colour_L in zip(places, shown, colour_LT.swapaxes(0, 1), strict=True):
        top = line * line_height
        axes.text(column, top + 1, text, family="monospace", fontsize=font_size, parse_math=False)
        strips = {"width": len(text), "height": strip_height, "edgecolor": "white", "linewidth": 0.4}
        axes.barh(top + strip_tops, left=column, align="edge", color=colour_L, **strips)
    for row in sorted({0, num_layers - 1}):
        name = f"layer {layers[row] if layers else row} "
        axes.text(0, strip_tops[row] + strip_height / 2, name, ha="right", va="center", fontsize=font_size - 2)
    for memory in range(num_memories):
        axes.plot([], [], "s", color=colours[memory % len(colours)], label=f"{memory}")
    compact = {"handlelength": 1, "handletextpad": 0.3, "columnspacing": 1, "fontsize": font_size, "frameon": False}
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": min(num_memories, 16)}
    axes.legend(title="memory", title_fontsize=font_size, **below, **compact)
    figure.savefig(path)
