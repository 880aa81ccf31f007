"""Multi-query associative recall: several memories against one, at equal total parameters and at equal total state.

    python experiments/train_mqar.py                                             2 CPU cores, about 5 minutes, one seed
    python experiments/train_mqar.py --config experiments/configs/mqar.json      one H200; the table in README.md

A row lists K key-value pairs and then asks for the value of every key (mom_jax.data.MQARConfig; arXiv 2312.04927). One
memory forgets when K outgrows its key width. Three arms, each with its own learning-rate sweep:

    mom                the model of --model: M routed memories, R a token, and the shared one
    equal parameters   one memory of the same heads; the MLP is widened until the model has as many parameters
    equal state        one memory with (M + shared) times the heads: as many floats of recurrent state

All seeds and learning rates of an arm train at once, in one compiled program; --mesh.data N splits the seeds over N devices,
of several processes too (--distributed.*, as in train_lm.py). An arm that --output already holds, of the same settings, is
not trained again, so an interrupted comparison is finished by the same command. The task is our own small tier: smaller than
Zoology's protocol, and never to be set beside figures published for it. Prints, and writes into --output, the accuracy of
every arm by number of pairs at its best learning rate: mean and spread over the seeds, and the best seed.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cli import run
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from mom_jax.config import MeshConfig, ModelConfig, TrainConfig, require
from mom_jax.config_io import save_config, to_dict
from mom_jax.data import MQARConfig, make_mqar_dataset
from mom_jax.model import bind, init_params, model_structure
from mom_jax.processes import DistributedConfig, console, is_first, join, on_first, raising, require_same, row_share
from mom_jax.sharding import make_mesh
from mom_jax.training import loss_and_metrics, make_optimizer

STEPS_PER_CALL = 20  # between two looks of the host at the loss
PLACES = ("output", "mesh", "distributed")
"""Settings that may differ when an interrupted comparison is finished."""
WHOLE, SEEDS, MODELS = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")  # of [rates, seeds, ...]
Rows = dict[str, jax.Array]


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
    train_rows: int = 20_000
    """Training rows for each number of pairs; batches are drawn from them."""
    batch_size: int = 32
    """Rows in a batch; every seed draws its own."""
    seeds: int = 1
    """Models trained for each arm and learning rate, with different initialisations and data."""
    learning_rates: tuple[float, ...] = (5e-3,)
    """Peak learning rates tried for every arm."""
    test_rows: int = 256
    """Test rows for each number of pairs."""
    output: str = "runs/mqar"
    """Directory of the results, one for all processes."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Of it only data: the devices over which the seeds are split."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        for name in ("seeds", "batch_size", "train_rows", "test_rows"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        require(
            self.train.steps % STEPS_PER_CALL == 0, "train.steps", self.train.steps, f"a multiple of {STEPS_PER_CALL}"
        )  # fmt: skip
        require(bool(self.pairs), "pairs", self.pairs, "at least one number")
        require(bool(self.learning_rates), "learning_rates", self.learning_rates, "at least one rate")
        for name, size in vars(self.mesh).items():
            require(name == "data" or size == 1, f"mesh.{name}", size, "only mesh.data: each model is on one device")
        require(self.seeds % self.mesh.data == 0, "seeds", self.seeds, f"a multiple of mesh.data = {self.mesh.data}")


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


def make_rows(config: TrainMQAR, mesh: Mesh, *, train: bool) -> Rows:
    """Tokens and targets [numbers of pairs, rows, T], on every device; test rows are of another seed than training rows."""
    rows = config.train_rows if train else config.test_rows
    tasks = [
        MQARConfig(
            vocab_size=config.model.vocab_size, sequence_length=config.sequence_length, num_pairs=pairs,
            num_examples=rows, seed=0 if train else 1,
        )
        for pairs in config.pairs
    ]  # fmt: skip
    batches = [next(iter(make_mqar_dataset(task, rows, train=train))) for task in tasks]
    rows = {name: np.stack([batch[name] for batch in batches]) for name in ("tokens", "targets")}
    return {name: jax.make_array_from_process_local_data(NamedSharding(mesh, WHOLE), x) for name, x in rows.items()}


def train_arm(
    config: TrainMQAR, mesh: Mesh, model: ModelConfig, name: str, train_rows: Rows, test_rows: Rows
) -> np.ndarray:
    """Trains every learning rate and seed at once; accuracies [learning rates, seeds, numbers of pairs].

    Every device trains its seeds, without hearing of the others. Batches are drawn on the device: the host only counts.
    """
    # The schedule with a peak of 1; each model multiplies its updates by its own rate.
    optimizer = make_optimizer(dataclasses.replace(config.train, learning_rate=1.0))

    def start(seed):
        params, variables = init_params(model, jax.random.key(seed))
        return params, variables, optimizer.init(params)

    def step(state, rate, seed, index, rows):
        params, variables, moments = state
        key = jax.random.fold_in(jax.random.key(seed), index)
        chosen = jax.random.randint(key, (config.batch_size,), 0, config.train_rows)
        batch = {name: x[index % len(config.pairs), chosen] for name, x in rows.items()}

        def loss(params):
            return loss_and_metrics(bind(model, params, variables), batch, config.sequence_length)

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        return (params, variables, moments), metrics["loss"]

    def steps(state, rate, seed, first, rows):
        indices = first + jnp.arange(STEPS_PER_CALL)
        return jax.lax.scan(lambda state, index: step(state, rate, seed, index, rows), state, indices)

    def over_devices(function, *specs, out_specs):
        """``function`` by every device with its seeds."""
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)

    by_seed = jax.vmap(steps, in_axes=(0, None, 0, None, None))
    by_rate = jax.vmap(by_seed, in_axes=(0, 0, None, None, None))
    apart, whole = NamedSharding(mesh, MODELS), NamedSharding(mesh, WHOLE)
    run = jax.jit(
        over_devices(by_rate, MODELS, WHOLE, SEEDS, WHOLE, WHOLE, out_specs=(MODELS, MODELS)),
        donate_argnums=0, out_shardings=(apart, whole),
    )  # fmt: skip

    def test(state, batch):
        params, variables, _ = state
        return loss_and_metrics(bind(model, params, variables), batch, config.sequence_length)[1]["accuracy"]

    test_all = jax.vmap(jax.vmap(test, in_axes=(0, None)), in_axes=(0, None))
    accuracy = jax.jit(over_devices(test_all, MODELS, WHOLE, out_specs=MODELS), out_shardings=whole)

    def start_all(rates, seeds):
        return jax.vmap(lambda _: jax.vmap(start)(seeds))(rates)

    rates, seeds = np.array(config.learning_rates, np.float32), np.arange(config.seeds, dtype=np.int32)
    state = jax.jit(over_devices(start_all, WHOLE, SEEDS, out_specs=MODELS))(rates, seeds)
    with tqdm(total=config.train.steps, desc=f"{name:>16}", unit=" steps", file=console()) as bar:
        for first in range(0, config.train.steps, STEPS_PER_CALL):
            state, losses = run(state, rates, seeds, first, train_rows)
            bar.set_postfix_str(f"best loss {np.nanmin(np.asarray(losses)[..., -len(config.pairs) :]):.3f}", refresh=False)
            bar.update(STEPS_PER_CALL)
    tests = [{name: x[i] for name, x in test_rows.items()} for i in range(len(config.pairs))]
    return np.stack([np.asarray(accuracy(state, batch)) for batch in tests], axis=-1)


def earlier_results(config: TrainMQAR) -> dict:
    """The arms that an interrupted comparison of the same settings has finished."""
    output = Path(config.output)
    if not (output / "results.json").exists():
        return {}
    earlier = json.loads((output / "config.json").read_text(encoding="utf-8"))
    differ = [name for name, x in to_dict(config).items() if name not in PLACES and earlier.get(name) != x]
    allowed = f"it holds results of other settings ({', '.join(differ)}): choose another, or delete it"
    require(not differ, "output", config.output, allowed)
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def main(config: TrainMQAR) -> dict:
    join(config.distributed)
    require_same(to_dict(config), but=("distributed", "output"))
    mesh = make_mesh(config.mesh)
    row_share(mesh)  # refuses a mesh without some of the processes
    output = Path(config.output)
    results = on_first(lambda: earlier_results(config))
    if is_first():
        output.mkdir(parents=True, exist_ok=True)
        save_config(output / "config.json", config)
    train_rows, test_rows = (make_rows(config, mesh, train=train) for train in (True, False))
    for name, model in make_arms(config.model).items():
        if name in results:
            continue
        with raising():
            accuracy = train_arm(config, mesh, model, name, train_rows, test_rows)
        best = int(np.argmax(accuracy.mean(axis=(1, 2))))
        results[name] = {
            "parameters": count_parameters(model),
            "recurrent_floats_per_layer": recurrent_floats(model),
            "best_learning_rate": config.learning_rates[best],
            "accuracy": accuracy[best].tolist(),
            "accuracy_by_learning_rate": accuracy.mean(axis=(1, 2)).tolist(),
        }
        if is_first():
            (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if is_first():
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
    run(TrainMQAR, main, __doc__)
