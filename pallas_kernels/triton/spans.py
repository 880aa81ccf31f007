"""Long segments cut into spans, so that a few of them fill the GPU: scan.py's forward and backward pass, in parallel.

A span is some chunks of a segment in a row, to the scans a segment of its own. What a segment does to its state is linear,
final = A initial + local, so the states between spans are found before the spans are scanned::

    1 local states   a scan that only follows the state: local of every span from zero, and A from the identity, v = 0
    2 join           S <- A S + local        over the spans of a segment, float32
    3 scan           every span from its state

and backwards likewise: dS <- A^T dS + local, with the local part from a backward scan that only follows dS. A is K x K for
the delta rule; for linear attention it is the product of the decays. A segment's first span starts from the initial state
and needs no A, its last span, or only one, needs nothing of 1: both A are zero, so that the join runs through all segments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import Segments, states_or_zeros
from pallas_kernels.triton import scan
from pallas_kernels.triton.chunks import CHUNK, Decays, Layout, tile_of
from pallas_kernels.triton.launch import MULTIPROCESSORS

# Microseconds on an H200 with K = V = 256 in bfloat16, means of scan and scan_grad: a chunk of a V tile in a program
# alone, and where every multiprocessor has one. Parts of them that following the state alone takes, and a step of the join:
# estimates.
ALONE, BUSY = 3.3, 5.9
LOCAL, LOCAL_GRAD, JOIN_STEP = 0.6, 0.9, 12.0
SHORTEST, MOST, WORTH_IT = 16, 16, 0.9  # chunks of a span; spans, each of which is a step of the join; part of the time


def _tiles(k, v) -> int:
    """How many programs work at a span."""
    return k.shape[2] * v.shape[3] // tile_of(v.shape[3], scan.default_config(k.dtype, k.shape[3]).tile)


def _longest_uncut(k, v) -> int:
    """Chunks that a program alone gets through in little more than the time in which the whole chip gets through all."""
    return int(1.25 * k.shape[0] * (k.shape[1] // CHUNK) * _tiles(k, v) * BUSY / (MULTIPROCESSORS * ALONE))


def default_spans(k, v, segments: Segments, *, is_delta: bool) -> int:
    """In how many spans to cut the long segments of each row: one wave of programs, or 1 where that does not pay.

    The time of a pass is that of its longest program or that of all on the whole chip. How long segments are is not known
    here: one is taken to be twice as long as each of the others, as a shared memory is.
    """
    batch, num_chunks, count = k.shape[0], k.shape[1] // CHUNK, segments.num_segments
    programs = batch * _tiles(k, v)
    num_spans = min(MULTIPROCESSORS // programs, num_chunks // SHORTEST, MOST)
    lengths = [2 * num_chunks / (count + 1)] + (count - 1) * [num_chunks / (count + 1)]
    long = sum(x for x in lengths if x > _longest_uncut(k, v))
    if num_spans < 2 or not long:
        return 1

    def time(longest, chunks):
        return max(longest * ALONE, programs * chunks * BUSY / MULTIPROCESSORS)

    span, shorter = long / num_spans, max([x for x in lengths if x <= _longest_uncut(k, v)], default=0)
    inner = long * (1 - 1 / num_spans)  # what is not in a last span, and in neither a first nor a last
    middle = long * (1 - 2 / num_spans) * is_delta * k.shape[3] / v.shape[3]
    join = JOIN_STEP * (3 + (num_spans + count - 3) * is_delta)
    cut = 2 * time(max(span, shorter), num_chunks) + LOCAL * time(span, inner + middle) + LOCAL_GRAD * time(span, inner)
    return num_spans if cut + 2 * join < WORTH_IT * 2 * time(max(lengths), num_chunks) else 1


class Spans(NamedTuple):
    """The spans of a row, in order; those that are too many are empty and come last.

    Attributes:
      layout: with the spans as segments.
      segment: int32 [B, S'], whose each span is.
      first, last: int32 [B, S], the first and the last span of each segment.
    """

    layout: Layout
    segment: jax.Array
    first: jax.Array
    last: jax.Array

    @classmethod
    def of(cls, layout: Layout, num_spans: int, longest_uncut: int) -> "Spans":
        """Segments of more than ``longest_uncut`` chunks in spans of one length, up to ``num_spans`` - 1 more of them."""
        num_segments = layout.lengths.shape[1]
        chunks = -(-layout.lengths // CHUNK)
        long = jnp.where(chunks > longest_uncut, chunks, 0)
        span = jnp.maximum(-(-jnp.sum(long, axis=1, keepdims=True) // num_spans), 1)
        count = jnp.maximum(-(-long // span), 1)
        slots = -(-chunks // count) * CHUNK
        last = jnp.cumsum(count, axis=1, dtype=jnp.int32) - 1
        first = last + 1 - count
        index = jnp.arange(num_spans - 1 + num_segments, dtype=jnp.int32)
        segment = jnp.sum(index[:, None] > last[:, None, :-1], axis=-1, dtype=jnp.int32)

        def of_segment(x):
            return jnp.take_along_axis(x, segment, axis=1)

        before = (index - of_segment(first)) * of_segment(slots)  # slots of the segment before the span
        lengths = jnp.clip(of_segment(layout.lengths) - before, 0, of_segment(slots))
        end = layout.offsets[:, -1:]
        starts = jnp.where(index <= last[:, -1:], of_segment(layout.offsets[:, :-1]) + before, end)
        offsets = jnp.concatenate([starts, end], axis=1)
        lengths = jnp.where(index <= last[:, -1:], lengths, 0)
        return cls(layout._replace(offsets=offsets, lengths=lengths), segment, first, last)

    @property
    def is_first(self) -> jax.Array:
        """bool [B, S'], for each span."""
        return jnp.arange(self.segment.shape[1]) == jnp.take_along_axis(self.first, self.segment, axis=1)

    @property
    def is_last(self) -> jax.Array:
        return jnp.arange(self.segment.shape[1]) == jnp.take_along_axis(self.last, self.segment, axis=1)

    @property
    def is_middle(self) -> jax.Array:
        """Whether a span is neither, and has tokens."""
        return ~self.is_first & ~self.is_last & (self.layout.lengths > 0)

    def scanned(self, which: jax.Array) -> Layout:
        """The layout with nothing in the other spans."""
        return self.layout._replace(lengths=jnp.where(which, self.layout.lengths, 0))

    def product(self, decay: jax.Array) -> jax.Array:
        """[B, chunks, H, ...] -> [B, S', H, ...]: the product over the chunks of each span that have a token."""
        begin, count = self.layout.offsets[:, :-1, None] // CHUNK, -(-self.layout.lengths[..., None] // CHUNK)
        chunk = jnp.arange(decay.shape[1])
        inside = (chunk >= begin) & (chunk < begin + count)
        return jnp.prod(jnp.where(_by_state(inside, decay.ndim + 1), decay[:, None], 1.0), axis=2)


def _by_state(x: jax.Array, ndim: int = 5) -> jax.Array:
    """With axes of 1 at the end."""
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _pick(states: jax.Array, index: jax.Array) -> jax.Array:
    """``states`` [B, S, H, K, V] at ``index`` [B, S']."""
    return jnp.take_along_axis(states, _by_state(index), axis=1)


def _join(transitions: jax.Array, local: jax.Array, *, backward: bool) -> jax.Array:
    """The state, or its gradient, that comes to each span from its neighbour: float32 [B, S', H, K, V]."""
    count = local.shape[1]
    order = range(count - 1, -1, -1) if backward else range(count)
    states, state = {}, jnp.zeros_like(local[:, 0])
    for step, span in enumerate(order):
        states[span] = state
        if step == 0:  # nothing has come to it
            state = local[:, span]
        elif transitions.shape[-1] == 1:
            state = transitions[:, span] * state + local[:, span]
        else:
            equation = "bhji,bhjv->bhiv" if backward else "bhij,bhjv->bhiv"
            through = jnp.einsum(equation, transitions[:, span], state, precision=lax.Precision.HIGHEST)
            state = through + local[:, span]
    return jnp.stack([states[span] for span in range(count)], axis=1)


def _local_states(k, v, decays: Decays, beta, key_decay, inverse, initial_state, spans: Spans, interpret):
    """Final states of the spans but the last ones, each from the initial state if it is the first, else from zero.

    Returns:
      them, float32 [B,S',H,K,V]; and the transitions of the middle spans, zero elsewhere: [B,S',H,K,K], or [B,S',H,K or 1,1]
      without the delta rule.
    """
    decay = None if decays.state is None else jnp.moveaxis(decays.state, 1, 2)[..., None]
    decay = key_decay if decay is None else decay
    heads, key_width = k.shape[2:]
    shape = (*spans.segment.shape, heads, 1)
    decay = jnp.ones(shape, jnp.float32) if decay is None else spans.product(decay)
    transitions = jnp.where(_by_state(spans.is_middle), decay[..., None], 0.0)
    starts = jnp.where(_by_state(spans.is_first & ~spans.is_last), _pick(initial_state, spans.segment), 0.0)
    lengths = None
    if inverse is not None:
        # The delta rule shrinks what it does not decay: where the decays' product is zero, so is the transition.
        is_alive = transitions[..., 0, 0] > 0
        lengths = jnp.moveaxis(jnp.where(is_alive, spans.layout.lengths[..., None], 0), 2, 1)
        starts = jnp.concatenate([starts, jnp.where(_by_state(is_alive), jnp.eye(key_width), 0.0)], axis=-1)
    local = scan.local_states(
        k, v, decays, beta, key_decay, inverse, starts, lengths, spans.scanned(~spans.is_last), interpret=interpret
    )  # fmt: skip
    return (local, transitions) if inverse is None else (local[..., : v.shape[3]], local[..., v.shape[3] :])


def forward(
    q, k, v, decays, beta, key_decay, scores, inverse, initial_state, layout, *, num_spans, scale, save, interpret
) -> dict[str, jax.Array]:
    """:func:`scan.forward` in spans; also transitions for the backward pass, None if nothing is cut."""
    options = {"scale": scale, "save": save, "interpret": interpret}
    operands = q, k, v, decays, beta, key_decay, scores, inverse
    if num_spans == 1:
        return scan.forward(*operands, initial_state, layout, **options) | {"transitions": None}
    initial_state = states_or_zeros(initial_state, k, v, layout.lengths.shape[1])
    spans = Spans.of(layout, num_spans, _longest_uncut(k, v))
    local, transitions = _local_states(k, v, decays, beta, key_decay, inverse, initial_state, spans, interpret)
    before = _join(transitions, local, backward=False)
    before = jnp.where(_by_state(spans.is_first), _pick(initial_state, spans.segment), before)
    out = scan.forward(*operands, before, spans.layout, **options)
    return out | {"final_state": _pick(out["final_state"], spans.last), "transitions": transitions}


def backward(
    q, k, decays, beta, key_decay, scores, inverse, do, d_final_state, layout, transitions, *, num_spans, scale,
    interpret, wants_initial,
) -> dict[str, jax.Array]:  # fmt: skip
    """:func:`scan.backward` in the spans and with the transitions of :func:`forward`.

    Args:
      wants_initial: whether the gradient of the initial states is wanted.
    """
    options = {"scale": scale, "interpret": interpret}
    wanted = ["d_states", "y"] + ["d_initial_state"] * wants_initial
    operands = q, k, decays, beta, key_decay, scores, inverse, do
    if transitions is None:
        return scan.backward(*operands, d_final_state, layout, wanted=wanted, **options)
    spans = Spans.of(layout, num_spans, _longest_uncut(k, do))
    d_final_state = jnp.where(_by_state(spans.is_last), _pick(d_final_state, spans.segment), 0.0)
    starts = jnp.where(_by_state(spans.is_first), 0.0, d_final_state)
    local = scan.backward(*operands, starts, spans.scanned(~spans.is_first), wanted=["d_initial_state"], **options)
    after = _join(transitions, local["d_initial_state"], backward=True)
    after = jnp.where(_by_state(spans.is_last), d_final_state, after)
    out = scan.backward(*operands, after, spans.layout, wanted=wanted, **options)
    return out | ({"d_initial_state": _pick(out["d_initial_state"], spans.first)} if wants_initial else {})
