"""Eight CPU devices for the sharding tests; full float32 products, so that comparisons measure the code."""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)
