"""The public ops of decoding, a token at a time: see step.py for the pools of states that they work on."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import check, check_widths, choose
from pallas_kernels.step import Place


def _check_place(op, place: Place, shape):
    """``shape``: [B, R]."""
    for name, expected in (("index", shape), ("continues", shape), ("active", shape[:1])):
        found = getattr(place, name).shape
        check(op, found == expected, f"the shape of place.{name}", found, f"it must be {expected}")


def gated_delta_rule_step(
    q: Float[Array, "B R H K"],
    k: Float[Array, "B R H K"],
    v: Float[Array, "B R H V"],
    log_decay: Float[Array, "B R H"],
    beta: Float[Array, "B R H"],
    states: Float[Array, "L B S H K V"],
    place: Place,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B R H V"], Float[Array, "L B S H K V"]]:
    """One token a row of :func:`gated_delta_rule` into R of the row's states; see there for the arguments.

    Args:
      states: a pool, float32, which a compiled loop updates in place.
      place: the states' places in it.

    Returns:
      o, of v's dtype, and the pool after the token.
    """
    op, batch = "gated_delta_rule_step", q.shape[0]
    check_widths(op, q.shape[3], v.shape[3])
    _check_place(op, place, q.shape[:2])
    expected = {"k": q.shape, "v": q.shape[:3] + states.shape[5:], "log_decay": q.shape[:3], "beta": q.shape[:3]}
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)):
        check(op, x.shape == expected[name], f"the shape of {name}", x.shape, f"it must be {expected[name]}")
    allowed = (states.shape[0], batch, states.shape[2], *q.shape[2:], v.shape[3])
    check(op, states.shape == allowed and states.dtype == jnp.float32, "states", states.aval, f"float32 {allowed}")
    run = choose(op, implementation, {"k": k, "v": v}, interpret)
    return run(q, k, v, log_decay, beta, states, place, scale=q.shape[3] ** -0.5 if scale is None else scale)


def short_convolution_step(
    streams: dict[str, Float[Array, "B R H _"]],
    weights: dict[str, Float[Array, "W H _"]],
    biases: dict[str, Float[Array, "H _"] | None],
    histories: dict[str, Float[Array, "L B S W-1 H _"]],
    place: Place,
    *,
    normalized: tuple[str, ...] = (),
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[dict[str, Float[Array, "B R H _"]], dict[str, Float[Array, "L B S W-1 H _"]]]:
    """One token a row of :func:`short_convolution`, of several streams, into R of the row's states.

    Args:
      histories: pools of the W-1 inputs before, which a compiled loop updates in place.
      normalized: names of the streams whose heads are divided by their l2 norm.

    Returns:
      The outputs, of the streams' dtypes, and the pools after the token.
    """
    op = "short_convolution_step"
    for name, x in streams.items():
        _check_place(op, place, x.shape[:2])
        taps, rest = weights[name].shape[0], x.shape[2:]
        check(op, weights[name].shape[1:] == rest, f"the shape of weights of {name}", weights[name].shape, f"[W, *{rest}]")
        pool = histories[name].shape
        expected = (pool[0], x.shape[0], pool[2], taps - 1, *rest)
        check(op, pool == expected, f"the shape of histories of {name}", pool, f"it must be {expected}")
        is_fit = biases[name] is None or biases[name].shape == rest
        check(op, is_fit, f"the shape of biases of {name}", None if is_fit else biases[name].shape, f"it must be {rest}")
    arrays = {"streams": streams, "weights": weights, "normalized": normalized}
    run = choose(op, implementation, arrays, interpret)
    return run(streams, weights, biases, histories, place, normalized=normalized)


def stacked_matmul(
    x: Float[Array, "R D"],
    weights: tuple[Float[Array, "L _ D _"], ...],
    layer: Int[Array, ""],
    *,
    out_dtype=None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "R _ _"], ...]:
    """y_m = x w[layer, m] for a few rows x, such as those of a step of decoding, whatever the size of the stacks w.

    Args:
      weights: [L, M, D, N] each, of x's dtype; products are accumulated in float32.
      out_dtype: of the results; None: x's.

    Returns:
      y [R, M, N] for each.
    """
    op = "stacked_matmul"
    for w in weights:
        check(op, w.ndim == 4 and x.shape[1:] == w.shape[2:3], "the shape of w", w.shape, f"[L, M, D = {x.shape[1]}, N]")
        check(op, x.dtype == w.dtype, "the dtype of w", w.dtype, f"that of x, {x.dtype}")
    run = choose(op, implementation, {"x": x, "weights": weights}, interpret)
    return run(x, weights, layer, out_dtype=out_dtype or x.dtype)
