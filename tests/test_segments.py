"""Segments against their definition, slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pallas_kernels.segments import SEGMENT_ALIGNMENT, Segments, where_real

B, S = 2, 4
N = S * 4 * SEGMENT_ALIGNMENT + SEGMENT_ALIGNMENT

LENGTHS = arrays(np.int32, (B, S), elements=st.sampled_from([0, 0, 1, 5, 63, 64, 65, 127, 128, 130]))
SPARE = arrays(np.int32, (B, S), elements=st.integers(0, 1))  # whole dead alignments after a segment's own


from_lengths = jax.jit(Segments.from_lengths)


@jax.jit
def everything(segments, run_ids):
    return {
        "segment_of": segments.segment_of(N),
        "rank": segments.rank(N),
        "is_real": segments.is_real(N),
        "starts_run": segments.starts_run(run_ids),
    }


@settings(deadline=None, max_examples=60)
@given(LENGTHS, SPARE, st.integers(0, 2**32 - 1))
def test_slots_know_their_segment_rank_and_run(lengths, spare, seed):
    owned = -(-lengths // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT + spare * SEGMENT_ALIGNMENT
    offsets = np.pad(np.cumsum(owned, axis=1), [(0, 0), (1, 0)]).astype(np.int32)
    run_ids = np.random.default_rng(seed).integers(0, 2, (B, N)).cumsum(axis=1).astype(np.int32) // 3

    expected = {
        "segment_of": np.full((B, N), S - 1), "rank": None, "is_real": np.zeros((B, N), bool),
        "starts_run": np.zeros((B, N), bool),
    }  # fmt: skip
    rank = np.zeros((B, N), int)
    for b in range(B):
        for n in range(N):
            rank[b, n] = n - offsets[b, S - 1]  # of slots that nobody owns, as if the last segment went on
            for s in range(S):
                if offsets[b, s] <= n < offsets[b, s + 1]:
                    expected["segment_of"][b, n] = s
                    rank[b, n] = n - offsets[b, s]
                    expected["is_real"][b, n] = rank[b, n] < lengths[b, s]
            if expected["is_real"][b, n] and rank[b, n] > 0:
                expected["starts_run"][b, n] = run_ids[b, n] != run_ids[b, n - 1]
    expected["rank"] = rank

    actual = everything(Segments(jnp.asarray(offsets), jnp.asarray(lengths)), run_ids)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, name)


@settings(deadline=None, max_examples=60)
@given(LENGTHS)
def test_from_lengths_rounds_up_to_the_alignment(lengths):
    segments = from_lengths(lengths)
    assert segments.offsets.dtype == segments.lengths.dtype == jnp.int32
    np.testing.assert_array_equal(segments.lengths, lengths)
    for offsets, row in zip(np.asarray(segments.offsets), lengths, strict=True):
        assert offsets[0] == 0
        for start, end, length in zip(offsets[:-1], offsets[1:], row, strict=True):
            assert end % SEGMENT_ALIGNMENT == 0 and length <= end - start < length + SEGMENT_ALIGNMENT


def test_full_is_one_segment_a_row():
    segments = Segments.full(3, 100)
    assert segments.num_segments == 1
    np.testing.assert_array_equal(segments.offsets, [[0, 128]] * 3)
    np.testing.assert_array_equal(segments.is_real(128).sum(axis=1), [100] * 3)


def test_where_real_removes_nan():
    real = jnp.array([[True, False]])
    x = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.inf]]])
    np.testing.assert_array_equal(where_real(real, x), [[[1, 2], [0, 0]]])


def test_slots_before_the_first_segment_are_dead():
    segments = Segments(jnp.array([[64, 128]]), jnp.array([[10]]))
    np.testing.assert_array_equal(np.flatnonzero(segments.is_real(192)[0]), np.arange(64, 74))
