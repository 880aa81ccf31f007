"""Stage 1 of linear attention with a log-decay a key, and its gradient: what needs the decay, g cumulative in the chunk::

    P_ij = scale sum_c q_ic k_jc exp(g_ic - g_jc)  for j <= i       q' = q exp(g)    k' = k exp(g_C - g)    a = exp(g_C)

The scan and the gradients through the states then know nothing of g: they take q', k' and the state's decay a. P cannot be
a product of a factor of i and a factor of j over the chunk, because exp(-g) overflows. Blocks of 16 slots: across blocks
both factors are taken relative to the beginning of the later block (backward also: the end of the earlier one) and are at
most 1; inside a block the differences g_i - g_j are formed first, a slot j at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.chunks import CHUNK, Layout, load_rows
from pallas_kernels.triton.launch import KernelConfig, dot, launch

BLOCK = 16
CONFIG = KernelConfig(tile=64, num_warps=4, num_stages=1)


def _same_run(inputs, rows, columns):
    """bool [rows, columns] or True: whether slots are of one run."""
    run = inputs["run"]
    return True if run is None else run[rows][:, None] == run[columns][None, :]


def _run_masks(inputs, rows, last_row):
    """Float masks [rows] of what the carried state reaches, of what reaches the next chunk, and of the state's survival."""
    if inputs["run"] is None:
        return 1.0, 1.0, 1.0
    run, count = inputs["run"][rows], inputs["run"][last_row]
    first, latest, survives = (mask.astype(jnp.float32) for mask in (run == 0, run == count, count == 0))
    return first[:, None], latest[:, None], survives


def _load_block(ref, start, valid, columns=slice(None)):
    """Rows [BLOCK, width] in float32, zero from ``valid`` on."""
    mask = (jnp.arange(BLOCK) < valid)[:, None]
    return plgpu.load(ref.at[pl.ds(start, BLOCK), columns], mask=mask, other=0.0).astype(jnp.float32)


def _load_row(ref, row, is_real, columns):
    return jnp.where(is_real, ref[row, columns].astype(jnp.float32), 0.0)


def _prepare_kernel(inputs, outputs, *, scale, dtype, key_tile):
    chunk = pl.program_id(0)
    begin, valid = chunk * CHUNK, inputs["valid"][chunk]
    rows, last_row = pl.ds(begin, CHUNK), begin + CHUNK - 1
    i, j = jnp.arange(BLOCK), jnp.arange(CHUNK)

    @pl.when(valid > 0)
    def _():
        first, latest, survives = _run_masks(inputs, rows, last_row)

        def keys(tile, scores):
            columns = pl.ds(tile * key_tile, key_tile)
            g, g_end = inputs["g"][rows, columns], inputs["g"][last_row, columns]
            q, k = (load_rows(inputs[name], chunk, valid, columns).astype(jnp.float32) for name in ("q", "k"))
            outputs["q_carried"][rows, columns] = (q * jnp.exp(g) * first).astype(dtype)
            outputs["k_tail"][rows, columns] = (k * jnp.exp(g_end[None, :] - g) * latest).astype(dtype)
            outputs["key_decay"][chunk, columns] = jnp.exp(g_end) * survives

            def one_block(block, score):
                start = begin + BLOCK * block
                q = _load_block(inputs["q"], start, valid - BLOCK * block, columns)
                g_block = inputs["g"][pl.ds(start, BLOCK), columns]
                reference = inputs["g"][start, columns][None, :]
                early = (j < BLOCK * block)[:, None]
                k_early = jnp.where(early, k * jnp.exp(jnp.where(early, reference - g, 0.0)), 0.0)
                score += dot(q * jnp.exp(g_block - reference), k_early.T, dtype)

                def one_key(slot, score):
                    row = start + slot
                    k_row = _load_row(inputs["k"], row, BLOCK * block + slot < valid, columns)
                    decay = jnp.exp(jnp.minimum(g_block - inputs["g"][row, columns][None, :], 0.0))
                    column = jnp.sum(q * k_row[None, :] * decay, axis=1)
                    here = (i >= slot)[:, None] & (j == BLOCK * block + slot)[None, :]
                    return score + jnp.where(here, column[:, None], 0.0)

                return lax.fori_loop(0, BLOCK, one_key, score)

            return tuple(one_block(block, score) for block, score in enumerate(scores))

        blocks = CHUNK // BLOCK
        zero = jnp.zeros((BLOCK, CHUNK), jnp.float32)
        scores = lax.fori_loop(0, inputs["k"].shape[1] // key_tile, keys, (zero,) * blocks)
        for block, score in enumerate(scores):
            at = pl.ds(begin + BLOCK * block, BLOCK)
            outputs["scores"][at, :] = jnp.where(_same_run(inputs, at, rows), scale * score, 0.0).astype(dtype)


def _gradient_kernel(inputs, outputs, *, scale, dtype):
    chunk = pl.program_id(1)
    begin, valid = chunk * CHUNK, inputs["valid"][chunk]
    rows, last_row = pl.ds(begin, CHUNK), begin + CHUNK - 1
    i, j = jnp.arange(BLOCK), jnp.arange(CHUNK)
    shape = (CHUNK, inputs["k"].shape[1])

    @pl.when(valid == 0)
    def _():
        for name in ("dq", "dk", "dg"):
            outputs[name][rows, :] = jnp.zeros(shape, outputs[name].dtype)

    @pl.when(valid > 0)
    def _():
        g, g_end = inputs["g"][rows, :], inputs["g"][last_row, :]
        whole_q, whole_k = (load_rows(inputs[name], chunk, valid).astype(jnp.float32) for name in ("q", "k"))
        at_end = jnp.exp(g_end) * _run_masks(inputs, rows, last_row)[2] * inputs["d_key_decay"][chunk, :]
        for block in range(CHUNK // BLOCK):
            start = begin + BLOCK * block
            at = pl.ds(start, BLOCK)
            q, k = (_load_block(inputs[name], start, valid - BLOCK * block) for name in ("q", "k"))
            g_block, g_start, g_stop = inputs["g"][at, :], inputs["g"][start, :], inputs["g"][start + BLOCK - 1, :]
            first, latest, _ = _run_masks(inputs, at, last_row)

            early = j < BLOCK * block
            d_scores = jnp.where(early[None, :] & _same_run(inputs, at, rows), inputs["d_scores"][at, :], 0.0)
            k_early = whole_k * jnp.exp(jnp.where(early[:, None], g_start[None, :] - g, 0.0))
            dq = jnp.exp(g_block - g_start[None, :]) * dot(d_scores, jnp.where(early[:, None], k_early, 0.0), dtype)

            late = j >= BLOCK * (block + 1)
            d_scores = inputs["d_scores"][rows, pl.ds(BLOCK * block, BLOCK)]
            d_scores = jnp.where(late[:, None] & _same_run(inputs, rows, at), d_scores, 0.0)
            q_late = whole_q * jnp.exp(jnp.where(late[:, None], g - g_stop[None, :], 0.0))
            dk = jnp.exp(g_stop[None, :] - g_block) * dot(d_scores.T, jnp.where(late[:, None], q_late, 0.0), dtype)

            def one_key(slot, sums, start=start, at=at, block=block, q=q, g_block=g_block):
                dq, dk = sums
                row = start + slot
                k_row = _load_row(inputs["k"], row, BLOCK * block + slot < valid, slice(None))
                decay = jnp.exp(jnp.minimum(g_block - inputs["g"][row, :][None, :], 0.0))
                sees = i >= slot
                if inputs["run"] is not None:
                    sees &= inputs["run"][at] == inputs["run"][row]
                d_score = jnp.where(sees, inputs["d_scores"][at, BLOCK * block + slot].astype(jnp.float32), 0.0)[:, None]
                dk_row = jnp.sum(d_score * q * decay, axis=0)
                dk += jnp.where((i == slot)[:, None], dk_row[None, :], 0.0)
                return dq + d_score * k_row[None, :] * decay, dk

            dq, dk = lax.fori_loop(0, BLOCK, one_key, (dq, dk))
            d_carried, d_tail = (inputs[name][at, :].astype(jnp.float32) for name in ("d_q_carried", "d_k_tail"))
            dq = scale * dq + d_carried * jnp.exp(g_block) * first
            dk_tail = d_tail * jnp.exp(g_end[None, :] - g_block) * latest
            dk = scale * dk + dk_tail
            at_end += jnp.sum(k * dk_tail, axis=0)
            is_last = BLOCK * block + i == CHUNK - 1
            outputs["dq"][at, :], outputs["dk"][at, :] = dq.astype(dtype), dk.astype(dtype)
            outputs["dg"][at, :] = q * dq - k * dk + jnp.where(is_last[:, None], at_end[None, :], 0.0)


def _specs(layout: Layout, num_slots: int, width: int, key_axis: bool) -> dict[str, pl.BlockSpec]:
    """Blocks of all arrays by name, for a grid (chunks, heads, rows), or with ``key_axis`` (K tiles, chunks, ...)."""

    def spec(shape, index):
        return pl.BlockSpec(shape, index if key_axis else lambda n, h, b: index(0, n, h, b))

    num_chunks = num_slots // CHUNK
    keys = spec((None, num_slots, None, width), lambda t, n, h, b: (b, 0, h, t))
    square = spec((None, None, num_slots, CHUNK), lambda t, n, h, b: (b, h, 0, 0))
    of_chunk = spec((None, num_chunks, None, width), lambda t, n, h, b: (b, 0, h, t))
    per_row = {
        "valid": spec((None, num_chunks), lambda t, n, h, b: (b, 0)),
        "run": None if layout.run is None else spec((None, num_slots), lambda t, n, h, b: (b, 0)),
    }
    names = ("q", "k", "g", "q_carried", "k_tail", "d_q_carried", "d_k_tail", "dq", "dk", "dg")
    squares, states = dict.fromkeys(("scores", "d_scores"), square), dict.fromkeys(("key_decay", "d_key_decay"), of_chunk)
    return per_row | dict.fromkeys(names, keys) | squares | states


def _call(kernel, name, operands, shapes, layout, specs, *, grid, config, interpret):
    operands = operands | {"valid": layout.valid, "run": layout.run}
    return launch(
        kernel, operands, name=name, grid=grid, in_specs=({name: specs[name] for name in operands},),
        out_specs={name: specs[name] for name in shapes}, out_shape=shapes, config=config, interpret=interpret,
    )  # fmt: skip


def prepare(q, k, g, layout: Layout, *, scale: float, interpret: bool, config: KernelConfig = CONFIG):
    """Scores P [B,H,N,C]; q', k' [B,N,H,K], of q's dtype; a, float32 [B,chunks,H,K]. Unowned chunks are not written.

    Args:
      g: cumulative log-decay in each chunk, float32 [B, N, H, K].
    """
    batch, num_slots, heads, width = q.shape
    keys = jax.ShapeDtypeStruct(q.shape, q.dtype)
    shapes = {
        "scores": jax.ShapeDtypeStruct((batch, heads, num_slots, CHUNK), q.dtype), "q_carried": keys, "k_tail": keys,
        "key_decay": jax.ShapeDtypeStruct((batch, num_slots // CHUNK, heads, width), jnp.float32),
    }  # fmt: skip
    kernel = functools.partial(_prepare_kernel, scale=scale, dtype=q.dtype, key_tile=min(config.tile, width))
    out = _call(
        kernel, "recurrence_per_key", {"q": q, "k": k, "g": g}, shapes, layout,
        _specs(layout, num_slots, width, key_axis=False), grid=(num_slots // CHUNK, heads, batch), config=config,
        interpret=interpret,
    )  # fmt: skip
    return out["scores"], out["q_carried"], out["k_tail"], out["key_decay"]


def gradient(
    q, k, g, d_scores, d_q_carried, d_k_tail, d_key_decay, layout: Layout, *, scale, interpret, config=CONFIG
) -> dict[str, jax.Array]:
    """dq, dk of q's dtype and dg in float32, [B,N,H,K], from the gradients of what :func:`prepare` returns."""
    batch, num_slots, heads, width = q.shape
    tile = min(config.tile, width)
    operands = {
        "q": q, "k": k, "g": g, "d_scores": d_scores, "d_q_carried": d_q_carried, "d_k_tail": d_k_tail,
        "d_key_decay": d_key_decay,
    }  # fmt: skip
    keys = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return _call(
        functools.partial(_gradient_kernel, scale=scale, dtype=q.dtype), "recurrence_per_key_grad", operands,
        {"dq": keys, "dk": keys, "dg": jax.ShapeDtypeStruct(q.shape, jnp.float32)}, layout,
        _specs(layout, num_slots, tile, key_axis=True), grid=(width // tile, num_slots // CHUNK, heads, batch),
        config=config, interpret=interpret,
    )  # fmt: skip
