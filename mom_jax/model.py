"""The language model: blocks, runs of like layers under ``lax.scan``, and everything that a call returns."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mom_jax.attention import Attention, AttentionState
from mom_jax.config import ModelConfig, require
from mom_jax.layers import LayerState, LayerWeight, SwiGLU, einsum_float32, normal_param, normalize, ones_param
from mom_jax.memory import MixtureOfMemories
from mom_jax.routing import RouterBias, balance_loss
from mom_jax.sharding import EXCHANGED, constrain, constrain_tokens, leaf_name, take_rows
from pallas_kernels.api import SEGMENT_ALIGNMENT, WORTH_KEEPING, rms_norm

MIXERS = {"mom": MixtureOfMemories, "attention": Attention}
Params = dict[str, Any]  # a pure-dict tree of arrays


class ModelState(NamedTuple):
    """What a row has been through.

    Attributes:
      layers: for every run of like layers the mixers' states, stacked: [layers, B, ...].
      document: int32 [B], the document of each row's last real token.
    """

    layers: tuple
    document: Int[Array, "B"]


class RouterStatistics(NamedTuple):
    """Of every MoM layer: logits [L, B, T, M]; load and importance [L, M]; z_loss [L]. See :class:`Routing`."""

    logits: Float[Array, "L B T M"]
    load: Float[Array, "L M"]
    importance: Float[Array, "L M"]
    z_loss: Float[Array, "L"]


class HiddenOutput(NamedTuple):
    """What comes before the head: hidden [B, T, D] after the last norm, router statistics, state (None if not asked for)."""

    hidden: Float[Array, "B T D"]
    router: RouterStatistics
    state: ModelState | None


class ModelOutput(NamedTuple):
    """Attributes:
    logits: float32 [B, T, O]; of padded tokens unspecified.
    router_logits: float32 [MoM layers, B, T, M].
    state: the state after the last token.
    balance_loss: float32 scalar, in the configured form, unscaled.
    """

    logits: Float[Array, "B T O"]
    router_logits: Float[Array, "L B T M"]
    state: ModelState
    balance_loss: Float[Array, ""]


class Block(nnx.Module):
    """x + mixer(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig, kind: str, *, rngs: nnx.Rngs):
        self.config = config
        self.mixer_norm = ones_param(config.hidden_size)
        self.mixer = MIXERS[kind](config, rngs=rngs)
        self.mlp_norm = ones_param(config.hidden_size)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x, mask, documents, state):
        eps = self.config.norm_eps
        x, routing, state = self.mixer(normalize(x, self.mixer_norm[...], eps), mask, documents, state, residual=x)
        return self.mlp(normalize(x, self.mlp_norm[...], eps), residual=x), routing, state


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, count: int) -> nnx.Module:
    """``count`` modules of one kind as one whose variables have a leading layer axis."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    values = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))))(keys)
    nnx.replace_by_pure_dict(abstract, values)
    return nnx.merge(graph, abstract)


_policies = jax.checkpoint_policies
_REMAT = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(*WORTH_KEEPING, EXCHANGED)
    ),
    "full": _policies.nothing_saveable,
}


class MoMLanguageModel(nnx.Module):
    """A Mixture-of-Memories language model (arXiv 2502.13685).

    A container of parameters and a pure function of its inputs. For training, work on the pure-dict tree of its parameters:
    :func:`init_params` and :func:`bind`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.embedding = normal_param(rngs, config, config.vocab_size, config.hidden_size)
        self.runs = nnx.Dict(
            {
                f"run_{index}": stack_layers(lambda rngs, kind=kind: Block(config, kind, rngs=rngs), rngs, count)
                for index, (kind, count) in enumerate(config.layer_runs)
            }
        )
        self.final_norm = ones_param(config.hidden_size)
        if not config.tie_embeddings:
            self.head = normal_param(rngs, config, config.hidden_size, config.vocab_size)

    def init_state(self, batch_size: int, max_length: int | None = None) -> ModelState:
        """The state before the first token.

        Args:
          max_length: tokens that attention layers without a window can hold; None: ``config.max_length``.
        """

        def layers(run, kind, count):
            cache = (max_length or self.config.max_length,) if kind == "attention" else ()
            state = run.mixer.init_state(batch_size, *cache)
            return jax.tree.map(lambda s: jnp.broadcast_to(s, (count, *s.shape)), state)

        runs = zip(self.ordered_runs(), self.config.layer_runs, strict=True)
        document = constrain(jnp.zeros(batch_size, jnp.int32), "b")
        return ModelState(tuple(layers(run, *kind_count) for run, kind_count in runs), document)

    def ordered_runs(self) -> list[Block]:
        """The runs from the bottom up; the dictionary itself goes by name, run_10 before run_2."""
        return [self.runs[f"run_{index}"] for index in range(len(self.config.layer_runs))]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Array | None = None,
        document_ids: Int[Array, "B T"] | None = None,
        state: ModelState | None = None,
        *,
        return_state: bool = False,
        dropout_key: jax.Array | None = None,
    ) -> HiddenOutput:
        """Everything but the head; arguments as in :meth:`__call__`.

        Args:
          return_state: whether to return a state although none was given.
          dropout_key: key of the embedding dropout; None: no dropout.
        """
        config = self.config
        mask = None if attention_mask is None else attention_mask.astype(bool)
        if state is None and return_state:
            state = self.init_state(tokens.shape[0], max(tokens.shape[1], config.max_length))
        documents, document = document_ids, None
        if state is not None:
            if documents is None:
                documents = jnp.broadcast_to(state.document[:, None], tokens.shape)
            document = _last_document(documents, mask, state.document)

        x = take_rows(self.embedding[...], tokens, config.dtype)
        if dropout_key is not None and config.embedding_dropout > 0:
            keep = jax.random.bernoulli(dropout_key, 1 - config.embedding_dropout, x.shape)
            x = jnp.where(keep, x / (1 - config.embedding_dropout), 0).astype(x.dtype)
        x = constrain_tokens(x)
        routings, states = [], []
        for index, run in enumerate(self.ordered_runs()):
            x, routing, run_state = self._scan_run(run, x, mask, documents, None if state is None else state.layers[index])
            states.append(run_state)
            if routing is not None:
                routings.append(routing)
        hidden = rms_norm(x, self.final_norm[...], config.norm_eps)
        state = None if state is None else ModelState(tuple(states), document)
        return HiddenOutput(hidden, self._gather_statistics(routings, tokens.shape), state)

    def _scan_run(self, run: Block, x, mask, documents, state):
        """The layers of one run, one after another. The state travels in the carry and is updated in place."""
        graph, params = nnx.split(run)
        count = jax.tree.leaves(params)[0].shape[0]
        # Decoding: what a scan hands to its body is a copy, which for the weights would be all of its time.
        is_in_place = state is not None and x.shape[1] < SEGMENT_ALIGNMENT

        def layer(carry, of_layer):
            x, states, index = carry
            own = None if states is None else LayerState(states, index)
            of_layer = self._weights_in_place(params, index) if is_in_place else of_layer
            x, routing, states = nnx.merge(graph, of_layer)(x, mask, documents, own)
            statistics = None
            if routing is not None:
                statistics = RouterStatistics(routing.logits, routing.load, routing.importance, routing.z_loss)
            return (x, states, index + 1), statistics

        unroll = self.config.unroll
        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT[self.config.remat], prevent_cse=unroll)
        carry, xs = (x, state, jnp.int32(0)), None if is_in_place else params
        (x, state, _), statistics = lax.scan(layer, carry, xs, length=count, unroll=unroll)
        return x, statistics, state

    def _weights_in_place(self, params, index):
        """The parameters of a layer of a run; those that its ops take out of their stacks as :class:`LayerWeight`."""

        def pick(path, stack):
            name = leaf_name(path[:-1])  # the last entry is "value"
            is_in_place = LayerWeight.fits(name, stack, self.config.dtype)
            return LayerWeight(stack, index, self.config.step_implementation) if is_in_place else stack[index]

        return jax.tree_util.tree_map_with_path(pick, params)

    def _gather_statistics(self, routings, shape) -> RouterStatistics:
        if not routings:  # attention layers only
            memories = self.config.num_memories
            empty = (jnp.zeros((0, *shape, memories)), jnp.zeros((0, memories)), jnp.zeros((0, memories)), jnp.zeros(0))
            return RouterStatistics(*empty)
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routings)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """hidden W_head, float32; the product is in the compute type with float32 accumulation."""
        tied = self.config.tie_embeddings
        equation, head = ("btd,od->bto", self.embedding) if tied else ("btd,do->bto", self.head)
        return einsum_float32(equation, hidden, head[...], dtype=self.config.dtype)

    def balance_loss(self, router: RouterStatistics) -> Float[Array, ""]:
        """The load-balance loss in the configured form, unscaled; 0 without a MoM layer."""
        if router.load.shape[0] == 0:
            return jnp.zeros(())
        return balance_loss(router.load, router.importance, self.config.balance_loss_form)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attention_mask: Array | None = None,
        document_ids: Int[Array, "B T"] | None = None,
        state: ModelState | None = None,
    ) -> ModelOutput:
        """Logits and everything else, for people. Compiled once for every shape of the inputs.

        Args:
          tokens: ids below ``vocab_size``.
          attention_mask: [B, T], 1 or True for real tokens; padding may stand anywhere in a row. None: all are real.
          document_ids: documents of packed rows, >= 0 and non-decreasing along a row's real tokens and from piece to piece.
            None: the document of the state, or one document.
          state: from an earlier call on the tokens before, or :meth:`init_state`; None: these are the first.

        Raises:
          ValueError: a shape, id or mask is not allowed, or a full-attention cache is too short (checked where the values
            are known, that is, outside jit).
        """
        check_inputs(self, tokens, attention_mask, document_ids, state)
        graph, values = nnx.split(self)
        return _call(graph, values, tokens, attention_mask, document_ids, state)


@partial(jax.jit, static_argnums=0)
def _call(graph, values, tokens, attention_mask, document_ids, state) -> ModelOutput:
    model = nnx.merge(graph, values)
    out = model.hidden(tokens, attention_mask, document_ids, state, return_state=True)
    return ModelOutput(model.logits(out.hidden), out.router.logits, out.state, model.balance_loss(out.router))


def _last_document(documents, mask, before):
    """The document of each row's last real token, ``before`` if it has none."""
    if mask is None:
        return documents[:, -1]
    last = documents.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.where(mask.any(axis=1), jnp.take_along_axis(documents, last[:, None], axis=1)[:, 0], before)


def check_inputs(model: MoMLanguageModel, tokens, attention_mask, document_ids, state) -> None:
    """Refuses inputs of a call by name; values are looked at only where they are known."""
    require(tokens.ndim == 2 and min(tokens.shape) > 0, "the shape of tokens", tokens.shape, "it must be [B, T]")
    require(jnp.issubdtype(tokens.dtype, jnp.integer), "the dtype of tokens", tokens.dtype, "it must be an integer type")
    for name, x in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        require(x is None or x.shape == tokens.shape, f"the shape of {name}", x is not None and x.shape, f"{tokens.shape}")
    if state is not None:
        require(
            state.document.shape == tokens.shape[:1],
            "the batch size of state", state.document.shape[0], f"it must be that of tokens, {tokens.shape[0]}",
        )  # fmt: skip
    unknown = [x for x in jax.tree.leaves((tokens, attention_mask, document_ids, state)) if isinstance(x, jax.core.Tracer)]
    if unknown:
        return
    real = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    ids = np.asarray(tokens)[real]
    bad = ids[(ids < 0) | (ids >= model.config.vocab_size)]
    allowed = f"ids run from 0 to vocab_size - 1 = {model.config.vocab_size - 1}"
    require(bad.size == 0, "a token id", bad[:1].tolist(), allowed)
    if attention_mask is not None:
        values = np.asarray(attention_mask)
        require(bool(np.isin(values, (0, 1)).all()), "attention_mask", np.unique(values)[:4].tolist(), "0 or 1")
    if document_ids is not None:
        before = np.zeros(len(real), np.int32) if state is None else np.asarray(state.document)
        for row, row_real, last in zip(np.asarray(document_ids), real, before, strict=True):
            row = row[row_real]
            fits = bool((np.diff(row, prepend=last) >= 0).all())
            allowed = f"from the last document on, {last}, they never fall along a row's real tokens"
            require(fits, "document_ids", row.tolist(), allowed)
    if state is not None and model.config.attention.layers and model.config.attention.window_size is None:
        cache = next(s for s in state.layers if isinstance(s, AttentionState))
        needed, size = int(np.max(np.asarray(cache.count)[0] + real.sum(axis=1))), cache.k.shape[2]
        allowed = f"the attention layers' cache holds {size}; make a larger one with init_state(batch_size, max_length)"
        require(needed <= size, "the number of tokens of a row", needed, allowed)


@lru_cache
def model_structure(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its values: its graph and its abstract variables."""
    return nnx.split(nnx.eval_shape(lambda: MoMLanguageModel(config)))


def init_params(config: ModelConfig, key: jax.Array) -> tuple[Params, Params]:
    """Fresh parameters, and the variables that are not trained (router biases; mostly empty), as pure-dict trees."""
    return split_params(MoMLanguageModel(config, rngs=nnx.Rngs(key)))


def split_params(model: MoMLanguageModel) -> tuple[Params, Params]:
    """The model's parameters and non-trained variables as pure-dict trees."""
    _, params, variables = nnx.split(model, nnx.Param, RouterBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(variables)


def bind(config: ModelConfig, params: Params, variables: Params) -> MoMLanguageModel:
    """The model with these values; inside jit, grad and the like as well."""
    graph, abstract = model_structure(config)
    abstract = jax.tree.map(lambda x: x, abstract)  # replaced in place
    nnx.replace_by_pure_dict(abstract, _merge(params, variables))
    return nnx.merge(graph, abstract)


def _merge(a: Params, b: Params) -> Params:
    return {
        key: _merge(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key)) for key in a.keys() | b.keys()
    }  # fmt: skip
