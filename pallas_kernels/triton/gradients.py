"""Stage 3 of the recurrences' backward pass: every gradient that a chunk can work out by itself.

With S the state before the chunk, dS the gradient of the state after it, n and y as in scan.py, D the decays within the
chunk and c, t, s the factors of :class:`chunks.Decays`; every product is local to the chunk::

    dP = do n^T      dA = -y n^T
    dq = scale [(dP D) k + c do S^T]
    r  = (dA D) k - c y S^T                    dk = b r + scale (dP D)^T q + (b dA D)^T k + t n dS^T
    db = rowsum(k r) + rowsum(v y)             dv = b y              (what y alone gives is left to recurrence.py)

dA needs no product with the inverse: with u = T b v and w = T b k exp(g), the gradient of T times T^T is
dn u^T + dw w^T = dn (u - w S)^T = dn n^T. Decays: q and the keys of r carry exp(+g), the other keys exp(-g), so that

    dg = rowsum(q dq + k b r - k (dk - b r)),   and on the last slot  + sum(k t n dS^T) + s <S, dS>
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import (
    CHUNK,
    Decays,
    Layout,
    load_rows,
    load_vector,
    scale_rows,
    tile_of,
    within_chunk,
)
from pallas_kernels.triton.launch import KernelConfig, dot, launch

VALUE_TILE = 64


def default_config(dtype, key_width: int) -> KernelConfig:
    """The fastest of those tried on an H200 in bfloat16; in float32 what fits into its shared memory."""
    if dtype == jnp.float32 and key_width >= 64:
        return KernelConfig(tile=32, num_warps=4, num_stages=1)
    return KernelConfig(tile=64, num_warps=4, num_stages=3)


def _kernel(inputs, outputs, *, scale, dtype, value_tile, per_key):
    is_first_tile, chunk = pl.program_id(0) == 0, pl.program_id(1)
    valid = inputs["valid"][chunk]
    rows = pl.ds(chunk * CHUNK, CHUNK)
    key_tile, is_delta = inputs["k"].shape[1], inputs["y"] is not None
    wide = jnp.zeros((CHUNK, key_tile), jnp.float32)
    square, vector = jnp.zeros((CHUNK, CHUNK), jnp.float32), jnp.zeros((CHUNK,), jnp.float32)

    @pl.when(valid == 0)
    def _():
        outputs["dq"][rows, :], outputs["dk"][rows, :] = wide.astype(dtype), wide.astype(dtype)
        for name in ("dg", "dbeta"):
            if name in outputs:
                outputs[name][rows] = vector

    @pl.when(valid > 0)
    def _():
        def values_step(tile, sums):
            columns = pl.ds(tile * value_tile, value_tile)
            do = load_rows(inputs["do"], chunk, valid, columns)
            new = inputs["new"][rows, columns] if is_delta else load_rows(inputs["new"], chunk, valid, columns)
            state, d_state = inputs["states"][chunk, :, columns], inputs["d_states"][chunk, :, columns]
            d_scores, do_state, new_d_state, inner, d_a, y_state = sums
            d_scores += dot(do, new.T, dtype)
            do_state += dot(do, state.T, dtype)
            new_d_state += dot(new, d_state.T, dtype)
            if per_key or inputs["g"] is not None:
                inner += jnp.sum(state.astype(jnp.float32) * d_state.astype(jnp.float32), axis=1)
            if is_delta:
                y = inputs["y"][rows, columns]
                d_a += dot(y, new.T, dtype)
                y_state += dot(y, state.T, dtype)
            return d_scores, do_state, new_d_state, inner, d_a, y_state

        inner = jnp.zeros((key_tile,), jnp.float32)
        d_scores, do_state, new_d_state, inner, d_a, y_state = lax.fori_loop(
            0, inputs["do"].shape[1] // value_tile, values_step, (square, wide, wide, inner, square, wide)
        )  # fmt: skip
        if per_key:
            outputs["dq"][rows, :], outputs["dk"][rows, :] = (scale * do_state).astype(dtype), new_d_state.astype(dtype)
            outputs["d_key_decay"][chunk, :] = inner

            @pl.when(is_first_tile)
            def _():
                outputs["d_scores"][rows, :] = d_scores.astype(dtype)

            return
        beta, carried = load_vector(inputs["beta"], chunk), load_vector(inputs["carried"], chunk)
        within, i = within_chunk(inputs, chunk), jnp.arange(CHUNK)
        q, k = load_rows(inputs["q"], chunk, valid), load_rows(inputs["k"], chunk, valid)
        k32 = k.astype(jnp.float32)
        d_scores = scale * d_scores * within
        dq = dot(d_scores, k, dtype) + scale_rows(do_state, carried, scale)
        at_end = scale_rows(new_d_state, load_vector(inputs["tail"], chunk))
        behind = dot(d_scores.T, q, dtype) + at_end  # what reaches k with exp(-g)
        ahead = wide  # and with exp(+g)
        if is_delta:
            d_a = jnp.where(i[:, None] > i[None, :], -d_a * within, 0.0)
            r = dot(d_a, k, dtype) - scale_rows(y_state, carried)
            outputs["dbeta"][rows] = jnp.sum(k32 * r, axis=1)
            ahead = scale_rows(r, beta)
            behind += dot(scale_rows(d_a, beta).T, k, dtype)
        outputs["dq"][rows, :] = dq.astype(dtype)
        outputs["dk"][rows, :] = (ahead + behind).astype(dtype)
        if inputs["g"] is not None:
            dg = jnp.sum(q.astype(jnp.float32) * dq + k32 * (ahead - behind), axis=1)
            last = jnp.sum(k32 * at_end) + inputs["state"][chunk] * jnp.sum(inner)
            outputs["dg"][rows] = dg + jnp.where(i == CHUNK - 1, last, 0.0)


def gradients(
    q, k, v, g, decays: Decays, beta, new, y, states, d_states, do, layout: Layout, *, scale, interpret, per_key=False,
    config=None,
) -> dict[str, jax.Array]:  # fmt: skip
    """dq, dk [B,N,H,K]; dg and dbeta without its rowsum(v y), float32 [B,H,N], where there are g and beta.

    With ``per_key``, q and k are q' and k' of per_key.py: their gradients, d_scores [B,H,N,C] (neither masked nor scaled)
    and d_key_decay, float32 [B,chunks,H,K]; in chunks without a token only dq and dk are written.
    """
    batch, num_slots, heads, key_width = q.shape
    value_width, num_chunks, dtype = v.shape[3], num_slots // CHUNK, q.dtype
    config = config or default_config(dtype, key_width)
    tile = min(config.tile, key_width)
    tiles, is_delta = key_width // tile, beta is not None

    # Grid (K tiles, chunks, heads, rows): programs that read the same values are neighbours.
    keys = pl.BlockSpec((None, num_slots, None, tile), lambda t, n, h, b: (b, 0, h, t))
    values = pl.BlockSpec((None, num_slots, None, value_width), lambda t, n, h, b: (b, 0, h, 0))
    vector = pl.BlockSpec((None, None, num_slots), lambda t, n, h, b: (b, h, 0))
    state = pl.BlockSpec((None, num_chunks, None, tile, value_width), lambda t, n, h, b: (b, 0, h, t, 0))
    specs = {
        "q": keys, "k": keys, "new": values, "y": values, "do": values, "states": state, "d_states": state,
        "g": vector, "beta": vector, "carried": vector, "tail": vector,
        "state": pl.BlockSpec((None, None, num_chunks), lambda t, n, h, b: (b, h, 0)),
        "valid": pl.BlockSpec((None, num_chunks), lambda t, n, h, b: (b, 0)),
        "run": pl.BlockSpec((None, num_slots), lambda t, n, h, b: (b, 0)),
    }  # fmt: skip
    operands = {
        "q": q, "k": k, "new": new if is_delta else v, "y": y if is_delta else None, "do": do, "states": states,
        "d_states": d_states, "g": g, "beta": beta, "valid": layout.valid, "run": layout.run, **decays._asdict(),
    }  # fmt: skip
    results = {"dq": (keys, q.shape, dtype), "dk": (keys, k.shape, dtype)}
    if per_key:
        square = pl.BlockSpec((None, None, num_slots, CHUNK), lambda t, n, h, b: (b, h, 0, 0))
        of_chunk = pl.BlockSpec((None, num_chunks, None, tile), lambda t, n, h, b: (b, 0, h, t))
        results["d_scores"] = (square, (batch, heads, num_slots, CHUNK), dtype)
        results["d_key_decay"] = (of_chunk, (batch, num_chunks, heads, key_width), jnp.float32)
    partial = pl.BlockSpec((None, None, None, num_slots), lambda t, n, h, b: (t, b, h, 0))
    for name, x in (("dg", g), ("dbeta", beta)):
        if x is not None:
            results[name] = (partial, (tiles, batch, heads, num_slots), jnp.float32)
    out = launch(
        functools.partial(_kernel, scale=scale, dtype=dtype, value_tile=tile_of(value_width, VALUE_TILE), per_key=per_key),
        operands,
        name="recurrence_gradients",
        grid=(tiles, num_chunks, heads, batch),
        in_specs=({name: None if x is None else specs[name] for name, x in operands.items()},),
        out_specs={name: result[0] for name, result in results.items()},
        out_shape={name: jax.ShapeDtypeStruct(*result[1:]) for name, result in results.items()},
        config=config,
        interpret=interpret,
    )
    return {name: jnp.sum(x, axis=0) if name in ("dg", "dbeta") else x for name, x in out.items()}
