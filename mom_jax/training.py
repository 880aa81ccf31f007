"""Loss, optimiser, train step and evaluation; fit.py has the loop around them.

The state of a run is one pure-dict tree: ``{"step", "params", "variables", "optimizer", "key"}``. A train step is a pure
function of the state and a batch, compiled once a run, with the state donated.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from mom_jax.config import ModelConfig, TrainConfig, require
from mom_jax.layers import cast_weights
from mom_jax.model import MoMLanguageModel, bind, init_params
from mom_jax.processes import row_share
from mom_jax.sharding import (
    PARAMETER_AXES,
    PARAMETER_MESH_AXES,
    WIDTHS,
    gather_params,
    gather_tokens,
    is_spread,
    leaf_name,
    mesh_axes,
    parameter_specs,
    shardings,
    spec,
    spec_of_tokens,
    use_mesh,
)
from pallas_kernels.api import linear_cross_entropy

Batch = dict[str, jax.Array]
State = dict[str, Any]
Metrics = dict[str, jax.Array]


def cross_entropy(
    model: MoMLanguageModel, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], chunk: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the tokens with a target: of -log p(target), in nats, and of the right first guesses.

    Works on ``chunk`` tokens of every row at a time, so that [B, T, O] never exists.

    Args:
      targets: ids, or -1 where there is no loss.
    """
    config = model.config
    name = "embedding" if config.tie_embeddings else "head"
    head, hidden = getattr(model, name)[...], hidden.astype(config.dtype)
    sums = partial(
        linear_cross_entropy, chunk=chunk, transposed=config.tie_embeddings, implementation=config.implementation
    )  # fmt: skip
    if not is_spread():
        return sums(hidden, head, targets)
    of_head = spec(PARAMETER_AXES[name], head.shape, PARAMETER_MESH_AXES)
    sizes = jax.sharding.get_abstract_mesh().shape
    vocabulary = tuple(axis for axis in mesh_axes(of_head) if axis in WIDTHS and sizes[axis] > 1)
    of_hidden = spec_of_tokens(hidden)
    of_targets = spec("bt", targets.shape) if vocabulary else of_hidden

    def own(hidden, head, targets):
        """Of the device's rows, with its part of the vocabulary; the head's gradient is reduced once, after the chunks."""
        head, hidden = gather_params(head, of_head), gather_tokens(hidden, of_hidden) if vocabulary else hidden
        return jax.lax.psum(sums(hidden, head, targets, axis_name=vocabulary or None), mesh_axes(of_targets))

    return jax.shard_map(
        own, in_specs=(of_hidden, of_head, of_targets), out_specs=PartitionSpec(), check_vma=False
    )(hidden, head, targets)  # fmt: skip


def loss_and_metrics(
    model: MoMLanguageModel, batch: Batch, chunk: int, dropout_key: jax.Array | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """The training loss: mean cross-entropy + balance_loss_scale * balance loss + router_z_loss_scale * z-loss.

    Args:
      batch: ``tokens`` and ``targets`` [B, T] and, for packed rows, ``document_ids`` and ``attention_mask``.

    Returns:
      The loss, and metrics: ``loss`` (the cross-entropy alone, nats a token), ``accuracy``, ``balance_loss``, ``z_loss``,
      ``load`` [MoM layers, M].
    """
    config = model.config
    out = model.hidden(
        batch["tokens"], batch.get("attention_mask"), batch.get("document_ids"), dropout_key=dropout_key
    )  # fmt: skip
    nats, correct = cross_entropy(model, out.hidden, batch["targets"], chunk)
    count = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1)
    balance, z_loss = model.balance_loss(out.router), jnp.sum(out.router.z_loss) / max(1, out.router.z_loss.shape[0])
    metrics = {
        "loss": nats / count, "accuracy": correct / count, "balance_loss": balance, "z_loss": z_loss,
        "load": out.router.load,
    }  # fmt: skip
    return nats / count + config.balance_loss_scale * balance + config.router_z_loss_scale * z_loss, metrics


def has_weight_decay(name: str) -> bool:
    """Whether the parameter of this (leaf) name is decayed: no norm, no bias, no A_log and no dt_bias is."""
    return not (name.endswith(("norm", "bias")) or name == "a_log")


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """The rate of step s (from 0): linear warm-up, then cosine, or stable and a linear decay ("wsd", arXiv 2404.06395)."""
    peak, final, warmup = config.learning_rate, config.learning_rate * config.final_learning_rate, config.num_warmup_steps
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, config.steps - warmup, config.final_learning_rate)
    else:
        decay = max(1, min(round(config.steps * config.decay_fraction), config.steps - warmup))
        rest = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)], [config.steps - warmup - decay]
        )
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1)), rest], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (arXiv 1711.05101) with weight decay by parameter name."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: has_weight_decay(leaf_name(path)), params)

    adamw = optax.adamw(
        learning_rate_schedule(config), config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed
    )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def make_state(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> State:
    """A fresh state; every array is born with its sharding. :func:`abstract_state` is the same without values."""
    return jit_state(model, train, mesh)()


def jit_state(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> Callable[[], State]:
    """The program of :func:`make_state`."""
    init = _init(model, train)
    return jax.jit(init, out_shardings=_state_shardings(init, mesh))


def abstract_state(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of the state."""
    init = _init(model, train)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init), _state_shardings(init, mesh),
    )  # fmt: skip


def _init(model: ModelConfig, train: TrainConfig) -> Callable[[], State]:
    def init():
        key = jax.random.key(train.seed)
        params, variables = init_params(model, key)
        optimizer = make_optimizer(train).init(params)
        return {
            "step": jnp.zeros((), jnp.int32), "params": params, "variables": variables, "optimizer": optimizer,
            "key": jax.random.fold_in(key, 1),
        }  # fmt: skip

    return init


def _state_shardings(init, mesh):
    with use_mesh(mesh):
        return shardings(mesh, parameter_specs(jax.eval_shape(init)))


def make_train_step(model: ModelConfig, train: TrainConfig) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The pure function (state, batch) -> (state, metrics) of one optimiser step, to be jitted with the state donated.

    With ``accumulation`` A the batch is worked through in A pieces of interleaved rows; the cross-entropy's mean is that of
    the whole batch, the balance loss the mean over the pieces. Metrics are those of :func:`loss_and_metrics` plus
    ``grad_norm``, ``param_norm`` (after the step) and ``learning_rate``.
    """
    optimizer, schedule, pieces = make_optimizer(train), learning_rate_schedule(train), train.accumulation

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, variables = state["params"], state["variables"]
        key = jax.random.fold_in(state["key"], state["step"])
        total = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1)

        def gradients(batch, index):
            """Of a piece's part of the loss, and its part of the metrics."""
            share = jnp.sum(batch["targets"] >= 0) / total  # of the whole batch's targets

            def loss(params):
                bound = bind(model, cast_weights(params, model.dtype), variables)
                loss, metrics = loss_and_metrics(bound, batch, train.loss_chunk, jax.random.fold_in(key, index))
                weighed = share * metrics["loss"] + (loss - metrics["loss"]) / pieces
                weights = {name: share if name in ("loss", "accuracy") else 1 / pieces for name in metrics}
                return weighed, {name: weights[name] * metric for name, metric in metrics.items()}

            return jax.grad(loss, has_aux=True)(params)

        if pieces == 1:
            grads, metrics = gradients(batch, 0)
        else:
            batches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0), batch)
            xs = batches, jnp.arange(pieces)
            sums = jax.eval_shape(lambda xs: gradients(*jax.tree.map(lambda x: x[0], xs)), xs)
            zeros = jax.tree.map(jnp.zeros_like, sums)
            (grads, metrics), _ = jax.lax.scan(
                lambda sums, xs: (jax.tree.map(jnp.add, sums, gradients(*xs)), None), zeros, xs
            )  # fmt: skip

        # Otherwise the gradients of unrolled layers are stacked again and again inside of the optimiser's kernels.
        grads = jax.lax.optimization_barrier(grads)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        new = {
            "step": state["step"] + 1,
            "params": params,
            "variables": _balance_biases(model, variables, metrics["load"]),
            "optimizer": optimizer_state,
            "key": state["key"],
        }
        metrics |= {
            "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state["step"]),
        }  # fmt: skip
        return new, metrics

    return step


def jit_step(
    step: Callable[[State, Batch], tuple[State, Metrics]], model: ModelConfig, train: TrainConfig, mesh: Mesh
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """A train step for the mesh: the state donated and laid out as it came, metrics whole on every device."""
    as_it_came = jax.tree.map(lambda x: x.sharding, abstract_state(model, train, mesh))
    whole = jax.NamedSharding(mesh, jax.P())
    return jax.jit(step, donate_argnums=0, out_shardings=(as_it_came, whole))


def _balance_biases(model: ModelConfig, variables, load: Float[Array, "L M"]):
    """Loss-free balancing (arXiv 2408.15664, algorithm 1): each bias moves against its memory's excess load."""
    if model.router_bias_rate == 0:
        return variables
    change = model.router_bias_rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    runs, layer = {}, 0
    for index, (kind, count) in enumerate(model.layer_runs):
        if kind == "mom":
            run = f"run_{index}"
            runs[run] = jax.tree.map(
                lambda bias, layer=layer, count=count: bias + change[layer : layer + count], variables["runs"][run]
            )
            layer += count
    return {"runs": runs}


def make_eval_step(model: ModelConfig, chunk: int) -> Callable[..., Metrics]:
    """The pure function (params, variables, batch) -> sums over the batch: ``nats``, ``correct``, ``count``, ``load``."""

    def step(params, variables, batch: Batch) -> Metrics:
        _, metrics = loss_and_metrics(bind(model, cast_weights(params, model.dtype), variables), batch, chunk)
        count = jnp.sum(batch["targets"] >= 0).astype(jnp.float32)
        sums = {"nats": metrics["loss"], "correct": metrics["accuracy"], "load": metrics["load"]}
        return {name: count * value for name, value in sums.items()} | {"count": count}

    return step


def evaluate(
    step: Callable[..., Metrics], state: State, batches: Iterable[Batch], fetch: Callable[[Metrics], Any] = jax.device_get
) -> dict[str, Any]:
    """Mean ``loss`` (nats a token), ``perplexity``, ``accuracy`` and ``load`` [MoM layers, M] over the batches' targets.

    ``fetch`` brings the sums of one batch to the host while the devices work on the next.
    """
    total: dict[str, Any] = {}
    pending = None
    for batch in itertools.chain(batches, [None]):
        before, pending = pending, None if batch is None else step(state["params"], state["variables"], batch)
        if before is not None:
            sums = fetch(before)
            total = sums if not total else jax.tree.map(np.add, total, sums)
    require(bool(total), "the number of evaluation batches", 0, "there must be at least one")
    loss = float(total["nats"] / total["count"])
    accuracy, load = float(total["correct"] / total["count"]), total["load"] / total["count"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy, "load": load}


def place(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """The batch [B, T] on the devices as :func:`mom_jax.sharding.spec` says; each process gives its own rows."""
    sharding, (_, processes) = jax.sharding.NamedSharding(mesh, spec("bt")), row_share(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (processes * len(x), *x.shape[1:]))
        for name, x in batch.items()
    }
