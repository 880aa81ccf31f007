"""The Triton grouped matmul against float64. In the interpreter unwritten outputs and reads out of bounds are NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import LIMITS, assert_close

from mom_jax.routing import Dispatch
from pallas_kernels import api
from pallas_kernels.segments import Segments
from pallas_kernels.triton.grouped_matmul import (
    BlockList,
    GroupedMatmulConfig,
    SlotList,
    TileConfig,
    _piece_length,
    grouped_matmul,
)

TILE = TileConfig(tile=128, columns=64, depth=32)
# Tiles of different sizes, so that list and tiles are aligned differently; few pieces of dw, of several steps.
CONFIG = GroupedMatmulConfig(TILE, replace(TILE, tile=64), replace(TILE, depth=64), waves=0)

# Lengths of each segment, a tuple a row; slots after the last segment; D; E.
CASES = {
    "ragged": (((70, 3, 64, 1), (0, 128, 5, 66), (65, 0, 0, 200)), 64, 32, 64),
    "one_row": (((1, 0, 130),), 0, 16, 48),
    "one_slot": (((1,),), 0, 16, 16),
    "all_in_one_segment": (((0, 200, 0), (0, 320, 0)), 128, 48, 128),
    "nothing_at_all": (((0, 0), (0, 0)), 64, 16, 32),
}


def products(x, w, dy, segments):
    """y, dx, dw in float64, slot by slot; dead slots count for nothing."""
    offsets, lengths = np.asarray(segments.offsets), np.asarray(segments.lengths)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for b, s in np.ndindex(lengths.shape):
        n = slice(offsets[b, s], offsets[b, s] + lengths[b, s])
        y[b, n], dx[b, n] = x[b, n] @ w[s], dy[b, n] @ w[s].T
        dw[s] += x[b, n].T @ dy[b, n]
    return y, dx, dw


def run(interpret, x, w, dy, **arguments):
    @jax.jit
    def f(x, w, dy):
        (y,), pull = jax.vjp(lambda x, w: grouped_matmul(x, (w,), interpret=interpret, **arguments), x, w)
        return y, *pull((dy,))

    return f(x, w, dy)


def make(rng, lengths, spare, depth, width, dtype):
    segments = Segments.from_lengths(jnp.asarray(lengths))
    num_slots = int(segments.offsets[:, -1].max()) + spare
    x, dy = (rng.normal(size=(len(lengths), num_slots, width)) for width in (depth, width))
    dead = ~np.asarray(segments.is_real(num_slots))
    x[dead], dy[dead] = np.nan, np.nan
    w = rng.normal(size=(len(lengths[0]), depth, width))
    return *(jnp.asarray(a, dtype) for a in (x, w, dy)), segments


@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients(interpret, rng, case):
    x, w, dy, segments = make(rng, *CASES[case], "float32")
    assert_close(run(interpret, x, w, dy, segments=segments, config=CONFIG), products(x, w, dy, segments), LIMITS["float32"])


def test_several_matrices_for_one_x(interpret, rng):
    """dx is the sum of what it is for each."""
    x, w, dy, segments = make(rng, *CASES["ragged"], "float32")
    narrow = slice(0, 48)

    @jax.jit
    def f(x, w, dy):
        weights = (w, w[..., narrow])
        ys, pull = jax.vjp(lambda *a: grouped_matmul(*a, segments=segments, config=CONFIG, interpret=interpret), x, weights)
        return ys, pull((dy, dy[..., narrow]))

    (y, y_narrow), (dx, (dw, dw_narrow)) = f(x, w, dy)
    first, second = products(x, w, dy, segments), products(x, w[..., narrow], dy[..., narrow], segments)
    assert_close((y, dw, y_narrow, dw_narrow), (first[0], first[2], second[0], second[2]), LIMITS["float32"])
    assert_close(dx, first[1] + second[1], LIMITS["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_tiles(interpret, rng, dtype):
    x, w, dy, segments = make(rng, *CASES["ragged"], dtype)
    assert_close(run(interpret, x, w, dy, segments=segments), products(x, w, dy, segments), LIMITS[dtype])


@pytest.mark.parametrize("num_tokens", [1, 70])
def test_gather_by_token(interpret, rng, num_tokens):
    """The same as on slots gathered before, dx summed over each token's slots; padded tokens have none."""
    memories = np.sort(rng.permuted(np.tile(np.arange(4), (2, num_tokens, 1)), axis=-1)[..., :2])
    mask = np.arange(num_tokens) >= np.array([[0], [num_tokens // 3]])
    dispatch = jax.jit(Dispatch.of, static_argnums=(2, 3))(memories.astype(np.int32), mask, 4, False)
    token_of, slot_of = np.asarray(dispatch.token_of), np.asarray(dispatch.slot_of)
    num_slots, row = token_of.shape[1], np.arange(2)[:, None]
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, num_tokens, 32), (4, 32, 64), (2, num_slots, 64)))
    x[~mask], dy[token_of == num_tokens] = np.nan, np.nan

    y, dx_slots, dw = products(np.pad(x, [(0, 0), (0, 1), (0, 0)])[row, token_of], w, dy, dispatch.segments)
    dx = np.pad(dx_slots, [(0, 0), (0, 1), (0, 0)])[row[..., None], slot_of].sum(axis=2)
    arguments = {"segments": dispatch.segments, "token_of": dispatch.token_of, "slot_of": dispatch.slot_of}
    assert_close(run(interpret, *map(jnp.asarray, (x, w, dy)), config=CONFIG, **arguments), (y, dx, dw), LIMITS["float32"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("align, gap", [(64, 0), (256, 64)])
def test_slot_list(case, align, gap):
    """Every slot once; real slots in their segment's part, in order; padding names no slot."""
    lengths, spare = CASES[case][:2]
    segments = Segments.from_lengths(jnp.asarray(lengths))
    gaps = gap * jnp.arange(1, segments.num_segments + 2)  # dead slots before the first segment and after each
    segments = segments._replace(offsets=segments.offsets + gaps)
    num_slots = int(segments.offsets[:, -1].max()) + spare
    slots = jax.jit(SlotList.of, static_argnums=(1, 2))(segments, num_slots, align)
    none = len(lengths) * num_slots
    listed = np.asarray(slots.slot)
    np.testing.assert_array_equal(np.sort(listed[listed < none]), np.arange(none))

    real, owner = (np.asarray(a).reshape(-1) for a in (segments.is_real(num_slots), segments.segment_of(num_slots)))
    segment = np.repeat(np.asarray(slots.segment), align)
    for s in range(segments.num_segments):
        mine = np.flatnonzero(real & (owner == s))
        assert slots.count[s] == mine.size and slots.start[s] % align == 0
        np.testing.assert_array_equal(listed[slots.start[s] :][: mine.size], mine)
        part = listed[segment == s]
        assert part.size == -(-mine.size // align) * align and (part[mine.size :] == none).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unit", [32, 64])
def test_block_list(case, unit):
    """Every real slot once, in its segment's part, in order."""
    lengths, spare = CASES[case][:2]
    segments = Segments.from_lengths(jnp.asarray(lengths))
    segments = segments._replace(offsets=segments.offsets + 64)
    num_slots = int(segments.offsets[:, -1].max()) + spare
    blocks = jax.jit(BlockList.of, static_argnums=(1, 2))(segments, num_slots, unit)
    real, owner = (np.asarray(a).reshape(-1) for a in (segments.is_real(num_slots), segments.segment_of(num_slots)))
    assert blocks.slot.size * unit == real.size and (blocks.slot % unit == 0).all()
    slot, valid = np.asarray(blocks.slot), np.asarray(blocks.valid)
    for s in range(segments.num_segments):
        mine = range(blocks.start[s], blocks.start[s] + blocks.count[s])
        assert all(valid[place] > 0 for place in mine)
        listed = [slot[place] + n for place in mine for n in range(valid[place])]
        np.testing.assert_array_equal(listed, np.flatnonzero(real & (owner == s)))
    assert not valid[int(blocks.count.sum()) :].any()


@pytest.mark.parametrize("counts", [(127, 130, 128, 129, 256), (625, 1, 0, 11), (1,), (0, 0), (2048, 1, 1, 1)])
@pytest.mark.parametrize("most", [12, 16])
def test_pieces_of_dw_are_few_and_even(counts, most):
    count = np.array(counts)
    length = np.asarray(_piece_length(jnp.asarray(count), most))
    assert length.min() > 0
    assert (-(-count // length)).sum() <= most
    assert length.max() <= 2 * count.sum() / most + 1


def test_arguments_that_do_not_fit(rng):
    x, w, _, segments = make(rng, *CASES["one_row"], "float32")
    triton = {"implementation": "triton", "interpret": True}
    with pytest.raises(NotImplementedError, match="D is 8; it must be a multiple of 16"):
        api.grouped_matmul(x[..., :8], w[:, :8], segments, **triton)
    with pytest.raises(ValueError, match="give both or neither"):
        api.grouped_matmul(x, w, segments, token_of=jnp.zeros(x.shape[:2], jnp.int32), **triton)
    with pytest.raises(ValueError, match="float16"):
        api.grouped_matmul(x.astype(jnp.float16), w.astype(jnp.float16), segments, **triton)
