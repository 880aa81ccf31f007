"""What a row of ragged segments is.

A row of N slots is cut into S segments that begin at multiples of ``SEGMENT_ALIGNMENT``; the first ``lengths[s]`` slots
of segment s are real and the rest of its slots are dead. Every op masks dead slots itself, whatever they hold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SEGMENT_ALIGNMENT = 64


class Segments(NamedTuple):
    """Rows of ragged segments.

    Attributes:
      offsets: int32 [B, S+1], ascending multiples of ``SEGMENT_ALIGNMENT``; segment s of row b owns the slots from
        ``offsets[b, s]`` up to but not including ``offsets[b, s+1]``. Slots before ``offsets[b, 0]`` and from
        ``offsets[b, S]`` on belong to nobody.
      lengths: int32 [B, S], real slots of each segment, at its start.
    """

    offsets: Int[Array, "B S+1"]
    lengths: Int[Array, "B S"]

    @classmethod
    def from_lengths(cls, lengths: Int[Array, "B S"]) -> "Segments":
        """Segments one after another, each rounded up to the alignment."""
        slots = -(-lengths // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
        offsets = jnp.pad(jnp.cumsum(slots, axis=-1), [(0, 0)] * (lengths.ndim - 1) + [(1, 0)])
        return cls(offsets.astype(jnp.int32), lengths.astype(jnp.int32))

    @classmethod
    def full(cls, batch: int, num_slots: int) -> "Segments":
        """One segment a row, all of whose ``num_slots`` slots are real."""
        return cls.from_lengths(jnp.full((batch, 1), num_slots, jnp.int32))

    @property
    def num_segments(self) -> int:
        return self.lengths.shape[-1]

    def segment_of(self, num_slots: int) -> Int[Array, "B N"]:
        """The segment that owns each slot; S-1 for slots that nobody owns."""
        ends = self.offsets[:, 1:]
        owner = jnp.sum(jnp.arange(num_slots)[None, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32)
        return jnp.minimum(owner, self.num_segments - 1)

    def rank(self, num_slots: int) -> Int[Array, "B N"]:
        """Each slot's place in its segment, from 0."""
        starts = jnp.take_along_axis(self.offsets, self.segment_of(num_slots), axis=1)
        return jnp.arange(num_slots, dtype=jnp.int32) - starts

    def is_real(self, num_slots: int) -> Bool[Array, "B N"]:
        """Whether each slot holds a token."""
        rank = self.rank(num_slots)
        return (rank >= 0) & (rank < jnp.take_along_axis(self.lengths, self.segment_of(num_slots), axis=1))

    def starts_run(self, run_ids: Int[Array, "B N"]) -> Bool[Array, "B N"]:
        """Whether a slot's token belongs to another run than the token before it in its segment.

        A segment's first token never does: the initial state is taken to be of its run.
        """
        num_slots = run_ids.shape[1]
        changed = run_ids != jnp.roll(run_ids, 1, axis=1)
        return changed & (self.rank(num_slots) > 0) & self.is_real(num_slots)


def where_real(real: Bool[Array, "B N"], x: jax.Array) -> jax.Array:
    """``x`` [B, N, ...] with zeros in dead slots, whatever they held (a product would keep NaN)."""
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)


def states_or_zeros(states: jax.Array | None, k: jax.Array, v: jax.Array, num_segments: int) -> jax.Array:
    """``states`` float32 [B, S, H, K, V] as they are, or zeros for None."""
    shape = (k.shape[0], num_segments, k.shape[2], k.shape[3], v.shape[3])
    return jnp.zeros(shape, jnp.float32) if states is None else states
