"""Mixture of memories: route, dispatch, project, run the op, combine (arXiv 2502.13685, section 3)."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mom_jax.config import ModelConfig
from mom_jax.layers import (
    Deferred,
    LayerState,
    LayerWeight,
    Product,
    einsum,
    einsums,
    normal_param,
    ones_param,
    stack_of,
)
from mom_jax.routing import Dispatch, Router, Routing
from mom_jax.sharding import (
    EXCHANGED,
    PARAMETER_AXES,
    WIDTHS,
    constrain,
    constrain_tokens,
    gather_params,
    gather_tokens,
    leaf_name,
    letters_of_memories,
    parameter_specs,
    shares_tokens,
    spec,
    spec_of_tokens,
    splits_tokens,
)
from mom_jax.update_rules import UPDATE_RULES
from pallas_kernels import api
from pallas_kernels.api import SEGMENT_ALIGNMENT


class MemoryState(NamedTuple):
    """What a MoM layer carries from piece to piece; its size does not depend on the number of tokens.

    Attributes:
      recurrent: the update rule's pytree, float32 [B, M', ...]; M' counts the shared memory, which is the last.
      history: {stream: [B, M', W-1, H, width]}, the last inputs of each memory's short convolution.
      document: int32 [B, M'], the document of each memory's last token; -1 for a memory that no token has reached.
    """

    recurrent: Any
    history: dict[str, jax.Array]
    document: Int[Array, "B M"]


class MixtureOfMemories(nnx.Module):
    """The token mixer: each token reads and writes its R memories and the shared one::

        o_t = sum over chosen m of w_t[m] (S^m)^T q_t^m + shared       y_t = W_o (RMSNorm_head(o_t) * silu(x_t W_g))

    Short inputs (fewer tokens than the segment alignment; decoding) update the chosen memories token by token; longer ones
    are dispatched to slots. Both are the same function.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, h, k, v = config.hidden_size, config.num_heads, config.head_dim, config.value_head_dim
        self.router = Router(config, rngs=rngs)
        self.rule = UPDATE_RULES[config.update_rule](config, rngs=rngs)
        # The uniform initialisation of a depthwise convolution over W taps.
        bound = config.conv_size**-0.5
        for stream, width in (("q", k), ("k", k), ("v", v)):
            shape = (config.conv_size, h, width)
            weight = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            setattr(self, f"conv_{stream}", nnx.Param(weight))
            if config.conv_bias:
                setattr(self, f"conv_{stream}_bias", nnx.Param(jnp.zeros((h, width))))
        if config.use_output_gate:
            self.w_g = normal_param(rngs, config, d, h, v)
        self.out_norm = ones_param(v)
        self.w_o = normal_param(rngs, config, h, v, d)

    @property
    def num_memories(self) -> int:
        """M', the shared memory counted."""
        return self.config.num_memories + self.config.shared_memory

    def init_state(self, batch_size: int) -> MemoryState:
        """Empty memories, of which every device of a mesh has some heads."""
        config, count = self.config, self.num_memories
        leading = (batch_size, count, config.conv_size - 1, config.num_heads)
        widths = {"q": config.head_dim, "k": config.head_dim, "v": config.value_head_dim}
        history = {stream: jnp.zeros((*leading, width), config.dtype) for stream, width in widths.items()}
        return MemoryState(
            recurrent=jax.tree.map(lambda s: constrain(s, "bMh"), self.rule.init_state(batch_size, count)),
            history=jax.tree.map(lambda s: constrain(s, "bMWh"), history),
            document=constrain(jnp.full((batch_size, count), -1, jnp.int32), "bM"),
        )

    def __call__(
        self,
        x: Float[Array, "B T D"] | Deferred,
        mask: Bool[Array, "B T"] | None,
        documents: Int[Array, "B T"] | None,
        state: LayerState | None,
        residual: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing, MemoryState | None]:
        """Mixes the tokens of a piece.

        Args:
          mask: False for padded tokens, which are routed nowhere; None: all are real.
          documents: document of each token, non-decreasing along a row; None: one document.
          state: the layers' states before the piece; None: empty memories, and no state is returned.
          residual: is added to y.

        Returns:
          y, the routing, and the layers' states [layers, B, ...] after the piece.
        """
        routing, of_o = self.router(x, mask), "bt"
        if x.shape[1] < SEGMENT_ALIGNMENT:
            o, new_state = self._step_through(x, routing, mask, documents, state)
        elif state is None and shares_tokens(x):
            of_o = letters_of_memories(x, width_outside_memories(self.config))
            o, new_state = self._run_spread(x, routing, mask, documents, of_o), None
        else:  # by the partitioner
            of_rows = (constrain(a, "bt") for a in (x, routing.memories, routing.weights))
            o, new_state = self._run_dispatched(*of_rows, mask, documents, state)
        o, w_o = constrain(o, f"{of_o}hv"), self.w_o[...]
        y = einsum(f"{of_o}hv,hvd->{of_o}d", o, w_o, dtype=self.config.dtype, residual=residual)
        return constrain_tokens(y), routing, None if state is None else new_state

    def _convolution(self, stream: str) -> tuple[jax.Array | LayerWeight, jax.Array | LayerWeight | None]:
        bias = getattr(self, f"conv_{stream}_bias")[...] if self.config.conv_bias else None
        return getattr(self, f"conv_{stream}")[...], bias

    def _run_dispatched(self, x, memories, weights, mask, documents, state):
        gate, dispatch = self._gate(x), Dispatch.of(memories, mask, self.num_memories, self.config.shared_memory)
        o, state = self._run(x, self.rule.token_streams(x), memories, dispatch, documents, state)
        o = api.combine_gated_rms_norm(
            o, weights, gate, self.out_norm[...], self.config.norm_eps, choice_of=dispatch.choice_of,
            token_of=dispatch.token_of, slot_of=dispatch.slot_of, implementation=self.config.implementation,
        )  # fmt: skip
        return o, state

    def _gate(self, x):
        if not self.config.use_output_gate:
            return None
        # The barrier keeps XLA from making one product of this and the queries', whose halves it then copies.
        return einsum("btd,dhv->bthv", lax.optimization_barrier(x), self.w_g[...], dtype=self.config.dtype)

    def _run(self, x, of_tokens, memories, dispatch, documents, state):
        """Outputs in slots [B, N, H, V], and the state; ``of_tokens``: the rule's ``token_streams`` of x."""
        segments, where = dispatch.segments, {"token_of": dispatch.token_of, "slot_of": dispatch.slot_of}
        run_ids = None if documents is None else dispatch.integers_to_slots(documents)
        of_slots = {} if self.config.single_kv_proj else self.rule.slot_streams(x, dispatch)
        gates = self.rule.gates(x, memories)
        gates = {name: dispatch.choices_to_slots(gate) for name, gate in gates.items()}

        streams = of_tokens | of_slots
        token_of = dict.fromkeys(of_tokens, dispatch.token_of) | dict.fromkeys(of_slots)
        history, recurrent, handover = dict.fromkeys(streams), None, None
        if state is not None:
            entered, document = _enter(state.get(), segments, run_ids)
            history, recurrent = entered.history, entered.recurrent
        elif splits_tokens():
            handover, past = api.Handover.of(segments, run_ids, "sequence"), self.config.conv_size - 1
            history = {
                name: handover.convolution_history(stream, segments, run_ids, past, token_of[name])
                for name, stream in streams.items()
            }
        convolved = {
            name: api.short_convolution(
                stream, *self._convolution(name), segments, run_ids, history[name],
                normalize=name in self.rule.normalized, **(where if name in of_tokens else {}),
                implementation=self.config.implementation,
            )
            for name, stream in streams.items()
        }  # fmt: skip
        o, recurrent = self.rule.run(convolved, gates, segments, run_ids, recurrent, handover)
        if state is not None:
            history = {
                name: api.convolution_history(stream, segments, run_ids, history[name], token_of[name])
                for name, stream in streams.items()
            }
            state = state.set(MemoryState(recurrent, history, document))
        return o, state

    def _run_spread(self, x, routing, mask, documents, of_o):
        """:meth:`_run_dispatched` on every device of the mesh with its tokens, its memories and its heads.

        Args:
          of_o: the letters of the outputs' tokens: of rows that a device has between products, or of its data shard.
        """
        graph, state = nnx.split(self)
        params = nnx.to_pure_dict(state)
        outside = {name: params.pop(name) for name in ("router", "w_o")}  # not needed inside
        in_specs = parameter_specs(params)

        def module(params, **changes):
            values = jax.tree.map(lambda x: x, state)  # replaced in place
            nnx.replace_by_pure_dict(values, params | jax.tree.map(lambda _: jnp.zeros(()), outside))
            found, config = nnx.merge(graph, values), copy.copy(self.config)
            for name, value in changes.items():  # not replace(), whose checks are of whole models
                object.__setattr__(config, name, value)
            found.config = found.rule.config = config
            return found

        def run(params, x, memories, weights, *arguments):
            params = gather_params(params, in_specs)
            gathered, own = (gather_tokens(a, between) for a in (x, memories, weights)), None
            if of_o == "rt":  # the routed memories' parameters too, which nothing takes from there: XLA drops them
                own = x, gather_params(params, in_specs, WIDTHS)
            return _run_shard(self.config, module, params, own, *gathered, *arguments)

        between, tokens = spec_of_tokens(x), spec("bt")
        return jax.shard_map(
            run, in_specs=(in_specs, *(between,) * 3, tokens, tokens), out_specs=spec(f"{of_o}hv"), check_vma=False
        )(params, x, routing.memories, routing.weights, mask, documents)  # fmt: skip

    def _step_through(self, x, routing, mask, documents, state):
        config, (batch, num_tokens) = self.config, x.shape[:2]
        memories, weights, products = routing.memories, routing.weights, self.rule.products()
        if config.use_output_gate:
            products["gate"] = Product("btd,dhv->bthv", (self.w_g[...],))
        # What no token chose is not read; with one token a row that is what decoding reads in all.
        products = einsums(x, products, dtype=config.dtype, chosen=memories)
        streams, gates = self.rule.streams(products), self.rule.chosen_gates(products, memories)
        real = jnp.ones((batch, num_tokens), bool) if mask is None else mask
        documents = jnp.zeros((batch, num_tokens), jnp.int32) if documents is None else documents
        if state is None:
            state = LayerState(jax.tree.map(lambda s: s[None], self.init_state(batch)), jnp.int32(0))
        convolutions = {name: self._convolution(name) for name in streams}
        taps, biases = ({name: stack_of(both[part]) for name, both in convolutions.items()} for part in (0, 1))

        def step(states: MemoryState, token):
            """One token of every row; arrays of ``token`` are [B, R', ...], streams [B, M' or 1, ...], or [B]."""
            streams, gates, memories, real, documents = token
            last = api.states_at(states.document, state.layer, memories)
            place = api.Place(state.layer, memories, last == documents[:, None], real)
            convolved, history = api.short_convolution_step(
                streams, taps, biases, states.history, place, normalized=self.rule.normalized,
                implementation=config.step_implementation,
            )  # fmt: skip
            o, recurrent = self.rule.step(convolved, gates, states.recurrent, place)
            document = place.write(states.document, jnp.broadcast_to(documents[:, None], memories.shape))
            return MemoryState(recurrent, history, document), o

        # Over tokens in sequence, over rows at once.
        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (streams, gates, memories, real, documents))
        after, o = lax.scan(step, state.stack, tokens)
        o = jnp.moveaxis(o, 0, 1)
        if mask is not None:
            o = jnp.where(real[..., None, None, None], o, 0)
        gate = products.get("gate")
        o, weights, gate = (None if a is None else a.reshape(-1, *a.shape[2:]) for a in (o, weights, gate))
        o = api.combine_step(
            o, weights, gate, stack_of(self.out_norm[...]), state.layer, eps=config.norm_eps,
            implementation=config.step_implementation,
        )  # fmt: skip
        return o.reshape(batch, num_tokens, *o.shape[1:]), after


def width_outside_memories(config: ModelConfig) -> int:
    """The widths of W_q, W_g, W_o and the shared memory's matrices, added up."""
    k, v, shared = config.head_dim, config.value_head_dim, config.shared_memory or config.single_kv_proj
    return config.num_heads * (k + v + v * config.use_output_gate + (k + v) * shared)


def _run_shard(config: ModelConfig, module, params, own_rows, x, memories, weights, mask, documents):
    """One device's part of the outputs, [B, T, H / (tensor memory), V], or [B / memory, T, H, V].

    The routed memories of the device work on its ``tensor`` part of the heads, all of them, of all rows; the shared memory,
    the norm and the gate on its own part: of the heads over ``tensor`` and ``memory``, or of the rows.

    Args:
      module: makes the mixer of parameters and changes of the config.
      params: the device's: of its memories and heads; w_q, w_g and the shared memory's of its part over both axes.
      own_rows: (x, parameters) of its own part if that is of the rows: those rows, and all heads. None: it is of the heads.
    """
    shards, shard = lax.axis_size("memory"), lax.axis_index("memory")
    heads = config.num_heads // lax.axis_size("tensor")
    if shards == 1:
        return module(params, num_heads=heads)._run_dispatched(x, memories, weights, mask, documents, None)[0]

    def part(a, axis):
        size = a.shape[axis] // shards
        return lax.dynamic_slice_in_dim(a, shard * size, size, axis)

    def of_own_heads(path, a):
        axis = PARAMETER_AXES[leaf_name(path)].find("H")
        return a if axis < 0 else part(a, axis)

    if own_rows is None:
        split, own_x, own_mask, own_documents = 2, x, mask, documents
        own_params, own_heads = jax.tree_util.tree_map_with_path(of_own_heads, params), heads // shards
    else:
        split, own_heads, (own_x, own_params) = 0, heads, own_rows
        own_mask, own_documents = (None if a is None else part(a, 0) for a in (mask, documents))
    count = config.num_memories // shards
    routed = module(params, num_heads=heads, num_memories=count, shared_memory=False)
    own = module(own_params, num_heads=own_heads)
    if config.single_kv_proj:
        for name in ("shared_a", "shared_b"):
            gates = getattr(own.rule, name)[...]
            gates = gates if own_rows else lax.all_gather(gates, "memory", axis=1, tiled=True)
            setattr(routed.rule, name, nnx.Param(gates))
    of_own_tokens = own.rule.token_streams(own_x)
    of_tokens = {
        name: checkpoint_name(lax.all_gather(stream, "memory", axis=split, tiled=True), EXCHANGED)
        for name, stream in of_own_tokens.items()
    }
    chosen = memories[..., : config.top_k] - shard * count
    dispatch = Dispatch.of(chosen, mask, count, has_shared=False)
    o, _ = routed._run(x, of_tokens, chosen, dispatch, documents, None)
    o = dispatch.to_tokens(o, weights[..., : config.top_k], config.implementation)
    o = checkpoint_name(lax.psum_scatter(o, "memory", scatter_dimension=split, tiled=True), EXCHANGED)
    if config.shared_memory:
        # A single memory, which every token chooses, with the shared projections.
        one = {"num_memories": 1, "shared_memory": False, "single_kv_proj": True}
        shared, first = module(own_params, num_heads=own_heads, **one), jnp.zeros((*own_x.shape[:2], 1), jnp.int32)
        is_in_place = mask is None and x.shape[1] % SEGMENT_ALIGNMENT == 0
        dispatch = Dispatch.in_place(*first.shape[:2]) if is_in_place else Dispatch.of(first, own_mask, 1, has_shared=False)
        streams = shared.rule.token_streams(own_x) | of_own_tokens
        of_shared, _ = shared._run(own_x, streams, first, dispatch, own_documents, None)
        o += dispatch.to_tokens(of_shared, jnp.ones(first.shape, weights.dtype), config.implementation)
    return api.gated_rms_norm(o, own._gate(own_x), own.out_norm[...], config.norm_eps)


def _enter(state: MemoryState, segments, run_ids) -> tuple[MemoryState, jax.Array]:
    """The state as the piece's tokens find it, and the document of each memory after the piece.

    A memory whose last token was of an older document than the first that it gets now begins afresh: it must not answer
    from the older one, however many documents ago that was.
    """

    def document_at(slot):
        slot = jnp.clip(slot, 0, run_ids.shape[1] - 1)
        return jnp.take_along_axis(run_ids, slot, axis=1)

    starts, is_reached = segments.offsets[:, :-1], segments.lengths > 0
    if run_ids is None:
        run_ids = jnp.zeros((starts.shape[0], 1), jnp.int32)
    continues = ~is_reached | (state.document == document_at(starts))
    document = jnp.where(is_reached, document_at(starts + segments.lengths - 1), state.document)

    def keep(s):
        return jnp.where(continues.reshape(continues.shape + (1,) * (s.ndim - 2)), s, 0)

    return jax.tree.map(keep, state)._replace(document=document), document
