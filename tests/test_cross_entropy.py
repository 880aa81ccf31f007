"""The cross-entropy of a linear head against its definition in float64: sums, hits and gradients of both implementations,
on one device and with rows and vocabulary over several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxprs import equations
from numerics import LIMITS, assert_close, relative_l2

from pallas_kernels import cross_entropy
from pallas_kernels.api import linear_cross_entropy
from pallas_kernels.triton.cross_entropy import row_gradients, row_statistics, softmax_rows
from pallas_kernels.triton.launch import KernelConfig

B, T, D, O = 2, 35, 32, 96
SCALE = 0.3  # of the loss whose gradients are taken
VOCABULARY = ("x", "y")


def softmax_rows_float64(logits, targets):
    logits = np.asarray(logits, np.float64)
    maximum = logits.max(-1, keepdims=True)
    log_sum = maximum + np.log(np.exp(logits - maximum).sum(-1, keepdims=True))
    one_hot, has_target = np.arange(logits.shape[-1]) == targets[..., None], (targets >= 0)[..., None]
    losses = np.where(has_target, log_sum - np.where(one_hot, logits, 0).sum(-1, keepdims=True), 0)[..., 0]
    return losses, logits.argmax(-1) == targets, np.where(has_target, np.exp(logits - log_sum) - one_hot, 0)


def draw(rng, dtype, transposed):
    """hidden, the head in float32 with values of ``dtype``, and targets some of them missing, some first guesses."""
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(0.5 * rng.normal(size=(D, O)), dtype).astype(jnp.float32)
    guesses = np.argmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64), axis=-1)
    targets = np.where(rng.uniform(size=(B, T)) < 0.3, guesses, rng.integers(O, size=(B, T)))
    targets = np.where(rng.uniform(size=(B, T)) < 0.2, -1, targets).astype(np.int32)
    return hidden, head.T if transposed else head, jnp.asarray(targets)


def over_devices(function, in_specs, out_specs):
    """``function`` on 2 x 2 x 2 devices: over rows, and over the two axes of the vocabulary."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices, which a CPU has: make test runs it")
    mesh = jax.make_mesh((2, 2, 2), ("rows", *VOCABULARY), axis_types=(AxisType.Auto,) * 3)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(
    "chunk, transposed, dtype, is_split",
    [
        (16, False, "float32", False), (1, True, "float32", False), (500, True, "bfloat16", False),
        (5, False, "bfloat16", False), (16, True, "float32", True), (500, False, "bfloat16", True),
    ],
)  # fmt: skip
def test_sums_and_gradients(interpret, rng, implementation, chunk, transposed, dtype, is_split):
    hidden, head, targets = draw(rng, dtype, transposed)
    settings = dict(chunk=chunk, transposed=transposed, implementation=implementation, interpret=interpret)

    def cross_entropy_of(hidden, head, targets):
        if not is_split:
            return linear_cross_entropy(hidden, head, targets, **settings)
        of_head = P(VOCABULARY, None) if transposed else P(None, VOCABULARY)
        return over_devices(
            lambda *xs: jax.lax.psum(linear_cross_entropy(*xs, axis_name=VOCABULARY, **settings), "rows"),
            (P("rows"), of_head, P("rows")), P(),
        )(hidden, head, targets)  # fmt: skip

    @jax.jit
    def run(hidden, head):
        def loss(hidden, head):
            nats, correct = cross_entropy_of(hidden, head, targets)
            return SCALE * nats, (nats, correct)

        alone = cross_entropy_of(hidden, head, targets)
        gradients, sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
        remat, _ = jax.grad(jax.checkpoint(loss), argnums=(0, 1), has_aux=True)(hidden, head)
        return alone, sums, gradients, remat

    (*alone,), (*sums,), gradients, remat = run(hidden, head)
    hidden64, head64 = np.asarray(hidden, np.float64), np.asarray(head.T if transposed else head, np.float64)
    losses, hits, dlogits = softmax_rows_float64(hidden64 @ head64, np.asarray(targets))
    for nats, correct in (alone, sums):
        assert relative_l2(nats, losses.sum()) < LIMITS["float32"]
        assert correct == hits.sum() > 10
    dhead = np.einsum("btd,bto->do", hidden64, dlogits)
    expected = (SCALE * dlogits @ head64.T, SCALE * (dhead.T if transposed else dhead))
    assert (gradients[0].dtype, gradients[1].dtype) == (dtype, jnp.float32)
    assert_close((gradients, remat), (expected, expected), LIMITS[dtype])
    assert not np.asarray(gradients[0], np.float32)[np.asarray(targets) < 0].any()


def split_rows(width, interpret):
    """``softmax_rows`` of a row over four devices, of plain JAX and with kernels; none where they cannot share it."""
    settings = dict(config=KernelConfig(64, num_warps=1), interpret=interpret)
    kernels = {"statistics": partial(row_statistics, **settings), "gradients": partial(row_gradients, **settings)}

    def over(parts):
        def rows(logits, targets, dtype):
            split = partial(cross_entropy.split_softmax_rows, axis_name=VOCABULARY, **parts)
            in_row = P(None, None, VOCABULARY)
            of_dlogits = None if dtype is None else in_row
            return over_devices(lambda *xs: split(*xs, dtype), (in_row, P()), (P(), P(), of_dlogits))(logits, targets)

        return rows

    return [] if width % 4 or jax.device_count() < 8 else [over({}), over(kernels)]


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("width", [1, 61, 256, 300])
def test_rows(interpret, rng, width, differentiate):
    """The kernel, in tiles of 64 columns, and plain JAX: equal maxima, rows without a target, large logits."""
    logits = rng.normal(size=(2, 13, width)) * 10.0 ** rng.integers(-1, 3, size=(2, 13, 1))
    logits, dtype = logits.astype(np.float32), jnp.float32 if differentiate else None
    logits[0, :6, width // 3] = logits[0, :6, width // 2] = logits[0, :6, width - 1] = 200.0
    targets = rng.integers(width, size=(2, 13)).astype(np.int32)
    targets[0, :6] = [width // 3, width // 2, width - 1] * 2
    targets[1, ::3] = -1
    kernel = partial(softmax_rows, config=KernelConfig(64, num_warps=1), interpret=interpret)
    losses, hits, dlogits = softmax_rows_float64(logits, targets)
    for rows in (kernel, cross_entropy.softmax_rows, *split_rows(width, interpret)):
        actual = jax.jit(lambda logits, targets, rows=rows: rows(logits, targets, dtype))(logits, targets)
        assert_close(actual[0], losses, LIMITS["float32"])
        np.testing.assert_array_equal(actual[1], hits)
        if differentiate:
            assert_close(actual[2], dlogits, LIMITS["float32"])
        else:
            assert actual[2] is None


def test_three_products_with_gradients_and_one_without(rng):
    hidden, head, targets = draw(rng, "float32", False)

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, targets, chunk=16, implementation="reference")[0]

    def products(function):
        return sum(equation.primitive.name == "dot_general" for equation in equations(function, hidden, head))

    assert (products(loss), products(jax.grad(loss, argnums=(0, 1)))) == (1, 3)


def test_a_row_that_is_not_finite_has_no_finite_loss(interpret):
    """A run stops on a loss that is not finite, so the kernel must not lose one."""
    for bad in (np.nan, np.inf):
        logits = np.zeros((1, 1, 300), np.float32)
        logits[..., 70] = bad
        for rows in (partial(softmax_rows, interpret=interpret), *split_rows(300, interpret)):
            losses, _, _ = jax.jit(lambda x, rows=rows: rows(x, jnp.zeros((1, 1), jnp.int32), None))(logits)
            assert not np.isfinite(losses).any()


def test_what_does_not_fit_is_refused(rng, unchecked_shapes):
    hidden, head, targets = draw(rng, "float32", False)
    for arguments, message in [
        ((hidden, head.T, targets), "the shape of head"),
        ((hidden, head, targets[:1]), "the shape of targets"),
        ((hidden.astype(jnp.float16), head, targets), "the dtype of hidden"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, chunk=16)
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_cross_entropy(hidden, head, targets, chunk=0)
