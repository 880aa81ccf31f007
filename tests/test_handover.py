"""Segments whose tokens lie on several devices: outputs, states and all gradients are those of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, make_inputs
from jax.sharding import Mesh, PartitionSpec
from numerics import LIMITS, assert_close

from pallas_kernels import api
from pallas_kernels.api import Handover, Segments

DEVICES = 4
ALIGNMENT = api.SEGMENT_ALIGNMENT


def parts_of(segments: Segments, num_slots: int, rng):
    """The tokens of every segment cut into a part a device: lengths [P, B, S], and the whole's slot of each slot, or -1."""
    lengths = np.asarray(segments.lengths)
    cuts = np.sort(rng.integers(0, lengths + 1, (DEVICES - 1, *lengths.shape)), axis=0)
    cuts[:, :, -1] = lengths[:, -1] // 2  # the last segment on two devices only, the first and the last
    cuts = np.concatenate([np.zeros_like(lengths)[None], cuts, lengths[None]])
    parts = np.diff(cuts, axis=0)
    size = int((-(-parts // ALIGNMENT) * ALIGNMENT).sum(axis=2).max())
    slot = np.full((DEVICES, lengths.shape[0], size), -1)
    for device, row, segment in np.ndindex(parts.shape):
        begin = int((-(-parts[device, row, :segment] // ALIGNMENT) * ALIGNMENT).sum())
        first = int(segments.offsets[row, segment]) + cuts[device, row, segment]
        count = parts[device, row, segment]
        slot[device, row, begin : begin + count] = np.arange(first, first + count)
    return parts, slot


def spread(x, slot, fill):
    """[B, N, ...] -> [P, B, n, ...]."""
    rows = np.arange(x.shape[0])[:, None]
    return np.stack([np.where((s >= 0).reshape(s.shape + (1,) * (x.ndim - 2)), np.asarray(x)[rows, s], fill) for s in slot])


def along(function, out_specs):
    """``function`` on every device of a mesh axis with its part of arguments [P, ...]."""
    mesh, of_part = Mesh(jax.devices()[:DEVICES], ("sequence",)), PartitionSpec("sequence")

    def on_device(*arguments):
        out = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], out)

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=of_part, out_specs=out_specs, check_vma=False))


SOME = ("ragged_without_decay", "ragged_runs", "ragged_runs_per_key")  # for what differs in the passes over tokens only


@pytest.mark.parametrize(
    ("op", "implementation", "case"),
    [("gated_delta_rule", "chunked", case) for case in CASES]
    + [("linear_attention", "chunked", case) for case in CASES if case.id in SOME]
    + [("gated_delta_rule", "triton", case) for case in CASES if case.id in SOME[:2]]
    + [("linear_attention", "triton", case) for case in CASES if case.id in SOME]
    + [("gated_delta_rule", "mosaic_tpu", case) for case in CASES if case.id in SOME[1:2]],
    ids=str,
)
def test_outputs_states_and_gradients_are_those_of_one_device(op, implementation, case, rng):
    inputs = make_inputs(case)
    segments, run_ids, initial_state = (inputs.pop(name) for name in ("segments", "run_ids", "initial_state"))
    if op == "linear_attention":
        del inputs["beta"]
    batch, num_slots = inputs["q"].shape[:2]
    whole = segments or Segments.full(batch, num_slots)
    real = np.asarray(whole.is_real(num_slots))
    function = getattr(api, op)
    call = partial(function, segments=segments, run_ids=run_ids, implementation="reference")
    out, pull = jax.vjp(lambda inputs, state: call(**inputs, initial_state=state), inputs, initial_state)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out)
    d_inputs, d_state = pull(cotangents)

    lengths, slot = parts_of(whole, num_slots, rng)
    is_last = (np.arange(DEVICES) == DEVICES - 1).reshape(-1, 1, 1, 1, 1, 1)  # where the state after everything is
    parts = {name: None if x is None else spread(x, slot, np.nan) for name, x in inputs.items()}
    part_runs = None if run_ids is None else spread(run_ids, slot, 0)
    states = initial_state
    if states is not None:  # those of the others must not matter
        states = np.stack([initial_state] + [np.full_like(initial_state, np.nan)] * (DEVICES - 1))
    cotangents = spread(cotangents[0], slot, 1), np.where(is_last, cotangents[1], 0)

    def on_device(inputs, state, run_ids, lengths, cotangents):
        segments = Segments.from_lengths(lengths)
        handover = Handover.of(segments, run_ids, "sequence")
        how = {"handover": handover, "implementation": implementation, "interpret": True}
        call = partial(function, segments=segments, run_ids=run_ids, **how)
        out, pull = jax.vjp(lambda inputs, state: call(**inputs, initial_state=state), inputs, state)
        return out, pull(cotangents)

    (o, final), (d_parts, d_states) = along(on_device, PartitionSpec("sequence"))(
        parts, states, part_runs, lengths.astype(np.int32), cotangents
    )

    def gathered(parts):
        there, found = np.zeros(real.shape, bool), np.zeros((batch, num_slots, *parts.shape[3:]))
        for part, s in zip(np.asarray(parts), slot, strict=True):
            rows, columns = np.nonzero(s >= 0)
            found[rows, s[rows, columns]], there[rows, s[rows, columns]] = part[rows, columns], True
        assert (there == real).all()
        return found

    def of_tokens(x):
        return np.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)

    limit = LIMITS["float32"]
    assert_close(gathered(o), of_tokens(out[0]), limit, "o")
    assert_close(final[-1], out[1], limit, "final state")
    for name, d in d_inputs.items():
        if d is not None:
            assert_close(gathered(d_parts[name]), of_tokens(d), limit, name)
    if d_state is not None:
        assert_close(d_states[0], d_state, limit, "initial state")
        assert not np.any(d_states[1:])


def test_states_on_the_way_and_their_gradients(rng):
    """Of every device, against parts that are run one after another; runs begin at the borders of devices and between."""
    segments = Segments.from_lengths(jnp.asarray([[70, 3], [0, 129]], jnp.int32))
    num_slots, shape = 192, (DEVICES, 2, 192, 2)
    rows = [jax.tree.map(lambda x: x[None], segments.lengths)] * DEVICES
    lengths = jnp.concatenate(rows).at[1].set(jnp.asarray([[0, 64], [5, 0]], jnp.int32))
    k = rng.normal(size=(*shape, 16))
    q, v = rng.normal(size=(2, *k.shape))
    log_decay, beta = -rng.exponential(0.01, shape), rng.uniform(size=shape)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta))
    documents = np.asarray([0, 1, 1, 2])  # of a device's first token; the last device's row 0 has a further one at slot 40
    run_ids = np.broadcast_to(documents[:, None, None], (DEVICES, 2, num_slots)).astype(np.int32).copy()
    run_ids[3, 0, 40:] += 1

    def one_after_another(arrays):
        outputs, state, before = [], jnp.zeros((2, 2, 2, 16, 16)), np.full((2, 2), -1)
        for device in range(DEVICES):
            parts = Segments.from_lengths(lengths[device])
            reached = np.asarray(lengths[device]) > 0
            first = np.where(reached, documents[device], before)
            state = jnp.where((first == before)[..., None, None, None], state, 0)
            ids = jnp.asarray(run_ids[device])
            o, state = api.gated_delta_rule(
                *(x[device] for x in arrays), segments=parts, run_ids=ids, initial_state=state, implementation="reference"
            )  # fmt: skip
            last = run_ids[device][np.arange(2)[:, None], np.asarray(parts.offsets[:, :-1] + parts.lengths - 1)]
            before = np.where(reached, last, before)
            outputs.append((o, state))
        return jax.tree.map(lambda *x: jnp.stack(x), *outputs)

    def on_device(arrays, run_ids, lengths, cotangents):
        parts = Segments.from_lengths(lengths)
        how = {"segments": parts, "run_ids": run_ids, "handover": Handover.of(parts, run_ids, "sequence")}
        out, pull = jax.vjp(lambda arrays: api.gated_delta_rule(*arrays, **how, implementation="chunked"), arrays)
        return out, pull(cotangents)[0]

    expected, pull = jax.vjp(one_after_another, arrays)
    cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), expected)
    found = along(on_device, PartitionSpec("sequence"))(arrays, run_ids, lengths, cotangents)
    assert_close(found, (expected, pull(cotangents)[0]), LIMITS["float32"])


@pytest.mark.parametrize("has_runs", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_convolution_goes_on_over_several_devices(has_runs, count, rng):
    whole = Segments.from_lengths(jnp.asarray([[7, 130], [2, 0], [70, 5]], jnp.int32))
    num_slots = int(whole.offsets[:, -1].max())
    x = rng.normal(size=(3, num_slots, 2, 4)).astype(np.float32)
    weight = jnp.asarray(rng.normal(size=(count + 1, 2, 4)), jnp.float32)
    run_ids = jnp.asarray(np.cumsum(rng.uniform(size=x.shape[:2]) < 0.1, axis=1), jnp.int32) if has_runs else None
    expected = api.short_convolution(jnp.asarray(x), weight, None, whole, run_ids, implementation="chunked")
    lengths, slot = parts_of(whole, num_slots, rng)

    def on_device(x, run_ids, lengths):
        segments = Segments.from_lengths(lengths)
        handover = Handover.of(segments, run_ids, "sequence")
        history = handover.convolution_history(x, segments, run_ids, count)
        return api.short_convolution(x, weight, None, segments, run_ids, history, implementation="chunked")

    parts = (spread(x, slot, 0), None if run_ids is None else spread(run_ids, slot, 0), lengths.astype(np.int32))
    found = np.asarray(along(on_device, PartitionSpec("sequence"))(*parts))
    assert_close(np.where((slot >= 0)[..., None, None], found, 0), spread(np.asarray(expected), slot, 0), LIMITS["float32"])
