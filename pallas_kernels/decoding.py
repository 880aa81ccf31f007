"""The public ops of decoding, a token at a time: see step.py for the pools of states that they work on."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import check, check_widths, choose
from pallas_kernels.step import Place


def _check_shape(op, name, x, expected):
    """Of an argument that may be None."""
    if x is not None:
        check(op, x.shape == expected, f"the shape of {name}", x.shape, f"it must be {expected}")


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
    streams: dict[str, Float[Array, "B _ H _"]],
    weights: dict[str, Float[Array, "L W H _"]],
    biases: dict[str, Float[Array, "L H _"] | None],
    histories: dict[str, Float[Array, "L B S W-1 H _"]],
    place: Place,
    *,
    normalized: tuple[str, ...] = (),
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[dict[str, Float[Array, "B R H _"]], dict[str, Float[Array, "L B S W-1 H _"]]]:
    """One token a row of :func:`short_convolution`, of several streams, into R of the row's states.

    Args:
      streams: what the token gives to each of the row's states [B, S, ...], or alike to all [B, 1, ...].
      weights, biases: of all layers; those of ``place.layer`` are used.
      histories: pools of the W-1 inputs before, which a compiled loop updates in place.
      normalized: names of the streams whose heads are divided by their l2 norm.

    Returns:
      The outputs, of the streams' dtypes, and the pools after the token.
    """
    op = "short_convolution_step"
    check(op, set(normalized) <= set(streams), "normalized", normalized, f"names of streams: {', '.join(streams)}")
    for name, x in streams.items():
        pool = histories[name].shape
        _check_place(op, place, (x.shape[0], place.index.shape[1]))
        check(op, x.shape[1] in (1, pool[2]), f"the shape of streams of {name}", x.shape, f"[B, S = {pool[2]} or 1, H, C]")
        taps, rest = weights[name].shape[1], x.shape[2:]
        fits = weights[name].shape == (pool[0], taps, *rest)
        check(op, fits, f"the shape of weights of {name}", weights[name].shape, f"[L, W, *{rest}]")
        expected = (pool[0], x.shape[0], pool[2], taps - 1, *rest)
        check(op, pool == expected, f"the shape of histories of {name}", pool, f"it must be {expected}")
        _check_shape(op, f"biases of {name}", biases[name], (pool[0], *rest))
    arrays = {"streams": streams, "weights": weights, "normalized": normalized}
    run = choose(op, implementation, arrays, interpret)
    return run(streams, weights, biases, histories, place, normalized=normalized)


def stacked_matmul(
    x: Float[Array, "R D"],
    weights: tuple[tuple[Float[Array, "L _ D _"], ...], ...],
    layer: Int[Array, ""],
    *,
    scale: Float[Array, "L D"] | None = None,
    eps: float = 0.0,
    gate: Float[Array, "R D"] | None = None,
    residual: Float[Array, "R _"] | None = None,
    chosen: Int[Array, "R _"] | None = None,
    out_dtypes: tuple | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "R _ _"], ...]:
    """Products of a few rows x, such as those of a step of decoding, with matrices w where they lie in their stacks::

        y_m = silu(gate) rms_norm(x, scale[layer], eps) w[layer, m] + residual

    Args:
      weights: groups of stacks [L, M, D, N] of x's dtype; a group is one stack whose matrices follow one another in order.
      scale, gate, residual: None: no norm, no gate, nothing is added.
      chosen: matrices that the rows want of the groups of more than one; what no row wants may come out as 0.
      out_dtypes: of each group's result; None: x's. Products are accumulated in float32.

    Returns:
      y [R, M, N] for each group, M that of all its stacks.
    """
    op, (rows, depth), layers = "stacked_matmul", x.shape, weights[0][0].shape[0]
    for stacks in weights:
        for w in stacks:
            allowed = f"[L = {layers}, M, D = {depth}, N = {stacks[0].shape[-1]}]"
            fits = w.ndim == 4 and (w.shape[0], *w.shape[2:]) == (layers, depth, stacks[0].shape[-1])
            check(op, fits, "the shape of w", w.shape, allowed)
            check(op, x.dtype == w.dtype, "the dtype of w", w.dtype, f"that of x, {x.dtype}")
        if residual is not None:
            _check_shape(op, "residual", residual, (rows, stacks[0].shape[3]))
    _check_shape(op, "gate", gate, x.shape)
    _check_shape(op, "scale", scale, (layers, depth))
    check(op, chosen is None or len(chosen) == rows, "chosen", chosen is not None and chosen.shape, f"[R = {rows}, any]")
    out_dtypes = (x.dtype,) * len(weights) if out_dtypes is None else out_dtypes
    check(op, len(out_dtypes) == len(weights), "out_dtypes", out_dtypes, f"one of each of the {len(weights)} groups")
    run = choose(op, implementation, {"x": x, "weights": weights}, interpret)
    options = {"scale": scale, "eps": eps, "gate": gate, "residual": residual, "chosen": chosen, "out_dtypes": out_dtypes}
    return run(x, weights, layer, **options)


def router_step(
    x: Float[Array, "R D"],
    scale: Float[Array, "L D"],
    weight: Float[Array, "L D M"],
    bias: Float[Array, "L M"] | None,
    layer: Int[Array, ""],
    *,
    eps: float,
    top_k: int,
    has_shared: bool,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Int[Array, "R _"], Float[Array, "R _"], Float[Array, "R M"]]:
    """:func:`route` of a few rows: logits = rms_norm(x, scale[layer], eps) weight[layer], in float32.

    Returns:
      The memories and their weights [R, top_k + has_shared], and the logits.
    """
    op = "router_step"
    layers, depth, memories = weight.shape
    _check_shape(op, "x", x, (len(x), depth))
    _check_shape(op, "scale", scale, (layers, depth))
    _check_shape(op, "bias", bias, (layers, memories))
    check(op, 0 < top_k <= memories, "top_k", top_k, f"from 1 to M = {memories}")
    run = choose(op, implementation, {"weight": weight}, interpret)
    return run(x, scale, weight, bias, layer, eps=eps, top_k=top_k, has_shared=has_shared)


def combine_step(
    o: Float[Array, "B R H V"],
    weights: Float[Array, "B R"],
    gate: Float[Array, "B H V"] | None,
    scale: Float[Array, "L V"],
    layer: Int[Array, ""],
    *,
    eps: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B H V"]:
    """rms_norm(sum over r of weights_r o_r, scale[layer], eps) * silu(gate), of o's dtype; ``gate`` None: no gate."""
    op, (batch, chosen, heads, width) = "combine_step", o.shape
    _check_shape(op, "weights", weights, (batch, chosen))
    _check_shape(op, "gate", gate, (batch, heads, width))
    _check_shape(op, "scale", scale, (scale.shape[0], width))
    run = choose(op, implementation, {"o": o}, interpret)
    return run(o, weights, gate, scale, layer, eps=eps)
