"""Long segments cut into spans: where they lie, when, and that the ops stay what they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs
from numerics import LIMITS, assert_close
from test_api import run_op

from pallas_kernels import triton
from pallas_kernels.segments import Segments
from pallas_kernels.triton.chunks import Layout
from pallas_kernels.triton.spans import Spans, default_spans

DELTA, LINEAR = "gated_delta_rule", "linear_attention"
# Op, spans a row, case: each takes seconds in the interpreter.
CALLS = [
    (DELTA, 6, Case("ragged", ((330, 3, 64, 1), (0, 128, 5, 266)), initial_state=True)),
    (DELTA, 4, Case("all_in_one_memory", ((0, 400, 0, 0),), initial_state=True, spare=128)),
    (DELTA, 5, Case("runs", ((300, 70), (5, 260)), runs=True, initial_state=True)),
    (DELTA, 4, Case("without_decay", ((250, 65),), decay=None, initial_state=True, key=32, value=48)),
    (DELTA, 7, Case("no_decay_left", ((400,),), decay="dead", initial_state=True)),
    (LINEAR, 5, Case("per_head", ((300, 70), (0, 260)), runs=True, initial_state=True)),
    (LINEAR, 3, Case("no_decay", 300, decay=None)),
    (LINEAR, 5, Case("per_key", ((300, 70), (0, 260)), decay="key", runs=True, initial_state=True)),
]


def inputs_of(case, dtype):
    """As in cases.py; "dead": the first head decays to nothing in every chunk, the second not at all."""
    if case.decay != "dead":
        return make_inputs(case, dtype=dtype)
    inputs = make_inputs(Case(**{**vars(case), "decay": "head"}), dtype=dtype)
    return inputs | {"log_decay": inputs["log_decay"] * jnp.array([20.0, 0.001])}


@pytest.mark.parametrize(
    ("dtype", "call"),
    [("float32", call) for call in CALLS] + [("bfloat16", call) for call in CALLS[:4:3]],
    ids=lambda x: x if isinstance(x, str) else f"{x[0]}-{x[2]}",
)
def test_spans_match_the_reference(monkeypatch, interpret, dtype, call):
    op, num_spans, case = call
    cut = partial(getattr(triton, op), num_spans=num_spans)
    monkeypatch.setattr(triton, op, lambda *args, **options: cut(*args, **options | {"interpret": interpret}))
    monkeypatch.setattr(triton, "_device_reason", lambda arrays: None)
    inputs = inputs_of(case, dtype)
    assert_close(run_op(op, inputs, "triton"), run_op(op, inputs, "reference"), LIMITS[dtype], f"{op} {case}")


def test_spans_cover_the_segments():
    """Segments of more than 3 chunks are cut."""
    segments = Segments.from_lengths(jnp.array([[330, 0, 180, 1], [0, 0, 0, 600]]))
    spans = Spans.of(Layout.of(segments, None, 768), 5, 3)
    assert spans.segment.shape == (2, 8)
    np.testing.assert_array_equal(spans.layout.lengths[0], [128, 128, 74, 0, 180, 1, 0, 0])
    np.testing.assert_array_equal(spans.layout.offsets[0], [0, 128, 256, 384, 384, 576, 640, 640, 640])
    np.testing.assert_array_equal(spans.layout.lengths[1], [0, 0, 0, 128, 128, 128, 128, 88])
    np.testing.assert_array_equal(spans.first, [[0, 3, 4, 5], [0, 1, 2, 3]])
    np.testing.assert_array_equal(spans.last, [[2, 3, 4, 5], [0, 1, 2, 7]])
    np.testing.assert_array_equal(np.flatnonzero(spans.is_middle[0]), [1])
    np.testing.assert_array_equal(np.flatnonzero(spans.is_middle[1]), [4, 5, 6])


@pytest.mark.parametrize("num_spans", [2, 3, 7, 20])
def test_spans_are_enough_for_every_segmentation(rng, num_spans):
    lengths = jnp.asarray(rng.integers(0, 2, (200, 4)) * rng.integers(0, 1500, (200, 4)))
    layout = Layout.of(Segments.from_lengths(lengths), None, 64 * 96)
    spans = Spans.of(layout, num_spans, 2)
    assert int(spans.last[:, -1].max()) < spans.segment.shape[1] == num_spans + 3
    np.testing.assert_array_equal(jnp.sum(spans.layout.lengths, axis=1), jnp.sum(lengths, axis=1))
    assert (spans.layout.offsets[:, 1:] - spans.layout.offsets[:, :-1] >= spans.layout.lengths).all()
    for row, first, last, length in zip(spans.layout.lengths, spans.first, spans.last, lengths, strict=True):
        for begin, end, tokens in zip(first, last, length, strict=True):
            pieces = np.asarray(row[begin : end + 1])
            assert pieces.sum() == tokens and (pieces[:-1] % 64 == 0).all() and (tokens == 0 or pieces.min() > 0)


@pytest.mark.parametrize(
    ("batch", "tokens", "count", "num_spans"),
    [(1, 65536, 1, 8), (2, 32768, 1, 4), (16, 4096, 1, 1), (16, 4096, 4, 1), (1, 1024, 1, 1), (1, 3 * 65536, 5, 8)],
)
def test_only_few_long_segments_are_cut(batch, tokens, count, num_spans):
    """Widths of the paper's model; the last is its layer with one row of 65,536 tokens."""
    x = jax.ShapeDtypeStruct((batch, tokens, 4, 256), jnp.bfloat16)
    segments = Segments.from_lengths(jnp.full((batch, count), tokens // count))
    assert default_spans(x, x, segments, is_delta=True) == num_spans
