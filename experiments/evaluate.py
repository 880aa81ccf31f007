"""Perplexity and bits per byte of a trained model on a token file, whole and by position in the row.

    python experiments/evaluate.py --run runs/shakespeare
    python experiments/evaluate.py --run HUGGING_FACE_DIRECTORY --data.path data/shakespeare --data.sequence-length 2048

--run is a directory that experiments/train_lm.py wrote or one in the official Hugging Face layout (with config.json and
safetensors). Prints a table and, with --output, writes the same as JSON. The held-out file of data/shakespeare takes about
a minute on two cores.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from cli import run
from tqdm import tqdm

from mom_jax.checkpoint import load_config, load_params
from mom_jax.config import DataConfig, ModelConfig, require
from mom_jax.config_io import from_dict
from mom_jax.data import make_dataset
from mom_jax.hf import load_pretrained
from mom_jax.model import MoMLanguageModel, bind, split_params
from mom_jax.token_files import TokenFile


@dataclass(frozen=True)
class Evaluate:
    """What to evaluate on what."""

    run: str
    """Directory of a training run, or in the Hugging Face layout."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prepared directory, and how its text is cut into rows."""
    split: Literal["train", "valid"] = "valid"
    """Which of the directory's token files."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    position_groups: int = 8
    """Groups of positions in the row that get a perplexity of their own."""
    output: str | None = None
    """JSON file for the figures; None: print only."""

    def __post_init__(self):
        groups, length = self.position_groups, self.data.sequence_length
        require(0 < groups <= length, "position_groups", groups, f"it must be from 1 to sequence_length = {length}")


def load_model(run: str, dtype: str) -> MoMLanguageModel:
    """The model of a training run's newest whole checkpoint, or of a Hugging Face directory."""
    if not (Path(run) / "checkpoints").is_dir():
        return load_pretrained(run, dtype=dtype)
    checkpoints = Path(run) / "checkpoints"
    config = dataclasses.replace(from_dict(ModelConfig, load_config(checkpoints)["model"]), dtype=dtype, remat="none")
    # The routers' biases of loss-free balancing move the selection: they belong to the model as the parameters do.
    variables = load_params(checkpoints, part="variables") if config.router_bias_rate > 0 else {}
    return bind(config, load_params(checkpoints), variables)


@partial(jax.jit, static_argnums=0)
def losses(config: ModelConfig, params, variables, batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows, for every position: of -log p(target) in nats, and of targets; [T] each."""
    model = bind(config, params, variables)
    out = model.hidden(batch["tokens"], batch.get("attention_mask"), batch.get("document_ids"))
    has_target = batch["targets"] >= 0

    def row(xs):
        hidden, targets = xs
        logits = model.logits(hidden[None])[0]
        label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - label

    nats = jax.lax.map(row, (out.hidden, batch["targets"]))
    return jnp.sum(jnp.where(has_target, nats, 0), axis=0), jnp.sum(has_target, axis=0)


def main(config: Evaluate) -> dict:
    model = load_model(config.run, config.dtype)
    token_file = TokenFile(Path(config.data.path) / f"{config.split}.tokens")
    token_file.verify()
    needed = token_file.description.vocab_size
    require(
        needed <= model.config.vocab_size,
        "ModelConfig.vocab_size", model.config.vocab_size, f"{token_file.path} needs at least {needed}",
    )  # fmt: skip
    params, variables = split_params(model)
    nats, counts = np.zeros(config.data.sequence_length), np.zeros(config.data.sequence_length)
    for batch in tqdm(make_dataset(token_file, config.data, train=False), unit=" batches"):
        more_nats, more_counts = losses(model.config, params, variables, batch)
        nats += np.asarray(more_nats, np.float64)
        counts += np.asarray(more_counts)

    loss = nats.sum() / counts.sum()
    description = token_file.description
    figures = {
        "tokens": int(counts.sum()), "nats_per_token": loss, "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) * description.num_tokens / description.num_bytes, "by_position": [],
    }  # fmt: skip
    print(f"{token_file.path}: {figures['tokens']:,} tokens in rows of {config.data.sequence_length}")
    print(f"perplexity {figures['perplexity']:.3f}   bits per byte {figures['bits_per_byte']:.4f}")
    print("\npositions      perplexity")
    for group in np.array_split(np.arange(config.data.sequence_length), config.position_groups):
        if counts[group].sum() == 0:
            continue
        perplexity = math.exp(min(nats[group].sum() / counts[group].sum(), 700))
        figures["by_position"].append({"first": int(group[0]), "last": int(group[-1]), "perplexity": perplexity})
        print(f"{group[0]:5d} -{group[-1]:5d}   {perplexity:10.3f}")
    if config.output is not None:
        Path(config.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    run(Evaluate, main, __doc__)
