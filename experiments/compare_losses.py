"""Does training with the kernels go as it does with plain JAX? Losses of the same run side by side, with a control.

    python experiments/compare_losses.py --data.path data/shakespeare           one H200, about 3 minutes

From the same parameters and on the same batches, --steps steps are trained

    plain        with the plain implementation
    kernels      with the kernels
    reordered    with the plain implementation, the units of the model's width in another order: the same function, all of
                 whose sums over the width are added up in another order

Rounding alone moves a token to another memory now and then, so no two of the three agree exactly. What is to be seen is
that the kernels are no further from plain than reordered is: their spread, the mean over steps and seeds of
|loss - plain loss|, is printed with that of the control. Writes losses.json and losses.png into --output.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from cli import run

from mom_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig, mom_340m, require
from mom_jax.data import make_dataset
from mom_jax.sharding import make_mesh, use_mesh
from mom_jax.token_files import TokenFile
from mom_jax.training import make_state, make_train_step, place


@dataclass(frozen=True)
class CompareLosses:
    """What to train."""

    model: ModelConfig = field(default_factory=lambda: mom_340m(vocab_size=2048, num_layers=4))
    data: DataConfig = field(default_factory=lambda: DataConfig(sequence_length=1024, batch_size=4))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100, warmup_steps=10, learning_rate=1e-3))
    plain: str = "chunked"
    """The implementation that the others are compared with."""
    kernels: str = "triton"
    """The implementation in question."""
    seeds: int = 4
    """Runs of each, from as many initialisations."""
    output: str = "runs/compare_losses"
    """Directory of the figures."""

    def __post_init__(self):
        require(self.seeds > 0, "seeds", self.seeds, "it must be positive")
        sizes = {self.model.vocab_size, self.model.mlp_size, self.model.num_heads, self.model.head_dim}
        width = self.model.hidden_size
        require(width not in sizes, "ModelConfig.hidden_size", width, "no other axis may have this size: it is reordered")


def reordered(tree, width: int, seed: int):
    """The arrays of a state with every axis of size ``width`` in the same other order."""
    order = np.random.default_rng(seed).permutation(width)

    def leaf(x):
        for axis, size in enumerate(x.shape):
            x = x.take(order, axis) if size == width else x
        return x

    return jax.tree.map(leaf, tree)


def losses(config: CompareLosses, mesh, batches: list, step, seed: int, reorder: bool) -> list[float]:
    """The loss of every step, in nats a token."""
    state = make_state(config.model, dataclasses.replace(config.train, seed=seed), mesh)
    if reorder:
        state["params"] = jax.jit(reordered, static_argnums=(1, 2))(state["params"], config.model.hidden_size, seed)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(metrics["loss"])
    return np.asarray(jax.device_get(found), np.float64).tolist()


def main(config: CompareLosses) -> dict:
    tokens = TokenFile(Path(config.data.path) / "train.tokens")
    tokens.verify()
    known = tokens.description.vocab_size
    require(known <= config.model.vocab_size, "ModelConfig.vocab_size", config.model.vocab_size, f"the text needs {known}")
    mesh = make_mesh(MeshConfig())
    found = {"plain": [], "kernels": [], "reordered": []}
    with use_mesh(mesh):
        rows = islice(make_dataset(tokens, config.data, train=True), config.train.steps)
        batches = [place(batch, mesh) for batch in rows]
        steps = {}
        for name in (config.plain, config.kernels):
            model = dataclasses.replace(config.model, implementation=name)
            steps[name] = jax.jit(make_train_step(model, config.train), donate_argnums=0)
        for seed in range(config.seeds):
            for arm in found:
                implementation = config.kernels if arm == "kernels" else config.plain
                found[arm].append(losses(config, mesh, batches, steps[implementation], seed, arm == "reordered"))
            ends = ", ".join(f"{arm} {runs[-1][0]:.4f} -> {runs[-1][-1]:.4f}" for arm, runs in found.items())
            print(f"seed {seed}: {ends}", flush=True)

    differences = {arm: np.abs(np.subtract(found[arm], found["plain"])) for arm in ("kernels", "reordered")}
    spreads = {arm: float(np.mean(difference)) for arm, difference in differences.items()}
    by_seed = {arm: np.mean(difference, axis=1).tolist() for arm, difference in differences.items()}
    figures = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": str(date.today()),
        "implementations": {"plain": config.plain, "kernels": config.kernels},
        "spread": spreads, "spread_by_seed": by_seed, "losses": found,
    }  # fmt: skip
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "losses.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    plot(found, differences, output / "losses.png")
    print(f"{figures['device']}, jax {jax.__version__}: mean |loss - plain| of {config.train.steps} steps, nats a token")
    for arm, spread in spreads.items():
        seeds = ", ".join(f"{value:.2e}" for value in by_seed[arm])
        print(f"{arm:>10} {spread:.2e} (by seed {seeds}), at most {differences[arm].max():.2e}")
    return figures


def plot(found: dict, differences: dict, path: Path) -> None:
    """The losses of the first seed, and the mean distance from plain at each step."""
    from matplotlib.figure import Figure

    figure = Figure((9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in found.items():
        left.plot(runs[0], label=arm, linewidth=1)
    for arm, difference in differences.items():
        right.semilogy(np.maximum(difference.mean(axis=0), 1e-7), label=arm, linewidth=1)
    left.set(xlabel="step", ylabel="loss, nats a token")
    right.set(xlabel="step", ylabel="|loss - plain loss|, mean over seeds")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(CompareLosses, main, __doc__)
