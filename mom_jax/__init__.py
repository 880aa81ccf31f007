"""Mixture-of-Memories language models in JAX (arXiv 2502.13685)."""

from importlib import import_module
from typing import Any

from mom_jax.config import PRESETS, ModelConfig, gated_deltanet_340m, mom_1_3b, mom_340m, tiny, transformer_340m

# Fetched at first use, so that what only reads configurations or data does not wait for JAX.
_MODULES = {
    "MoMLanguageModel": "mom_jax.model", "load_pretrained": "mom_jax.hf", "save_pretrained": "mom_jax.hf",
    "load": "mom_jax.interchange", "load_run": "mom_jax.runs", "generate": "mom_jax.generation",
    "Sampling": "mom_jax.sampling",
}  # fmt: skip

__all__ = [
    "PRESETS", "ModelConfig", "gated_deltanet_340m", "mom_1_3b", "mom_340m", "tiny", "transformer_340m", *_MODULES,
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
