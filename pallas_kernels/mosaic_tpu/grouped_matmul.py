"""The grouped matmul by ``lax.ragged_dot``, which XLA compiles to a real grouped matmul for a TPU (elsewhere it multiplies
every row by every matrix): the chunks of all rows, brought into the order of their matrices, are one product."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.chunked import CHUNK
from pallas_kernels.gather import gather_sum
from pallas_kernels.segments import where_real

# x [P, D] and dy [P, E] to dw [S, D, E]: group s of the rows of both is contracted.
OF_WEIGHTS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@jax.custom_vjp
def _ragged_dot(x, w, sizes):
    """y_p = x_p w[s] for the p of group s; x [P, D], groups of ``sizes`` rows one after another, w [S, D, E]."""
    y = lax.ragged_dot(x, w, sizes, precision=_precision(x), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _precision(x):
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _ragged_dot_forward(x, w, sizes):
    return _ragged_dot(x, w, sizes), (x, w, sizes)


def _ragged_dot_backward(residuals, dy):
    x, w, sizes = residuals
    dw = lax.ragged_dot_general(
        x, dy, sizes, OF_WEIGHTS, precision=_precision(x), preferred_element_type=jnp.float32
    )  # fmt: skip
    return _ragged_dot(dy, w.mT, sizes), dw.astype(w.dtype), None


_ragged_dot.defvjp(_ragged_dot_forward, _ragged_dot_backward)


def grouped_matmul(x, weights, *, segments, token_of, slot_of, interpret=False):
    """See :func:`pallas_kernels.api.grouped_matmul`; there is nothing to interpret."""
    if token_of is not None:
        x = gather_sum(x, token_of[..., None], slot_of)
    batch, num_slots, width = x.shape
    real = segments.is_real(num_slots)
    chunks = jnp.arange(num_slots // CHUNK)
    is_used = (chunks >= segments.offsets[:, :1] // CHUNK) & (chunks < segments.offsets[:, -1:] // CHUNK)
    # Chunks that nobody owns come last, in no group.
    owner = jnp.where(is_used, segments.segment_of(num_slots)[:, ::CHUNK], segments.num_segments).reshape(-1)
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    sizes = CHUNK * jnp.sum(owner[:, None] == jnp.arange(segments.num_segments), axis=0, dtype=jnp.int32)

    def permute(x, order, place):
        """The chunks of x [B, N, width] in another order, and so in its gradient."""
        return gather_sum(x.reshape(1, -1, CHUNK, x.shape[-1]), order[None, :, None], place[None, :, None])

    ordered = permute(where_real(real, x), order, place).reshape(-1, width)
    products = (_ragged_dot(ordered, w, sizes) for w in weights)
    return tuple(where_real(real, permute(y, place, order).reshape(batch, num_slots, -1)) for y in products)
