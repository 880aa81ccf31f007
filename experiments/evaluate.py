"""Perplexity and bits per byte of a trained model on a token file, whole and by position in the row.

    python experiments/evaluate.py --model runs/shakespeare
    python experiments/evaluate.py --model HUGGING_FACE_DIRECTORY --data.path data/shakespeare --data.sequence-length 2048

--model is a directory that train_lm.py, export_checkpoint.py or import_checkpoint.py wrote, or one in the official Hugging
Face layout (config.json and safetensors). A run is evaluated on its own data, in rows of its own length, unless the data
flags say otherwise; everything else needs --data.path, and for a run's figures that run's --data.sequence-length. Text that
another tokenizer encoded is refused for a run and its inference checkpoint; for a Hugging Face model this is not known:
encode the text with its tokenizer (prepare_text.py --tokenizer FILE). Prints a table and, with --output, writes the same as
JSON. --mesh.* and --distributed.* are those of train_lm.py: the weights are split as in training, the rows are shared, and
the figures are those of one device. The held-out file of data/shakespeare takes about a minute on two cores.
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
from jax.sharding import Mesh
from tqdm import tqdm

from mom_jax.config import DataConfig, MeshConfig, ModelConfig, require
from mom_jax.config_io import to_dict
from mom_jax.data import make_dataset
from mom_jax.interchange import open_source
from mom_jax.model import MoMLanguageModel, bind, split_params
from mom_jax.processes import DistributedConfig, console, is_first, join, raising, require_same, row_share
from mom_jax.runs import DEFAULTS, DESCRIPTION
from mom_jax.sharding import ROWS, constrain, make_mesh, require_shares, use_mesh
from mom_jax.token_files import TokenFile, require_same_tokenizer
from mom_jax.training import place
from mom_jax.weights import to_model


@dataclass(frozen=True)
class EvaluationData:
    """What to evaluate on; None: what the run was trained with, for any other model train_lm.py's default."""

    path: str | None = None
    """Directory that experiments/prepare_text.py wrote; what is no run needs one."""
    sequence_length: int | None = None
    """T, tokens in a row; of an export give the run's, which it does not keep."""
    batch_size: int | None = None
    """Rows at a time."""
    packing: bool | None = None
    """Whether rows hold whole documents with borders kept (True) or plain windows of the token stream (False)."""


@dataclass(frozen=True)
class Evaluate:
    """What to evaluate on what."""

    model: str
    """Directory of a training run or an inference checkpoint, or in the Hugging Face layout."""
    best: bool = False
    """Of a run: the checkpoint of lowest held-out loss instead of the newest one."""
    data: EvaluationData = field(default_factory=EvaluationData)
    split: Literal["train", "valid"] = "valid"
    """Which of the directory's token files."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""
    position_groups: int = 8
    """Groups of positions in the row that get a perplexity of their own."""
    output: str | None = None
    """JSON file for the figures; None: print only."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


def load(config: Evaluate, mesh: Mesh | None = None) -> tuple[MoMLanguageModel, DataConfig, int | None]:
    """The model, split over the mesh, the data that it is evaluated on, and the step of a run's checkpoint."""
    source = open_source(config.model, best=config.best, dtype=config.dtype, **DEFAULTS)
    given = {name: x for name, x in vars(config.data).items() if x is not None}
    require(source.data or "path" in given, "data.path", None, "only a run says its data: name a prepared directory")
    data = dataclasses.replace(source.data or DataConfig(), **given)
    if (source.tokenizer / DESCRIPTION).is_file():  # a run's, or exported from one
        require_same_tokenizer(Path(data.path) / f"{config.split}.json", source.tokenizer / DESCRIPTION)
    require_shares(data, config.mesh)
    return to_model(source.weights, mesh), data, source.step


@partial(jax.jit, static_argnums=0)
def losses(config: ModelConfig, params, variables, batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows, for every position: of -log p(target) in nats, and of targets; [T] each, whole on every device."""
    model = bind(config, params, variables)
    sizes = jax.sharding.get_abstract_mesh().shape
    shares = math.prod(sizes.get(axis, 1) for axis in ROWS)
    out = model.hidden(batch["tokens"], batch.get("attention_mask"), batch.get("document_ids"))

    def one_of_each(x):
        """x [B, T, ...] as [B / shares, shares, T, ...], so that every device that has rows works on one of its own."""
        return constrain(x.reshape(shares, -1, *x.shape[1:]).swapaxes(0, 1), "Bbt")

    def of_rows(xs):
        hidden, targets = xs
        logits, has_target = model.logits(hidden), targets >= 0
        label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        nats = jnp.where(has_target, jax.nn.logsumexp(logits, axis=-1) - label, 0)
        return jnp.sum(nats, axis=0), jnp.sum(has_target, axis=0)

    sums = jax.lax.map(of_rows, (one_of_each(out.hidden), one_of_each(batch["targets"])))
    return jax.tree.map(lambda x: constrain(jnp.sum(x, axis=0), "T"), sums)


def main(config: Evaluate) -> dict:
    join(config.distributed)
    require_same(to_dict(config), but=("distributed", "model", "output", "data.path"))
    mesh = make_mesh(config.mesh)
    share, shares = row_share(mesh)
    model, data, step = load(config, mesh)
    groups, length = config.position_groups, data.sequence_length
    require(0 < groups <= length, "position_groups", groups, f"it must be from 1 to data.sequence_length = {length}")
    token_file = TokenFile(Path(data.path) / f"{config.split}.tokens")
    token_file.verify()
    needed = token_file.description.vocab_size
    require(
        needed <= model.config.vocab_size,
        "the model's vocab_size", model.config.vocab_size, f"{token_file.path} needs at least {needed}",
    )  # fmt: skip
    params, variables = split_params(model)
    nats, counts = np.zeros(length), np.zeros(length)
    batches = make_dataset(token_file, data, train=False, process_index=share, process_count=shares)
    with use_mesh(mesh), raising():
        for batch in tqdm(batches, unit=" batches", file=console()):
            more_nats, more_counts = losses(model.config, params, variables, place(batch, mesh))
            nats += np.asarray(more_nats, np.float64)
            counts += np.asarray(more_counts)

    loss = nats.sum() / counts.sum()
    description = token_file.description
    figures = {
        "model": config.model, "step": step, "tokens": int(counts.sum()), "nats_per_token": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) * description.num_tokens / description.num_bytes, "by_position": [],
    }  # fmt: skip
    for group in np.array_split(np.arange(length), groups):
        if counts[group].sum() > 0:
            perplexity = math.exp(min(nats[group].sum() / counts[group].sum(), 700))
            figures["by_position"].append({"first": int(group[0]), "last": int(group[-1]), "perplexity": perplexity})
    if is_first():
        report(config, figures, token_file.path, length)
    return figures


def report(config: Evaluate, figures: dict, text: Path, length: int) -> None:
    """Prints the figures, and writes them if there is an output."""
    print(config.model + ("" if figures["step"] is None else f": checkpoint of step {figures['step']}"))
    print(f"{text}: {figures['tokens']:,} tokens")
    print(f"perplexity {figures['perplexity']:.3f}   bits per byte {figures['bits_per_byte']:.4f}   in rows of {length}")
    print("\npositions      perplexity")
    for group in figures["by_position"]:
        print(f"{group['first']:5d} -{group['last']:5d}   {group['perplexity']:10.3f}")
    if config.output is not None:
        Path(config.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(Evaluate, main, __doc__)
