"""The output norm's kernels against plain JAX: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import to_tokens
from numerics import LIMITS, assert_close

from mom_jax.routing import Dispatch
from pallas_kernels.layer_ops import rms_norm
from pallas_kernels.triton.gated_rms_norm import combine_gated_rms_norm
from pallas_kernels.triton.launch import KernelConfig

EPS = 1e-5
CONFIG = KernelConfig(tile=16, num_warps=1)  # does not divide the tokens of these tests


def plain(a):
    y = rms_norm(a["o"], a["scale"], EPS) if "scale" in a else a["o"]
    return y * jax.nn.silu(a["gate"]) if "gate" in a else y


def values_and_gradients(f, arguments, cotangent):
    def run(arguments, cotangent):
        y, pull = jax.vjp(f, arguments)
        return y, pull(cotangent)[0]

    return jax.jit(run)(arguments, cotangent)


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize(
    "heads, width, has_norm, has_gate, has_shared, dtype",
    [
        (4, 16, True, True, True, "float32"), (3, 48, True, False, False, "bfloat16"),
        (1, 1280, True, True, False, "float32"), (2, 48, False, False, True, "float32"),
    ],
)  # fmt: skip
def test_combine(interpret, rng, heads, width, has_norm, has_gate, has_shared, dtype):
    """Padded tokens have no slot, dead slots hold NaN, and the gradient of those is zero."""
    batch, num_tokens, memories = 2, 35, 4
    chosen = np.stack([rng.permutation(memories)[:2] for _ in range(batch * num_tokens)]).reshape(batch, num_tokens, 2)
    if has_shared:
        chosen = np.pad(chosen, [(0, 0), (0, 0), (0, 1)], constant_values=memories)
    mask = jnp.asarray(rng.uniform(size=(batch, num_tokens)) < 0.9)
    chosen = jnp.asarray(chosen, jnp.int32)
    dispatch = jax.jit(lambda: Dispatch.of(chosen, mask, memories + has_shared, has_shared))()
    num_slots = dispatch.token_of.shape[1]
    real = dispatch.segments.is_real(num_slots)[..., None, None]
    arguments = {
        "o": jnp.where(real, normal(rng, batch, num_slots, heads, width, dtype=dtype), 0),
        "weights": normal(rng, *chosen.shape),
    }  # fmt: skip
    if has_norm:
        arguments["scale"] = normal(rng, width)
    if has_gate:
        arguments["gate"] = normal(rng, batch, num_tokens, heads, width, dtype=dtype)

    def kernels(a):
        return combine_gated_rms_norm(
            a["o"], a["weights"], a.get("gate"), a.get("scale"), EPS, slot_of=dispatch.slot_of, token_of=dispatch.token_of,
            choice_of=dispatch.choice_of, config=CONFIG, interpret=interpret,
        )  # fmt: skip

    def combined(a):
        o = a["o"].astype(jnp.float32) * dispatch.choices_to_slots(a["weights"])[..., None, None]
        return plain(a | {"o": to_tokens(dispatch, o)}).astype(dtype)

    cotangent = normal(rng, batch, num_tokens, heads, width, dtype=dtype)
    actual = values_and_gradients(kernels, arguments | {"o": jnp.where(real, arguments["o"], jnp.nan)}, cotangent)
    assert_close(actual, values_and_gradients(combined, arguments, cotangent), LIMITS[dtype])
    assert not np.asarray(actual[1]["o"], np.float32)[~np.asarray(real[..., 0, 0])].any()
