"""Multi-query associative recall: several memories against one, at equal total parameters and at equal total state.

    python experiments/train_mqar.py                                             2 CPU cores, about 5 minutes, one seed
    python experiments/train_mqar.py --config experiments/configs/mqar.json      one H200; the table in README.md

A row lists K key-value pairs and then asks for the value of every key (mom_jax.data.MQARConfig; arXiv 2312.04927). One
memory forgets when K outgrows its key width. Three arms, each with its own learning-rate sweep:

    mom                the model of --model: M routed memories, R a token, and the shared one
    equal parameters   one memory of the same heads; the MLP is widened until the model has as many parameters
    equal state        one memory with (M + shared) times the heads: as many floats of recurrent state

All seeds and learning rates of an arm train at once, in one compiled program. The task is our own small tier: smaller than
Zoology's protocol, and never to be set beside figures published for it. Prints, and writes into --output, the accuracy of
every arm by number of pairs at its best learning rate: mean and spread over the seeds, and the best seed.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cli import parse
from tqdm import tqdm

from mom_jax.config import ModelConfig, TrainConfig, require
from mom_jax.config_io import save_config
from mom_jax.data import MQARConfig, make_mqar_dataset
from mom_jax.model import bind, init_params, model_structure
from mom_jax.training import loss_and_metrics, make_optimizer

STEPS_PER_CALL = 10  # batches that are sent to the device together


def default_model() -> ModelConfig:
    return ModelConfig(
        vocab_size=256, hidden_size=32, num_layers=2, num_heads=1, head_dim=16, intermediate_size=64, tie_embeddings=True,
        dtype="float32", remat="none",
    )  # fmt: skip


@dataclass(frozen=True)
class TrainMQAR:
    """The settings of the comparison."""

    model: ModelConfig = field(default_factory=default_model)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=400, warmup_steps=40, weight_decay=0.0))
    """Of these the steps, schedule, AdamW's settings and the clipping apply; learning_rates replace the learning rate."""
    sequence_length: int = 128
    """T, tokens in a row; at least 4 times the largest of pairs."""
    pairs: tuple[int, ...] = (4, 8, 16, 32)
    """K, the numbers of pairs; training batches take turns."""
    batch_size: int = 32
    """Rows in a batch, for every seed its own."""
    seeds: int = 1
    """Models trained for each arm and learning rate, with different initialisations and data."""
    learning_rates: tuple[float, ...] = (5e-3,)
    """Peak learning rates tried for every arm."""
    test_rows: int = 256
    """Test rows for each number of pairs."""
    output: str = "runs/mqar"
    """Directory of the results."""

    def __post_init__(self):
        for name in ("seeds", "batch_size", "test_rows"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        require(bool(self.pairs), "pairs", self.pairs, "at least one number")
        require(bool(self.learning_rates), "learning_rates", self.learning_rates, "at least one rate")


def count_parameters(model: ModelConfig) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model_structure(model)[1]))


def recurrent_floats(model: ModelConfig) -> int:
    """Floats of recurrent state in a layer."""
    return (model.num_memories + model.shared_memory) * model.num_heads * model.head_dim * model.value_head_dim


def make_arms(mom: ModelConfig) -> dict[str, ModelConfig]:
    """The models to compare, by name."""
    memories = mom.num_memories + mom.shared_memory
    one = dataclasses.replace(mom, num_memories=1, top_k=1, shared_memory=False, balance_loss_scale=0.0)
    row = 3 * mom.hidden_size * mom.num_layers  # parameters that one more MLP unit costs
    wider = one.mlp_size + max(0, round((count_parameters(mom) - count_parameters(one)) / row))
    return {
        "mom": mom,
        "equal parameters": dataclasses.replace(one, intermediate_size=wider),
        "equal state": dataclasses.replace(one, num_heads=mom.num_heads * memories),
    }


def make_batches(config: TrainMQAR, *, train: bool, pairs: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of rows with ``pairs`` pairs; test rows are of another seed than training rows."""
    task = MQARConfig(
        vocab_size=config.model.vocab_size, sequence_length=config.sequence_length, num_pairs=pairs,
        num_examples=1 << 40 if train else config.test_rows, seed=0 if train else 1,
    )  # fmt: skip
    rows = config.batch_size * config.seeds if train else config.test_rows
    return iter(make_mqar_dataset(task, rows, train=train))


def train_arm(config: TrainMQAR, model: ModelConfig, name: str) -> np.ndarray:
    """Trains every learning rate and seed at once; accuracies [learning rates, seeds, numbers of pairs]."""
    # The schedule with a peak of 1; each model multiplies its updates by its own rate.
    optimizer = make_optimizer(dataclasses.replace(config.train, learning_rate=1.0))

    def start(seed):
        params, variables = init_params(model, jax.random.key(seed))
        return params, variables, optimizer.init(params)

    def step(state, rate, batch):
        params, variables, moments = state

        def loss(params):
            return loss_and_metrics(bind(model, params, variables), batch, config.sequence_length)

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        return (params, variables, moments), metrics["loss"]

    def steps(state, rate, batches):  # batches [steps, B, T]
        return jax.lax.scan(lambda state, batch: step(state, rate, batch), state, batches)

    by_seed = jax.vmap(steps, in_axes=(0, None, 1))
    run = jax.jit(jax.vmap(by_seed, in_axes=(0, 0, None)), donate_argnums=0)

    def test(state, batch):
        params, variables, _ = state
        return loss_and_metrics(bind(model, params, variables), batch, config.sequence_length)[1]["accuracy"]

    accuracy = jax.jit(jax.vmap(jax.vmap(test, in_axes=(0, None)), in_axes=(0, None)))

    rates = jnp.array(config.learning_rates)
    state = jax.jit(jax.vmap(lambda _: jax.vmap(start)(jnp.arange(config.seeds))))(rates)
    sources = [make_batches(config, train=True, pairs=pairs) for pairs in config.pairs]
    bar = tqdm(total=config.train.steps, desc=f"{name:>16}", unit=" steps")
    done = 0
    while done < config.train.steps:
        count = min(STEPS_PER_CALL, config.train.steps - done)
        batches = [next(sources[(done + i) % len(sources)]) for i in range(count)]
        shape = (count, config.seeds, config.batch_size, config.sequence_length)
        stacked = {key: np.stack([batch[key] for batch in batches]).reshape(shape) for key in ("tokens", "targets")}
        state, losses = run(state, rates, stacked)
        done += count
        bar.update(count)
        bar.set_postfix_str(f"loss {np.nanmin(np.asarray(losses)[..., -1]):.3f}")
    bar.close()
    tests = [next(make_batches(config, train=False, pairs=pairs)) for pairs in config.pairs]
    return np.stack([np.asarray(accuracy(state, batch)) for batch in tests], axis=-1)


def main(config: TrainMQAR) -> dict:
    for pairs in config.pairs:  # refused now rather than after the first arm
        make_batches(config, train=True, pairs=pairs)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    save_config(output / "config.json", config)
    results = {}
    for name, model in make_arms(config.model).items():
        accuracy = train_arm(config, model, name)
        best = int(np.argmax(accuracy.mean(axis=(1, 2))))
        results[name] = {
            "parameters": count_parameters(model),
            "recurrent_floats_per_layer": recurrent_floats(model),
            "best_learning_rate": config.learning_rates[best],
            "accuracy": accuracy[best].tolist(),
            "accuracy_by_learning_rate": accuracy.mean(axis=(1, 2)).tolist(),
        }
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(format_table(config, results))
    return results


def format_table(config: TrainMQAR, results: dict) -> str:
    """The results as a Markdown table: mean over seeds +- standard deviation (best seed)."""
    columns = [f"K = {pairs}" for pairs in config.pairs]
    header = ["arm", "parameters", "state/layer", "rate", *columns, "mean"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, result in results.items():
        accuracy = np.array(result["accuracy"])
        accuracy = np.concatenate([accuracy, accuracy.mean(axis=1, keepdims=True)], axis=1)
        cells = [f"{a.mean():.3f} ± {a.std():.3f} ({a.max():.3f})" for a in accuracy.T]
        size = [f"{result['parameters']:,}", f"{result['recurrent_floats_per_layer']:,}"]
        lines.append("| " + " | ".join([name, *size, f"{result['best_learning_rate']:g}", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse(TrainMQAR, __doc__))
