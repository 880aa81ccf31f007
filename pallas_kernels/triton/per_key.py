"""Stage 1 of linear attention with a log-decay l a key, and its gradient: what needs the decay, with sums over keys c::

    P_ij = scale sum_c q_ic k_jc exp(l_j+1,c + ... + l_ic)  for j <= i
    q' = q exp(l_first + ... + l_i)      k' = k exp(l_i+1 + ... + l_last)      a = exp(l_first + ... + l_last)

The scan and the gradients through the states then know nothing of l: they take q', k' and the state's decay a. P cannot be
a product of a factor of i and a factor of j over the chunk, because exp(-l) overflows. But the pairs of level b = 1, 2, 4
... 32, with i in an odd block of b slots and j in the even block before it, all have a border of blocks between i and j.
With E_i the decay between i and its border, at most 1, and M_ij one for the pairs i, j and j, i of the level, else zero::

    P   = scale (sum over levels of M (q E) (k E)^T, and q_i . k_i on the diagonal)
    dX  = E (M (dP + dP^T) (X E))  with X = q in odd blocks, k in even ones: the level's share of dq and of dk

The exponents are products of matrices of zeros and ones with l: sums on tensor cores, and nothing cancels in them as it
does in differences of a cumulative sum.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.triton.chunks import CHUNK, Layout, load_rows
from pallas_kernels.triton.launch import KernelConfig, dot, launch
from pallas_kernels.triton.ptx import exp2, fma

LEVELS = CHUNK.bit_length() - 1
LOG2_E = 1.4426950408889634
CONFIG = KernelConfig(tile=64, num_warps=4, num_stages=3)


def _masks() -> dict[str, np.ndarray]:
    """Zeros and ones that the kernels read, because working them out there takes more instructions than all the rest.

    Returns:
      sums: [LEVELS + 2, C, C], the slots j whose decays lie between i and its border: those up to i in an odd block, those
        after i in an even one. The last two are for k' (the chunk is one even block) and q'.
      pairs: [LEVELS, C, C], the pairs i, j of each level, and j, i.
    """
    i, j, level = np.arange(CHUNK)[:, None], np.arange(CHUNK), np.arange(LEVELS + 1)[:, None, None]
    up_to = j <= i
    sums = ((i ^ j) >> level == 0) & (up_to == ((i >> level) & 1 == 1))
    pairs = (i ^ j) >> level[:-1] == 1
    return {"sums": np.concatenate([sums, up_to[None]]).astype(jnp.bfloat16), "pairs": pairs.astype(jnp.bfloat16)}


MASKS = _masks()
FOR_TAIL, FOR_CARRIED = LEVELS, LEVELS + 1


def _parts(x, dtype):
    """Float32 ``x`` as a sum of bfloat16 numbers: two, to 2^-17 of it, or three where results are float32."""
    parts = []
    for _ in range(3 if dtype == jnp.float32 else 2):
        parts.append(x.astype(jnp.bfloat16))
        x -= parts[-1].astype(jnp.float32)
    return parts


def _sum_rows(mask, parts):
    """Sums of x_j over the rows j where ``mask`` [rows, j], x given by its ``parts``."""
    return functools.reduce(jnp.add, [dot(mask, part, jnp.bfloat16) for part in parts])


def _load_log2_decay(inputs, chunk, valid, columns=slice(None)):
    return load_rows(inputs["log_decay"], chunk, valid, columns) * LOG2_E


def _run_masks(inputs, rows, last_row):
    """Float masks [rows] of what the carried state reaches, of what reaches the next chunk, and of the state's survival."""
    if inputs["run"] is None:
        return 1.0, 1.0, 1.0
    run, count = inputs["run"][rows], inputs["run"][last_row]
    first, latest, survives = (mask.astype(jnp.float32) for mask in (run == 0, run == count, count == 0))
    return first[:, None], latest[:, None], survives


def _visible(inputs, rows):
    """bool [C, C]: slot i sees slot j <= i of its run."""
    i = jnp.arange(CHUNK)
    mask = i[:, None] >= i[None, :]
    if inputs["run"] is not None:
        run = inputs["run"][rows]
        mask &= run[:, None] == run[None, :]
    return mask


def _prepare_kernel(inputs, outputs, *, scale, dtype, key_tile, interpret):
    chunk = pl.program_id(0)
    valid, rows, i = inputs["valid"][chunk], pl.ds(chunk * CHUNK, CHUNK), jnp.arange(CHUNK)

    @pl.when(valid > 0)
    def _():
        first, latest, survives = _run_masks(inputs, rows, chunk * CHUNK + CHUNK - 1)

        def keys(tile, sums):
            scores, diagonal = sums
            columns = pl.ds(tile * key_tile, key_tile)
            q, k = (load_rows(inputs[name], chunk, valid, columns) for name in ("q", "k"))
            log_decay = _load_log2_decay(inputs, chunk, valid, columns)
            parts = _parts(log_decay, dtype)

            def decay(level):
                return exp2(_sum_rows(inputs["sums"][level, :, :], parts), interpret)

            outputs["q_carried"][rows, columns] = (q * decay(FOR_CARRIED) * first).astype(dtype)
            outputs["k_tail"][rows, columns] = (k * decay(FOR_TAIL) * latest).astype(dtype)
            outputs["key_decay"][chunk, columns] = exp2(jnp.sum(log_decay, axis=0), interpret) * survives

            def one_level(level, scores):
                to_border = decay(level)
                product = dot(q * to_border, (k * to_border).T, dtype)
                return fma(product, inputs["pairs"][level, :, :].astype(jnp.float32), scores, interpret)

            diagonal += jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1)
            return lax.fori_loop(0, LEVELS, one_level, scores), diagonal

        sums = jnp.zeros((CHUNK, CHUNK), jnp.float32), jnp.zeros((CHUNK,), jnp.float32)
        scores, diagonal = lax.fori_loop(0, inputs["k"].shape[1] // key_tile, keys, sums)
        scores = jnp.where(i[:, None] == i[None, :], diagonal[:, None], scores)
        outputs["scores"][rows, :] = jnp.where(_visible(inputs, rows), scale * scores, 0.0).astype(dtype)


def _gradient_kernel(inputs, outputs, *, scale, dtype, interpret):
    chunk = pl.program_id(1)
    valid, rows, i = inputs["valid"][chunk], pl.ds(chunk * CHUNK, CHUNK), jnp.arange(CHUNK)
    shape = CHUNK, inputs["k"].shape[1]

    @pl.when(valid == 0)
    def _():
        for name in ("dq", "dk", "d_log_decay"):
            outputs[name][rows, :] = jnp.zeros(shape, outputs[name].dtype)

    @pl.when(valid > 0)
    def _():
        first, latest, _ = _run_masks(inputs, rows, chunk * CHUNK + CHUNK - 1)
        q, k = (load_rows(inputs[name], chunk, valid) for name in ("q", "k"))
        parts = _parts(_load_log2_decay(inputs, chunk, valid), dtype)
        d_scores = scale * jnp.where(_visible(inputs, rows), inputs["d_scores"][rows, :], 0.0).astype(jnp.float32)
        diagonal = jnp.sum(jnp.where(i[:, None] == i[None, :], d_scores, 0.0), axis=1)[:, None]
        d_scores = (d_scores + d_scores.T).astype(dtype)

        def decay(level):
            return exp2(_sum_rows(inputs["sums"][level, :, :], parts), interpret)

        def one_level(level, sums):
            dq, dk = sums
            is_odd, to_border = ((i >> level) & 1 == 1)[:, None], decay(level)
            d_pairs = d_scores * inputs["pairs"][level, :, :].astype(dtype)
            share = to_border * dot(d_pairs, jnp.where(is_odd, q, k) * to_border, dtype)
            odd = is_odd.astype(jnp.float32)
            return fma(share, odd, dq, interpret), fma(share, 1 - odd, dk, interpret)

        dq, dk = lax.fori_loop(0, LEVELS, one_level, (diagonal * k, diagonal * q))
        dq += inputs["d_q_carried"][rows, :] * decay(FOR_CARRIED) * first
        dk_tail = inputs["d_k_tail"][rows, :] * decay(FOR_TAIL) * latest
        dk += dk_tail
        outputs["dq"][rows, :], outputs["dk"][rows, :] = dq.astype(dtype), dk.astype(dtype)
        # The sum of l up to a slot gets q dq - k dk, that up to the last slot also what k' and a give. l is part of all sums
        # from its slot on.
        at_end = jnp.sum(k * dk_tail, axis=0) + inputs["key_decay"][chunk, :] * inputs["d_key_decay"][chunk, :]
        from_here = inputs["sums"][FOR_CARRIED, :, :].T
        d_log_decay = _sum_rows(from_here, _parts(q * dq - k * dk, dtype)) + at_end[None, :]
        outputs["d_log_decay"][rows, :] = jnp.where((i < valid)[:, None], d_log_decay, 0.0)


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
    masks = {name: spec(mask.shape, lambda t, n, h, b: (0, 0, 0)) for name, mask in MASKS.items()}
    names = ("q", "k", "log_decay", "q_carried", "k_tail", "d_q_carried", "d_k_tail", "dq", "dk", "d_log_decay")
    squares, states = dict.fromkeys(("scores", "d_scores"), square), dict.fromkeys(("key_decay", "d_key_decay"), of_chunk)
    return masks | per_row | dict.fromkeys(names, keys) | squares | states


def _call(kernel, name, operands, shapes, layout, specs, *, grid, config, interpret):
    operands = operands | MASKS | {"valid": layout.valid, "run": layout.run}
    return launch(
        kernel, operands, name=name, grid=grid, in_specs=({name: specs[name] for name in operands},),
        out_specs={name: specs[name] for name in shapes}, out_shape=shapes, config=config, interpret=interpret,
    )  # fmt: skip


def prepare(q, k, log_decay, layout: Layout, *, scale: float, interpret: bool, config: KernelConfig = CONFIG):
    """Scores P [B,H,N,C]; q', k' [B,N,H,K], of q's dtype; a, float32 [B,chunks,H,K]. Unowned chunks are not written.

    Args:
      log_decay: float32 [B, N, H, K].
    """
    batch, num_slots, heads, width = q.shape
    keys = jax.ShapeDtypeStruct(q.shape, q.dtype)
    shapes = {
        "scores": jax.ShapeDtypeStruct((batch, heads, num_slots, CHUNK), q.dtype), "q_carried": keys, "k_tail": keys,
        "key_decay": jax.ShapeDtypeStruct((batch, num_slots // CHUNK, heads, width), jnp.float32),
    }  # fmt: skip
    kernel = functools.partial(
        _prepare_kernel, scale=scale, dtype=q.dtype, key_tile=min(config.tile, width), interpret=interpret
    )
    out = _call(
        kernel, "recurrence_per_key", {"q": q, "k": k, "log_decay": log_decay}, shapes, layout,
        _specs(layout, num_slots, width, key_axis=False), grid=(num_slots // CHUNK, heads, batch), config=config,
        interpret=interpret,
    )  # fmt: skip
    return out["scores"], out["q_carried"], out["k_tail"], out["key_decay"]


def gradient(
    q, k, log_decay, key_decay, d_scores, d_q_carried, d_k_tail, d_key_decay, layout: Layout, *, scale, interpret,
    config=CONFIG,
) -> dict[str, jax.Array]:  # fmt: skip
    """dq, dk of q's dtype and d_log_decay in float32, [B,N,H,K], from the gradients of what :func:`prepare` returns."""
    batch, num_slots, heads, width = q.shape
    tile = min(config.tile, width)
    operands = {
        "q": q, "k": k, "log_decay": log_decay, "key_decay": key_decay, "d_scores": d_scores,
        "d_q_carried": d_q_carried, "d_k_tail": d_k_tail, "d_key_decay": d_key_decay,
    }  # fmt: skip
    keys = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return _call(
        functools.partial(_gradient_kernel, scale=scale, dtype=q.dtype, interpret=interpret), "recurrence_per_key_grad",
        operands,
        {"dq": keys, "dk": keys, "d_log_decay": jax.ShapeDtypeStruct(q.shape, jnp.float32)}, layout,
        _specs(layout, num_slots, tile, key_axis=True), grid=(width // tile, num_slots // CHUNK, heads, batch),
        config=config, interpret=interpret,
    )  # fmt: skip
