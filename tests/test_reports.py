"""What a run writes for people: metrics that survive a crash and a resume, the progress bar, the pictures."""

import io
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import reports
from mom_jax.reports import ProgressBar, RunLog, plot_loss_curves, plot_routing, plot_routing_text, read_metrics


def write_log(directory, steps, resume_step=None):
    with RunLog(directory, resume_step, tensorboard=False) as log:
        for step in steps:
            log.write(step, "train", loss=1 / step)


def steps_of(directory):
    return [record["step"] for record in read_metrics(directory)]


def test_records_come_back_in_order_and_to_the_bit(tmp_path):
    loss = np.float32(0.1) / 3
    with RunLog(tmp_path / "new" / "run") as log:
        log.write(1, "train", loss=jnp.asarray(loss), tokens=7)
        log.write(1, "valid", loss=0.1 + 0.2, load=np.ones((1, 2)))
        # Every record is on disk at once, so that a killed run loses none.
        assert read_metrics(tmp_path / "new" / "run") == [
            {"step": 1, "split": "train", "loss": float(loss), "tokens": 7},
            {"step": 1, "split": "valid", "loss": 0.1 + 0.2, "load": [[1.0, 1.0]]},
        ]
    assert np.float32(read_metrics(tmp_path / "new" / "run")[0]["loss"]) == loss


def test_resume_drops_what_the_run_makes_again(tmp_path):
    write_log(tmp_path, range(1, 8))
    write_log(tmp_path, [5, 6], resume_step=4)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    write_log(tmp_path, [])
    assert steps_of(tmp_path) == []  # a run that begins anew


def test_a_torn_last_line_is_dropped(tmp_path):
    write_log(tmp_path, [1, 2, 3])
    path = tmp_path / reports.METRICS_FILE
    path.write_text(path.read_text()[:-4])
    assert steps_of(tmp_path) == [1, 2]
    write_log(tmp_path, [3, 4], resume_step=9)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    (tmp_path / reports.METRICS_FILE).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not JSON: '{\"st'"):
        read_metrics(tmp_path)


def test_a_crash_while_resuming_costs_no_record(tmp_path, monkeypatch):
    write_log(tmp_path, [1, 2, 3])

    def crash(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(os, "fsync", crash)
        write_log(tmp_path, [], resume_step=1)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []
    with pytest.raises(ValueError, match="metrics.jsonl: no metrics to draw"):
        plot_loss_curves(tmp_path)


def test_tensorboard_gets_the_scalars(tmp_path):
    with RunLog(tmp_path, resume_step=3) as log:
        log.write(4, "valid", loss=2.5, load=[1, 2])
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"valid/loss" in content
    assert b"valid/load" not in content


@pytest.mark.parametrize(
    "module, call",
    [
        ("tensorboardX", lambda directory: RunLog(directory)),
        ("matplotlib.figure", lambda directory: plot_routing([[1, 1]], directory / "a.png")),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.split(".")[0]
    with pytest.raises(ModuleNotFoundError, match=f"need the package {package}: pip install {package}"):
        call(tmp_path)
    write_log(tmp_path, [1])  # neither is needed to train


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set: ``clock.now``."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(reports.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_where_there_is_no_terminal(clock):
    file = io.StringIO()
    bar = ProgressBar(total_steps=1000, tokens_per_step=500, file=file)
    clock.now += 60  # compilation, in the first step
    for step in range(1, 41):
        bar.update(step, loss=2.0 + step if step % 10 == 0 else None, valid_loss=3.25 if step == 20 else None)
        clock.now += 1
    bar.close()
    assert bar.tokens_per_second == 500
    assert file.getvalue().splitlines() == [
        "step 1/1000",
        "step 16/1000 · loss 12.0000 · 500 tokens/s · 16:24 left",
        "step 31/1000 · loss 32.0000 · held-out 3.2500 · 500 tokens/s · 16:09 left",
    ]


def test_the_last_step_has_its_line(clock):
    file = io.StringIO()
    bar = ProgressBar(total_steps=2, tokens_per_step=1, file=file)
    bar.update(1)
    bar.update(2, loss=1.0)
    assert file.getvalue().splitlines()[-1] == "step 2/2 · loss 1.0000"


def test_speed_is_recent_and_leaves_out_evaluations(clock):
    bar = ProgressBar(total_steps=1000, tokens_per_step=100, file=io.StringIO())
    for step in range(1, 101):  # a second each, then half a second each
        bar.update(step)
        clock.now += 1
    for step in range(101, 201):
        bar.update(step)
        clock.now += 0.5
    assert bar.tokens_per_second == 200
    clock.now += 50  # an evaluation
    bar.update(200, valid_loss=1.0)
    assert bar.tokens_per_second == 200
    bar.restart_clock()
    for step in (201, 202):
        bar.update(step)
        clock.now += 2
    assert bar.tokens_per_second == 50


def test_a_bar_on_a_terminal(clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    file = Terminal()
    bar = ProgressBar(total_steps=10, tokens_per_step=1000, start_step=4, file=file)
    for step in (5, 6):
        bar.update(step, loss=1.5)
        clock.now += 0.5
    bar.write("a checkpoint")
    bar.close()
    shown = file.getvalue()
    assert "\r 60%|" in shown
    assert "step 6/10 · loss 1.5000 · 2,000 tokens/s · 00:02 left" in shown
    assert "a checkpoint\n" in shown


def pixels(path):
    """The picture at ``path`` [height, width, 3], checked to be more than an empty frame."""
    from matplotlib.image import imread

    image = imread(path)[..., :3]
    assert min(image.shape[:2]) > 100
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    return image


@pytest.fixture
def axes(monkeypatch):
    """The axes of every picture drawn in the test."""
    drawn, make_figure = [], reports._figure

    def keep(*args):
        figure, axes = make_figure(*args)
        drawn.append(axes)
        return figure, axes

    monkeypatch.setattr(reports, "_figure", keep)
    return drawn


def test_loss_curves(tmp_path, axes):
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(10, 2001, 10):
            log.write(step, "train", loss=2 * step**-0.3, bits_per_byte=step**-0.3)
            if step % 500 == 0:
                log.write(step, "valid", loss=2.0, bits_per_byte=abs(step - 1000) / 1000 + 0.5)
    path = plot_loss_curves(tmp_path)
    assert path == tmp_path / "loss_curves.png"
    linear = pixels(path)
    plot_loss_curves(tmp_path, log_steps=True)
    assert not np.array_equal(linear, pixels(path))
    assert [a.get_xscale() for a in axes] == ["linear", "log"]
    assert axes[0].get_ylabel() == "bits per byte"
    single, mean, valid = axes[0].lines
    np.testing.assert_allclose(single.get_ydata(), np.arange(10, 2001, 10) ** -0.3)
    assert mean.get_ydata()[0] < single.get_ydata()[0]
    assert valid.get_label() == "held-out, lowest 0.500 at step 1,000"


def test_loss_in_nats_where_bytes_are_unknown(tmp_path, axes):
    write_log(tmp_path, [1, 2, 3])
    plot_loss_curves(tmp_path)
    assert axes[0].get_ylabel() == "nats per token"
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), [1, 1 / 2, 1 / 3])


def test_routing(tmp_path, axes):
    plot_routing([[30, 10], [0, 5]], tmp_path / "routing.png", title="After 5 steps", layers=[0, 2])
    pixels(tmp_path / "routing.png")
    assert [text.get_text() for text in axes[0].texts] == ["75%", "25%", "0%", "100%"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["0", "2"]
    colour_bar = axes[0].images[0].colorbar
    labels = [label.get_text() for label in colour_bar.ax.get_yticklabels()]
    assert dict(zip(labels, colour_bar.get_ticks(), strict=True)) == {"0%": 0, "even: 50%": 0.5, "100%": 1}


def test_routing_of_one_memory(tmp_path):
    plot_routing(np.ones((12, 1)), tmp_path / "routing.png")
    pixels(tmp_path / "routing.png")


def test_routing_text(tmp_path, axes):
    tokens = ["To", " be", ",\n", "or", " not", "\t$x$"]
    plot_routing_text(tokens, [[0, 1, 2, 0, 1, 2], [2] * 6], tmp_path / "text.png", layers=[0, 3], columns=8)
    pixels(tmp_path / "text.png")
    texts = [text.get_text() for text in axes[0].texts]
    assert texts == ["To", " be", ",↵", "or", " not", "·$x$", "layer 0 ", "layer 3 "]
    places = [text.get_position() for text in axes[0].texts[:6]]
    assert [x for x, _ in places] == [0, 2, 5, 0, 2, 0]
    assert len({y for _, y in places}) == 3
    assert len(axes[0].patches) == 12
