"""Small models for the tests, their parameters drawn in numpy: nothing is compiled to make them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mom_jax.config import AttentionConfig, ModelConfig
from mom_jax.layers import LayerState
from mom_jax.model import MIXERS, bind, model_structure, split_params
from mom_jax.sharding import leaf_name
from pallas_kernels.api import gather_sum

BASE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, head_dim=16, expand_v=2.0, num_memories=4, top_k=2,
    intermediate_size=48, dtype="float32", remat="none", max_length=160,
)  # fmt: skip
HYBRID = dict(attention=AttentionConfig(layers=(1,), num_heads=4, num_kv_heads=2, window_size=20))
KINDS = {
    "mom": {},
    "hybrid": HYBRID | dict(num_layers=3),
    "full_attention_hybrid": dict(attention=AttentionConfig(layers=(1,), num_heads=4)),
    "single_memory": dict(num_memories=1, top_k=1, shared_memory=False, balance_loss_scale=0.0),
    "one_memory_and_shared": dict(num_memories=1, top_k=1),
    "all_memories": dict(num_memories=3, top_k=3, conv_bias=True, conv_size=3),
    "single_kv": dict(single_kv_proj=True, use_output_gate=False),
    "not_shared": dict(shared_memory=False, router_bias_rate=0.1, conv_size=1),
    "attention_only": dict(attention=AttentionConfig(layers=(0, 1), num_heads=4)),
}


def small(kind: str = "mom", **overrides) -> ModelConfig:
    """A model of one of the ``KINDS`` that compiles quickly."""
    return ModelConfig(**vars(BASE) | KINDS[kind] | overrides)


def draw(tree, seed: int = 0):
    """Arrays for a tree of shapes of parameters, so large that everything matters: gates, routing, norms, biases."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = leaf_name(path)
        if name.endswith("norm"):
            value = rng.normal(1, 0.1, x.shape)
        elif name == "a_log":
            value = np.log(rng.uniform(0.5, 8, x.shape))
        elif name == "dt_bias":
            value = rng.uniform(-5, -2, x.shape)
        elif name == "embedding":
            value = rng.normal(0, 1, x.shape)
        else:
            value = rng.normal(0, 0.25, x.shape)
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def draw_params(config: ModelConfig, seed: int = 0) -> tuple[dict, dict]:
    """Parameters and non-trained variables of a model."""
    params, variables = split_params(nnx.merge(*model_structure(config)))
    return draw(params, seed), draw(variables, seed)


@cache
def model_of(config: ModelConfig):
    return bind(config, *draw_params(config))


@cache
def mixer_of(config: ModelConfig, kind: str = "mom"):
    """A token mixer as a compiled function (x, mask, documents, state) -> (y, routing, state), and its values.

    The state is the mixer's own: a stack of one layer is made of it.
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: MIXERS[kind](config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(abstract, draw(nnx.to_pure_dict(abstract)))

    @jax.jit
    def call(values, x, mask, documents, state):
        own = None if state is None else LayerState(jax.tree.map(lambda s: s[None], state), jnp.int32(0))
        y, routing, after = nnx.merge(graph, values)(x, mask, documents, own)
        return y, routing, jax.tree.map(lambda s: s[0], after)

    return partial(call, abstract), nnx.merge(graph, abstract)


def run_pieces(call, sizes, state, *inputs):
    """Calls ``call(*inputs, state) -> (y, state)`` on consecutive pieces; returns all y in one, and the last state."""
    ends = np.cumsum(sizes)
    assert ends[-1] == inputs[0].shape[1]
    outputs = []
    for end, size in zip(ends, sizes, strict=True):
        y, state = call(*(x[:, end - size : end] for x in inputs), state)
        outputs.append(np.asarray(y))
    return np.concatenate(outputs, axis=1), state


def to_tokens(dispatch, y):
    """The sum over each token's slots [B, T, ...] of y [B, N, ...]; zero for padded tokens."""
    return gather_sum(y, dispatch.slot_of, dispatch.token_of[..., None])
