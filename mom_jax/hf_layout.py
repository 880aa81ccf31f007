"""Where every array of ours is in flash-linear-attention's files: their tensors' names and shapes.

``TENSORS`` is the whole translation, in both directions. An official linear layer stores W^T, [out, in]; ours stacks the
layers of a run and the memories, and splits heads from their width.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import NamedTuple

import jax
import numpy as np

from mom_jax.config import ModelConfig


# The shape in the file of an array of ours. But for the table, theirs is ours with axes grouped and reversed.
def _table(o: int, d: int) -> tuple[int, ...]:
    return o, d


def _vector(*width: int) -> tuple[int, ...]:
    return (prod(width),)


def _linear(d: int, *out: int) -> tuple[int, ...]:
    return prod(out), d


def _linear_from_heads(h: int, v: int, d: int) -> tuple[int, ...]:
    return d, h * v


def _convolution(w: int, h: int, k: int) -> tuple[int, ...]:
    return h * k, 1, w


# From our names, without the run, to the official ones, without "model.layers.N."; {} is a memory, an axis of ours.
TENSORS = {
    "embedding": ("model.embeddings.weight", _table),
    "final_norm": ("model.norm.weight", _vector),
    "head": ("lm_head.weight", _linear),
    "mixer_norm": ("attn_norm.weight", _vector),
    "mlp_norm": ("mlp_norm.weight", _vector),
    "mlp.w_gate": ("mlp.gate_proj.weight", _linear),
    "mlp.w_up": ("mlp.up_proj.weight", _linear),
    "mlp.w_down": ("mlp.down_proj.weight", _linear),
    "mixer.attention_q": ("attn.q_proj.weight", _linear),
    "mixer.attention_k": ("attn.k_proj.weight", _linear),
    "mixer.attention_v": ("attn.v_proj.weight", _linear),
    "mixer.attention_o": ("attn.o_proj.weight", _linear_from_heads),
    "mixer.router.router": ("attn.gate.weight", _linear),
    "mixer.rule.w_q": ("attn.q_proj.weight", _linear),
    "mixer.rule.w_k": ("attn.k_proj.{}.weight", _linear),
    "mixer.rule.w_v": ("attn.v_proj.{}.weight", _linear),
    "mixer.rule.w_a": ("attn.a_proj.{}.weight", _linear),
    "mixer.rule.w_b": ("attn.b_proj.{}.weight", _linear),
    "mixer.rule.shared_k": ("attn.shared_k.weight", _linear),
    "mixer.rule.shared_v": ("attn.shared_v.weight", _linear),
    "mixer.rule.shared_a": ("attn.shared_a.weight", _linear),
    "mixer.rule.shared_b": ("attn.shared_b.weight", _linear),
    "mixer.rule.a_log": ("attn.A_log", _vector),
    "mixer.rule.dt_bias": ("attn.dt_bias", _vector),
    "mixer.conv_q": ("attn.q_conv1d.weight", _convolution),
    "mixer.conv_k": ("attn.k_conv1d.weight", _convolution),
    "mixer.conv_v": ("attn.v_conv1d.weight", _convolution),
    "mixer.conv_q_bias": ("attn.q_conv1d.bias", _vector),
    "mixer.conv_k_bias": ("attn.k_conv1d.bias", _vector),
    "mixer.conv_v_bias": ("attn.v_conv1d.bias", _vector),
    "mixer.w_g": ("attn.g_proj.weight", _linear),
    "mixer.out_norm": ("attn.o_norm.weight", _vector),
    "mixer.w_o": ("attn.o_proj.weight", _linear_from_heads),
}


class Place(NamedTuple):
    """Where a tensor of the file is in our parameters.

    Attributes:
      array: name of ours.
      index: layer in the run and memory, as far as the array has these axes.
      shape: in the file.
      is_table: whether it is stored as we hold it, not reversed.
    """

    array: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    is_table: bool

    def ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The piece of our array, which has ``shape`` as a whole, from the tensor of the file."""
        return tensor if self.is_table else tensor.T.reshape(shape[len(self.index) :])

    def theirs(self, part: np.ndarray) -> np.ndarray:
        """The tensor of the file from the piece of our array."""
        return part if self.is_table else part.reshape(self.shape[::-1]).T


def places(config: ModelConfig, shapes: Mapping[str, jax.ShapeDtypeStruct], model_type: str) -> dict[str, Place]:
    """Every tensor of the file, by its official name.

    ``gated_deltanet`` has no router, and its one memory's tensors have no number.
    """
    first_layers = [0, *accumulate(count for _, count in config.layer_runs)]
    found = {}
    for array, x in shapes.items():
        run, name = re.fullmatch(r"params\.(?:runs\.run_(\d+)\.)?(.+)", array).groups()
        if model_type == "gated_deltanet" and name == "mixer.router.router":
            continue
        official, layout = TENSORS[name]
        stacked = (run is not None) + ("{}" in official)
        if model_type == "gated_deltanet":
            official = official.replace(".{}", "")
        shape = layout(*x.shape[stacked:])
        for index in np.ndindex(x.shape[:stacked]):
            prefix = f"model.layers.{first_layers[int(run)] + index[0]}." if run else ""
            found[prefix + official.format(*index[1:])] = Place(array, index, shape, layout is _table)
    return found
