"""Implementations of the ops against the float32 scan reference over the table of cases: outputs, states, gradients."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, make_inputs
from numerics import LIMITS, assert_close, relative_l2

from pallas_kernels import api
from pallas_kernels.api import Segments

OPS = ("gated_delta_rule", "linear_attention")
# Kernels run natively where there is a GPU; in the interpreter on a few cases only, because each takes seconds.
INTERPRETED_CASES = (
    "T65", "ragged_runs", "empty_memory", "repeated_keys", "wide", "ragged_runs_per_key",
    "ragged_runs_without_decay", "strong_decay_per_key",
)  # fmt: skip
IMPLEMENTATIONS = ("reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu), "interpreted", "mosaic_tpu")


def calls(cases):
    """Implementation, op and case of every test against the reference."""
    return list(_calls(cases))


def _calls(cases):
    for op, case in itertools.product(OPS, cases):
        yield pytest.param("chunked", op, case, id=f"chunked-{op}-{case}")
        if op == "linear_attention" or case.decay in (None, "head"):
            yield pytest.param("triton", op, case, id=f"triton-{op}-{case}", marks=pytest.mark.gpu)
            if case.id in INTERPRETED_CASES:
                yield pytest.param("interpreted", op, case, id=f"interpreted-{op}-{case}")


def options(implementation):
    """Arguments of the api: "interpreted" is Triton in the interpreter, where the TPU's kernels run but on a TPU."""
    if implementation == "interpreted":
        return {"implementation": "triton", "interpret": True}
    interpret = implementation == "mosaic_tpu" and jax.default_backend() != "tpu"
    return {"implementation": implementation, "interpret": interpret}


def run_op(op, inputs, implementation):
    """Outputs, final state and the gradients of every array input under random cotangents."""
    arrays = {name: x for name, x in inputs.items() if name not in ("segments", "run_ids") and x is not None}
    if op == "linear_attention":
        arrays.pop("beta", None)

    def function(arrays):
        given = dict(arrays)
        positional = [given.pop("q"), given.pop("k"), given.pop("v"), given.pop("log_decay", None)]
        positional += [given.pop("beta")] if op == "gated_delta_rule" else []
        return getattr(api, op)(
            *positional, segments=inputs["segments"], run_ids=inputs["run_ids"], **options(implementation), **given
        )

    @jax.jit
    def all_of_it(arrays):
        (o, state), pull = jax.vjp(function, arrays)
        keys = jax.random.split(jax.random.key(1))
        cotangents = jax.random.normal(keys[0], o.shape, o.dtype), jax.random.normal(keys[1], state.shape)
        return {"o": o, "final_state": state, "gradient": pull(cotangents)[0]}

    return all_of_it(arrays)


@pytest.mark.parametrize(("implementation", "op", "case"), calls(CASES))
def test_matches_reference_in_float32(implementation, op, case):
    inputs = make_inputs(case)
    actual = run_op(op, inputs, implementation)
    assert_close(actual, run_op(op, inputs, "reference"), LIMITS["float32"], f"{op} {case}")


BFLOAT16_CASES = [case for case in CASES if case.id in ("T65", "ragged_runs", "decay_per_key_T130", "wide")]


@pytest.mark.parametrize(("implementation", "op", "case"), calls(BFLOAT16_CASES))
def test_matches_reference_in_bfloat16(implementation, op, case):
    inputs = make_inputs(case, dtype=jnp.bfloat16)
    actual = run_op(op, inputs, implementation)
    assert_close(actual, run_op(op, inputs, "reference"), LIMITS["bfloat16"], f"{op} {case}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_halves_equal_the_whole(implementation):
    inputs = make_inputs(Case("whole", 150, initial_state=True))
    arrays = [inputs[name] for name in ("q", "k", "v", "log_decay", "beta")]
    op = jax.jit(partial(api.gated_delta_rule, **options(implementation)))
    whole, final = op(*arrays, initial_state=inputs["initial_state"])
    state, pieces = inputs["initial_state"], []
    for cut in (slice(0, 87), slice(87, 88), slice(88, 150)):
        o, state = op(*(x[:, cut] for x in arrays), initial_state=state)
        pieces.append(o)
    assert_close((jnp.concatenate(pieces, axis=1), state), (whole, final), LIMITS["float32"])


@pytest.mark.parametrize("names", [(), api.WORTH_KEEPING], ids=["full", "dots"])
def test_rematerialised_gradients_are_the_same(interpret, names):
    """The chunk matrices are made outside of what is differentiated, and the first forward pass saves no states."""
    inputs = make_inputs(Case("whole", 130))
    arrays = [inputs[name] for name in ("q", "k", "v", "log_decay", "beta")]

    def loss(*arrays):
        o, state = api.gated_delta_rule(*arrays, implementation="triton", interpret=interpret)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(state))

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    expected, actual = (
        jax.jit(jax.grad(f, argnums=range(5)))(*arrays) for f in (loss, jax.checkpoint(loss, policy=policy))
    )
    assert_close(actual, expected, LIMITS["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_slots_are_masked_whatever_they_hold(implementation):
    """Rubbish, NaN included, in dead slots changes nothing: outputs there are zero and nothing flows back into them."""
    inputs = make_inputs(Case("ragged", ((70, 3), (1, 100)), initial_state=True))
    real = np.asarray(inputs["segments"].is_real(inputs["q"].shape[1]))
    clean = run_op("gated_delta_rule", inputs, implementation)
    for name in ("q", "k", "v", "log_decay", "beta"):
        rubbish = np.array(inputs[name])
        rubbish[~real] = np.nan
        inputs[name] = jnp.asarray(rubbish)
    dirty = run_op("gated_delta_rule", inputs, implementation)
    assert_close(dirty, clean, 0.0)
    assert not np.asarray(dirty["o"])[~real].any()
    assert not np.asarray(dirty["gradient"]["v"])[~real].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_segments_hand_their_state_on_bit_for_bit(implementation):
    case = next(case for case in CASES if case.id == "empty_memory")
    inputs = make_inputs(case)
    final = run_op("gated_delta_rule", inputs, implementation)["final_state"]
    empty = np.asarray(inputs["segments"].lengths) == 0
    np.testing.assert_array_equal(np.asarray(final)[empty], np.asarray(inputs["initial_state"])[empty])


def test_reference_equals_a_plain_loop():
    """The oracle itself against numpy in float64, written out."""
    inputs = make_inputs(Case("loop", 20, initial_state=True, runs=True))
    q, k, v, log_decay, beta, state = (
        np.asarray(inputs[name], np.float64) for name in ("q", "k", "v", "log_decay", "beta", "initial_state")
    )
    runs = np.asarray(inputs["run_ids"])
    expected = np.zeros_like(v)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        s = state[b, 0, h]
        for t in range(q.shape[1]):
            s = np.exp(log_decay[b, t, h]) * s * (t == 0 or runs[b, t] == runs[b, t - 1])
            s = s + beta[b, t, h] * np.outer(k[b, t, h], v[b, t, h] - s.T @ k[b, t, h])
            expected[b, t, h] = s.T @ q[b, t, h] / np.sqrt(q.shape[-1])
    actual = run_op("gated_delta_rule", inputs, "reference")["o"]
    assert relative_l2(actual, expected) < 1e-5


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("lengths", [((70, 3, 0), (1, 0, 100)), ((0, 0, 5),)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_grouped_matmul(implementation, lengths, gathered):
    """Of slots, and of tokens that several slots take; with two matrices for one x."""
    segments = Segments.from_lengths(jnp.array(lengths))
    num_slots, num_tokens = int(segments.offsets.max()) + 64, 70
    rng = np.random.default_rng(0)
    where = {}
    if gathered:  # every slot takes a token of its own choice; each token's slots are listed, num_slots for none
        token_of = np.where(segments.is_real(num_slots), rng.integers(0, num_tokens, (len(lengths), num_slots)), num_tokens)
        taken = [[np.flatnonzero(row == t) for t in range(num_tokens)] for row in token_of]
        most = max(len(slots) for row in taken for slots in row)
        slot_of = [[np.pad(s, (0, most - len(s)), constant_values=num_slots) for s in row] for row in taken]
        where = {"token_of": jnp.asarray(token_of, jnp.int32), "slot_of": jnp.asarray(slot_of, jnp.int32)}
    x = jnp.asarray(rng.normal(size=(len(lengths), num_tokens if gathered else num_slots, 32)), jnp.float32)
    weights = tuple(jnp.asarray(rng.normal(size=(3, 32, width)), jnp.float32) for width in (48, 16))
    cotangents = tuple(jnp.asarray(rng.normal(size=(len(lengths), num_slots, width)), jnp.float32) for width in (48, 16))

    def run(implementation):
        y, pull = jax.vjp(lambda x, w: api.grouped_matmul(x, w, segments, **where, **options(implementation)), x, weights)
        return y, pull(cotangents)

    assert_close(run(implementation), run("reference"), LIMITS["float32"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 64, 2, 32)}, "shape of k"),
        ({"v": (2, 63, 2, 32)}, "shape of v"),
        ({"q": (2, 64, 2, 24), "k": (2, 64, 2, 24)}, "K is 24"),
        ({"v": (2, 64, 2, 20)}, "V is 20"),
        ({"log_decay": (2, 64, 3)}, "shape of log_decay"),
        ({"beta": (2, 64)}, "shape of beta"),
        ({"run_ids": (2, 65)}, "shape of run_ids"),
        ({"initial_state": (2, 1, 2, 16, 16)}, "shape of initial_state"),
    ],
)
def test_bad_shapes_are_named(unchecked_shapes, change, message):
    inputs = make_inputs(Case("plain", 64, runs=True, initial_state=True))
    inputs |= {name: jnp.zeros(shape, inputs[name].dtype) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        api.gated_delta_rule(
            *(inputs[n] for n in ("q", "k", "v", "log_decay", "beta")),
            **{n: inputs[n] for n in ("run_ids", "initial_state")},
        )


def test_bad_segments_and_implementations_are_named():
    inputs = make_inputs(Case("plain", 64))
    arrays = [inputs[name] for name in ("q", "k", "v", "log_decay", "beta")]
    with pytest.raises(ValueError, match="segments.offsets"):
        api.gated_delta_rule(*arrays, segments=Segments(jnp.array([[0, 32]] * 2), jnp.array([[32]] * 2)))
    with pytest.raises(ValueError, match="segments.lengths"):
        api.gated_delta_rule(*arrays, segments=Segments(jnp.array([[0, 64]] * 2), jnp.array([[65]] * 2)))
    with pytest.raises(ValueError, match="no such implementation"):
        api.gated_delta_rule(*arrays, implementation="cuda")
    with pytest.raises(NotImplementedError, match="triton"):
        api.gated_delta_rule(*arrays, implementation="triton")
