"""One error metric and one table of limits."""

import jax
import numpy as np

# Relative L2 error against the float32 reference, by the dtype of the inputs. Set once; never loosened in the change that
# breaks them.
LIMITS = {"float32": 5e-5, "bfloat16": 2e-2}


def relative_l2(actual, expected) -> float:
    """||actual - expected|| / ||expected|| in float64 numpy (where NaN stays NaN); absolute where expected is zero."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (norm if norm > 1e-6 else 1.0))


def assert_close(actual, expected, limit: float, name: str = "") -> None:
    """Every leaf of the trees finite and within ``limit`` relative L2."""
    actual_leaves = jax.tree_util.tree_leaves_with_path(actual)
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
    assert len(actual_leaves) == len(expected_leaves), f"{name}: trees differ"
    for (path, a), (_, e) in zip(actual_leaves, expected_leaves, strict=True):
        error = relative_l2(a, e)
        assert error <= limit, f"{name}{jax.tree_util.keystr(path)}: relative L2 error {error:.3g} > {limit:g}"
