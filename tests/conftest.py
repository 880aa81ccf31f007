"""Eight CPU devices for the sharding tests; quick compilation, since almost nothing is run twice; shapes are checked."""

import os

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["PJRT_NPROC"] = "32"  # with fewer threads than 8 devices' collectives block at once, they wait forever
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_threefry_partitionable", True)

# Before they are imported: the annotated shapes of the modules that compute are checked at every call.
CHECKED = ("attention", "generation", "layers", "memory", "model", "routing", "sampling", "training", "update_rules")
jaxtyping.install_import_hook([*(f"mom_jax.{name}" for name in CHECKED), "pallas_kernels"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--trials", type=int, default=1, help="of each fault in tests/test_faults.py")
    parser.addoption("--fault-report", metavar="FILE", help="JSON to write: trials and losses of tests/test_faults.py")


def pytest_configure(config):
    # flax annotates with typing.Hashable, which beartype has come to dislike (0.23).
    config.addinivalue_line("filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(params=[pytest.param(True, id="interpreted"), pytest.param(False, id="native", marks=pytest.mark.gpu)])
def interpret(request):
    """Kernels in the interpreter anywhere, and as they are where there is a GPU."""
    return request.param


@pytest.fixture
def unchecked_shapes():
    """No checking of annotations: for tests of the errors that users see, who have no such checking."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
