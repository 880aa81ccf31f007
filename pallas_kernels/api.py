"""The public sequence ops: one signature, one validation and one dispatch loop (dispatch.py) for every implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.decoding import combine_step, gated_delta_rule_step, router_step, short_convolution_step, stacked_matmul
from pallas_kernels.dispatch import check, check_widths, choose, unsupported_reason
from pallas_kernels.gather import gather_sum
from pallas_kernels.handover import Handover, run_along
from pallas_kernels.layer_ops import convolution_history, gated_rms_norm, l2_norm, rms_norm, route
from pallas_kernels.segments import SEGMENT_ALIGNMENT, Segments
from pallas_kernels.step import Place, states_at, with_states
from pallas_kernels.triton import CHUNK_MATRICES

__all__ = [
    "Handover", "Place", "SEGMENT_ALIGNMENT", "Segments", "WORTH_KEEPING", "combine", "combine_gated_rms_norm",
    "combine_step", "convolution_history", "gated_delta_rule", "gated_delta_rule_step", "gated_rms_norm", "gather_sum",
    "grouped_matmul", "l2_norm", "linear_attention", "linear_cross_entropy", "rms_norm", "route", "router_step",
    "short_convolution", "short_convolution_step", "stacked_matmul", "states_at", "unsupported_reason", "with_states",
]  # fmt: skip

# Names, for policies of jax.checkpoint, of results that take little memory for what they cost to compute again.
WORTH_KEEPING = ("grouped_matmul", "combine_gated_rms_norm", CHUNK_MATRICES)


def _run(op, q, k, v, log_decay, gates, segments, run_ids, initial_state, scale, handover, implementation, interpret):
    """Validates, fills in defaults, pads to the alignment, runs and cuts the padding off again."""
    check(op, q.ndim == 4, "the shape of q", q.shape, "it must be [B, N, H, K]")
    batch, num_slots, heads, key_width = q.shape
    check(op, k.shape == q.shape, "the shape of k", k.shape, f"it must be that of q, {q.shape}")
    check(op, v.shape[:3] == q.shape[:3] and v.ndim == 4, "the shape of v", v.shape, f"it must be {q.shape[:3]} + [V]")
    value_width = v.shape[3]
    check_widths(op, key_width, value_width)
    is_number = scale is None or not isinstance(scale, jax.Array)
    check(op, is_number, "scale", scale, "a Python number or None: multiply q by what is computed")
    check(op, num_slots > 0, "N", num_slots, "there must be at least one slot")
    for name, x in (("q", q), ("k", k), ("v", v)):
        allowed = x.dtype in (jnp.float32, jnp.bfloat16)
        check(op, allowed and x.dtype == v.dtype, f"the dtype of {name}", x.dtype, "q, k, v: float32 or bfloat16, alike")
    if log_decay is not None:
        shapes = (q.shape[:3], q.shape)
        check(op, log_decay.shape in shapes, "the shape of log_decay", log_decay.shape, f"one of {shapes}")
    for gate in gates:
        check(op, gate.shape == q.shape[:3], "the shape of beta", gate.shape, f"it must be {q.shape[:3]}")
    if run_ids is not None:
        check(op, run_ids.shape == q.shape[:2], "the shape of run_ids", run_ids.shape, f"it must be {q.shape[:2]}")
    segments = _check_segments(op, segments, batch, num_slots)
    state_shape = (batch, segments.num_segments, heads, key_width, value_width)
    if initial_state is not None:
        shape, allowed = initial_state.shape, f"it must be [B, S, H, K, V] = {state_shape}"
        check(op, shape == state_shape, "the shape of initial_state", shape, allowed)
        initial_state = initial_state.astype(jnp.float32)

    arrays = {"k": k, "v": v, "log_decay": log_decay}
    if handover is not None:  # final_states has K more columns
        arrays["v"] = jax.ShapeDtypeStruct((*v.shape[:3], value_width + key_width), v.dtype)
    functions = choose(op, implementation, arrays, interpret, also=("final_states",))
    pad = -num_slots % SEGMENT_ALIGNMENT
    padded = [None if x is None else _pad_slots(x, pad) for x in (q, k, v, log_decay, *gates, run_ids)]
    scale, (*arrays, run_ids) = key_width**-0.5 if scale is None else scale, padded
    run, final_states = (partial(function, scale=scale) for function in functions)
    if handover is None:
        o, final_state = run(*arrays, segments=segments, run_ids=run_ids, initial_state=initial_state)
    else:
        o, final_state = run_along(run, final_states, tuple(arrays), initial_state, segments, run_ids, handover)
    return o[:, :num_slots], final_state


def _pad_slots(x, pad):
    return jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) if pad else x


def _check_segments(op: str, segments: Segments | None, batch: int, num_slots: int) -> Segments:
    if segments is None:
        return Segments.full(batch, num_slots)
    slots = f"N = {num_slots}"
    check(op, num_slots % SEGMENT_ALIGNMENT == 0, "N", num_slots, f"with segments a multiple of {SEGMENT_ALIGNMENT}")
    count = segments.num_segments
    shapes = (segments.offsets.shape, segments.lengths.shape)
    check(op, shapes == ((batch, count + 1), (batch, count)), "the shape of segments", shapes, "[B, S+1] and [B, S]")
    if not isinstance(segments.offsets, jax.core.Tracer) and not isinstance(segments.lengths, jax.core.Tracer):
        offsets, lengths = jax.device_get(segments)
        owned = offsets[:, 1:] - offsets[:, :-1]
        aligned = not (offsets % SEGMENT_ALIGNMENT).any() and (offsets[:, 0] >= 0).all() and (owned >= 0).all()
        allowed = f"ascending multiples of {SEGMENT_ALIGNMENT} up to {slots}"
        check(op, bool(aligned and (offsets <= num_slots).all()), "segments.offsets", offsets.tolist(), allowed)
        fits = bool((lengths >= 0).all() and (lengths <= owned).all())
        check(op, fits, "segments.lengths", lengths.tolist(), "from 0 to the slots that the segment owns")
    return segments


def gated_delta_rule(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B N H K"],
    v: Float[Array, "B N H V"],
    log_decay: Float[Array, "B N H"] | Float[Array, "B N H K"] | None,
    beta: Float[Array, "B N H"],
    *,
    segments: Segments | None = None,
    run_ids: Int[Array, "B N"] | None = None,
    initial_state: Float[Array, "B S H K V"] | None = None,
    scale: float | None = None,
    handover: Handover | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H V"], Float[Array, "B S H K V"]]:
    """The gated delta rule (arXiv 2412.06464, eq. 10; without decay the delta rule, arXiv 2406.06484)::

        S_t = a_t S_{t-1} + b_t k_t (v_t - (a_t S_{t-1})^T k_t)^T          o_t = scale * S_t^T q_t

    Args:
      q, k: queries and keys; K is a power of two up to 256. Keys are expected with norm at most 1.
      v: values; V is a multiple of 16 up to 1280.
      log_decay: log a_t <= 0 and finite, a head or a key; None: a_t = 1.
      beta: b_t, in [0, 1].
      segments: ragged segments, each with its own state; dead slots are masked here. None: one full segment a row.
      run_ids: non-decreasing in a segment's real slots; the state restarts from zero where they change. The initial state
        belongs to the run of the segment's first token.
      initial_state: float32 states before each segment; None: zeros.
      scale: factor of q, a Python number; None: K^-1/2.
      handover: inside ``shard_map``, how segments go on from device to device; the initial state is then the first device's
        and the final states are those after this device's part. None: they do not.
      implementation: "triton" (NVIDIA GPUs), "mosaic_tpu" (TPUs), "chunked", "reference" or None (the first of them that
        supports the call).
      interpret: run Pallas kernels in the interpreter; nothing to implementations in plain JAX.

    Returns:
      o, of v's dtype, zero in dead slots; and the final states, float32 (of a segment's last run).

    Raises:
      ValueError: a shape, dtype or segment is not allowed. NotImplementedError: the named implementation cannot run this.
    """
    return _run(
        "gated_delta_rule", q, k, v, log_decay, (beta,), segments, run_ids, initial_state, scale, handover,
        implementation, interpret,
    )  # fmt: skip


def linear_attention(
    q: Float[Array, "B N H K"],
    k: Float[Array, "B N H K"],
    v: Float[Array, "B N H V"],
    log_decay: Float[Array, "B N H"] | Float[Array, "B N H K"] | None = None,
    *,
    segments: Segments | None = None,
    run_ids: Int[Array, "B N"] | None = None,
    initial_state: Float[Array, "B S H K V"] | None = None,
    scale: float | None = None,
    handover: Handover | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H V"], Float[Array, "B S H K V"]]:
    """Linear attention (arXiv 2006.16236) with no decay, a decay a head (RetNet, Mamba-2) or a key (GLA, arXiv 2312.06635)::

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T          o_t = scale * S_t^T q_t

    Arguments, results and errors are those of :func:`gated_delta_rule`, without ``beta``.
    """
    return _run(
        "linear_attention", q, k, v, log_decay, (), segments, run_ids, initial_state, scale, handover,
        implementation, interpret,
    )  # fmt: skip


def grouped_matmul(
    x: Float[Array, "B T D"],
    w: Float[Array, "S D E"] | tuple[Float[Array, "S D _"], ...],
    segments: Segments,
    *,
    token_of: Int[Array, "B N"] | None = None,
    slot_of: Int[Array, "B T R"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B N E"] | tuple[Float[Array, "B N _"], ...]:
    """Multiplies the slots of segment s by ``w[s]``: y_n = x_n w[segment of n], zero in dead slots.

    For several products of the same x give a tuple of w, for a tuple of y: the gradient of x is then found in one pass.

    Args:
      x: slots, N a multiple of the alignment; with ``token_of`` tokens, of which each slot n takes row token_of[n].
      w: a matrix for every segment, of x's dtype; products are accumulated in float32.
      segments: at most S segments a row.
      token_of: the token of each slot, T for dead slots; given together with ``slot_of``.
      slot_of: the slots of each token, N for none: over them the gradient of x is summed.

    Returns:
      y, of x's dtype.
    """
    op, weights = "grouped_matmul", w if isinstance(w, tuple) else (w,)
    for w_ in weights:
        shapes_fit = x.ndim == w_.ndim == 3 and x.shape[2] == w_.shape[1] and w_.shape[0] == segments.num_segments
        check(op, shapes_fit, "the shapes of x and w", (x.shape, w_.shape), "[B, N, D] and [S, D, E]")
    check(op, (token_of is None) == (slot_of is None), "one of token_of and slot_of", None, "give both or neither")
    num_slots = x.shape[1] if token_of is None else token_of.shape[1]
    segments = _check_segments(op, segments, x.shape[0], num_slots)
    for name, array in (("x", x), *(("w", w_) for w_ in weights)):
        allowed = array.dtype in (jnp.float32, jnp.bfloat16) and array.dtype == x.dtype
        check(op, allowed, f"the dtype of {name}", array.dtype, "x and w: float32 or bfloat16, alike")
    run = choose(op, implementation, {"x": x, "w": weights}, interpret)
    products = run(x, weights, segments=segments, token_of=token_of, slot_of=slot_of)
    products = tuple(checkpoint_name(y, op) for y in products)
    return products if isinstance(w, tuple) else products[0]


def short_convolution(
    x: Float[Array, "B P H K"],
    weight: Float[Array, "W H K"],
    bias: Float[Array, "H K"] | None,
    segments: Segments,
    run_ids: Int[Array, "B N"] | None = None,
    history: Float[Array, "B S W-1 H K"] | None = None,
    *,
    normalize: bool = False,
    token_of: Int[Array, "B N"] | None = None,
    slot_of: Int[Array, "B T R"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H K"]:
    """Depthwise causal convolution with SiLU over the tokens of each segment; with ``normalize``, l2 norm of each head::

        s_n = silu(bias + sum_w weight[W-1-w] x_{n-w})        y_n = s_n / sqrt(sum_k s_nk^2 + 1e-6)   or   y_n = s_n

    x before a segment's first token is its history, else zero. Taps never reach into another segment or run.

    Args:
      x: slots, of the compute type; with ``token_of`` tokens, of which each slot n takes row token_of[n].
      weight: float32; the last tap is the current token's.
      run_ids: see :func:`gated_delta_rule`; taps stop where they change.
      history: the W-1 inputs before each segment's first slot, which are of that token's run; None: zeros.
      token_of, slot_of: see :func:`grouped_matmul`.

    Returns:
      y, of x's dtype; the arithmetic is float32. What dead slots get is not said: the ops that follow mask them.
    """
    op = "short_convolution"
    check(op, (token_of is None) == (slot_of is None), "one of token_of and slot_of", None, "give both or neither")
    shapes_fit = x.ndim == weight.ndim + 1 and weight.shape[1:] == x.shape[2:]
    check(op, shapes_fit, "the shapes of x and weight", (x.shape, weight.shape), "[B, N, H, K] and [W, H, K]")
    run = choose(op, implementation, {"x": x, "normalize": normalize}, interpret)
    return run(x, weight, bias, segments, run_ids, history, normalize=normalize, token_of=token_of, slot_of=slot_of)


def combine(
    o: Float[Array, "B N H V"],
    weights: Float[Array, "B T R"],
    *,
    slot_of: Int[Array, "B T R"],
    token_of: Int[Array, "B N"],
    choice_of: Int[Array, "B N"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """The weighted sum over each token's slots, o_t = sum_r weights[t, r] o[slot_of[t, r]].

    Arguments and result are those of :func:`combine_gated_rms_norm`.
    """
    run = choose("combine", implementation, {"x": o}, interpret)
    return run(o, weights, slot_of=slot_of, token_of=token_of, choice_of=choice_of)


def combine_gated_rms_norm(
    o: Float[Array, "B N H V"],
    weights: Float[Array, "B T R"],
    gate: Float[Array, "B T H V"] | None,
    scale: Float[Array, "V"],
    eps: float,
    *,
    slot_of: Int[Array, "B T R"],
    token_of: Int[Array, "B N"],
    choice_of: Int[Array, "B N"],
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """The weighted sum over each token's slots, root-mean-square norm over each head, and a SiLU gate::

        o_t = sum_r weights[t, r] o[slot_of[t, r]]        y_t = o_t / sqrt(mean_v(o_tv^2) + eps) * scale * silu(gate_t)

    Args:
      o: slots; what dead slots hold does not matter.
      weights: float32. gate: None: no gate.
      slot_of: each token's slots, N for none; its inverse is ``token_of``, each slot's token, T if dead, with
        ``choice_of``, token * R + r.

    Returns:
      y, of o's dtype, zero for tokens without a slot.
    """
    run = choose("combine_gated_rms_norm", implementation, {"x": o}, interpret)
    y = run(o, weights, gate, scale, eps, slot_of=slot_of, token_of=token_of, choice_of=choice_of)
    return checkpoint_name(y, "combine_gated_rms_norm")


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D O"] | Float[Array, "O D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int,
    transposed: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the tokens with a target: of -log softmax(hidden head)[target], and of the right first guesses.

    Logits exist for ``chunk`` tokens of every row at a time and are computed once: when the first sum is differentiated (the
    second has no gradient), the forward pass makes the gradients of hidden and the head too, and keeps them.

    Args:
      hidden: of the compute type, in which the operands of all products are; logits and sums are float32.
      head: with ``transposed`` [O, D].
      targets: ids, or -1 where there is no loss.
      axis_name: mesh axes, inside of ``shard_map`` with ``check_vma=False``, over which the vocabulary is split: ``head`` is
        the device's part of it, in the order of the axes. Every device gets the sums over the whole vocabulary, and its part
        of the gradient of hidden, which ``shard_map`` adds up.
    """
    op = "linear_cross_entropy"
    shape = (head.shape[::-1] if transposed else head.shape) if head.ndim == 2 else ()
    check(op, shape[:1] == hidden.shape[2:], "the shape of head", head.shape, f"D is {hidden.shape[-1]}: [D, O], or [O, D]")
    allowed = f"it must be {hidden.shape[:2]}"
    check(op, targets.shape == hidden.shape[:2], "the shape of targets", targets.shape, allowed)
    allowed = hidden.dtype in (jnp.float32, jnp.bfloat16)
    check(op, allowed, "the dtype of hidden", hidden.dtype, "float32 or bfloat16")
    check(op, chunk > 0, "chunk", chunk, "at least one token")
    run = choose(op, implementation, {"hidden": hidden, "head": head}, interpret)
    return run(hidden, head, targets, chunk=chunk, transposed=transposed, axis_name=axis_name)
