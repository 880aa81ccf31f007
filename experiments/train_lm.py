"""Train a Mixture-of-Memories language model on a prepared token file (experiments/prepare_text.py).

    python experiments/train_lm.py --config experiments/configs/shakespeare.json           2 CPU cores, about 9 minutes
    python experiments/train_lm.py --preset mom_340m --data.path DIRECTORY --output runs/mom_340m              one H200
    python experiments/train_lm.py ... --mesh.data 8 --distributed.coordinator HOST:PORT --distributed.num-processes 2 \\
        --distributed.process-id 0            one of two processes of four devices each; --distributed.auto on a cluster

Writes into --output: config.json, tokenizer/, checkpoints/, metrics.jsonl, TensorBoard events, loss_curves.png,
routing.png and sample.txt. The same command continues a run that was stopped or killed, exactly where its last checkpoint
stands, on any number of processes and devices. SIGTERM and Ctrl-C save and end with status 128 + the signal's number (143,
130), --train.preemption-deadline seconds after SIGTERM in any case; a second one ends at once.
--model.bos-token-id and --model.eos-token-id are those of the data, whatever is given.
"""

import dataclasses
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
from cli import run

from mom_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig, require
from mom_jax.config_io import to_dict
from mom_jax.data import make_dataset
from mom_jax.fit import fit
from mom_jax.generation import generate
from mom_jax.model import MoMLanguageModel, bind
from mom_jax.processes import (
    DistributedConfig,
    console,
    is_first,
    join,
    on_first,
    require_same,
    require_shared,
    row_share,
    waiting,
)
from mom_jax.reports import read_metrics
from mom_jax.runs import keep_tokenizer
from mom_jax.sampling import Sampling
from mom_jax.sharding import make_mesh, require_shares, use_mesh
from mom_jax.token_files import TokenFile, load_tokenizer


@dataclass(frozen=True)
class TrainLM:
    """The settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: str = "runs/lm"
    """Directory of the run, one for all processes; it is continued if it holds checkpoints."""
    sample_tokens: int = 200
    """Tokens of each text sampled at the end; 0: none."""
    sample_prompts: tuple[str, ...] = ("\n", "To be, or not", "The night is")
    """Beginnings of the sampled texts; an empty one stands for the beginning of a document."""
    tensorboard: bool = True
    """Whether to write TensorBoard events."""


def main(config: TrainLM) -> None:
    join(config.distributed)
    require_same(to_dict(config), but=("distributed", "output", "data.path"))
    mesh = make_mesh(config.mesh, config.model)
    share, shares = row_share(mesh)
    require_shares(config.data, config.mesh, config.train.accumulation)
    splits = {split: TokenFile(Path(config.data.path) / f"{split}.tokens") for split in ("train", "valid")}
    for token_file in splits.values():
        token_file.verify()
        require(
            token_file.description.vocab_size <= config.model.vocab_size,
            "ModelConfig.vocab_size", config.model.vocab_size,
            f"{token_file.path} needs at least {token_file.description.vocab_size}",
        )  # fmt: skip
    descriptions = {split: token_file.description for split, token_file in splits.items()}
    tokens_per_byte = {split: text.num_tokens / text.num_bytes for split, text in descriptions.items()}
    borders = {f"{name}_token_id": getattr(descriptions["train"], f"{name}_id") for name in ("bos", "eos")}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **borders))
    datasets = {
        split: make_dataset(splits[split], config.data, train=split == "train", process_index=share, process_count=shares)
        for split in splits
    }
    output = Path(config.output)
    require_shared(output)
    on_first(lambda: keep_tokenizer(config.data.path, output))
    if mesh.size < jax.device_count():
        print(f"{mesh.size} of {jax.device_count()} devices are used: see --mesh.data and the others", file=console())

    run_config = {name: value for name, value in to_dict(config).items() if name in ("model", "data", "train")}
    fitted = fit(
        output, config.model, config.train, mesh, datasets["train"], lambda: datasets["valid"],
        run_config=run_config, tokens_per_byte=tokens_per_byte, tensorboard=config.tensorboard,
    )  # fmt: skip
    if fitted.stopped_by is not None:  # whoever sent the signal is waiting
        sys.exit(128 + signal.Signals[fitted.stopped_by])
    text = None
    if config.sample_tokens > 0 and config.sample_prompts:
        model = dataclasses.replace(config.model, remat="none")
        # By all processes, with whom the parameters lie.
        with use_mesh(mesh), waiting("sampling", lambda: "the checkpoint of the last step is kept"):
            text = sample_texts(config, bind(model, fitted.state["params"], fitted.state["variables"]))
    if not is_first():
        return
    if text is not None:
        (output / "sample.txt").write_text(text, encoding="utf-8")
        print(text)
    held_out = [record for record in read_metrics(output) if record["split"] == "valid"][-1]
    files = ("metrics.jsonl", "loss_curves.png", "routing.png", "sample.txt", "checkpoints")
    print(f"\nThe run is in {output}: {', '.join(name for name in files if (output / name).exists())}")
    print(
        f"held out: loss {held_out['loss']:.4f} nats a token, perplexity {held_out['perplexity']:.2f}, "
        f"{held_out['bits_per_byte']:.4f} bits/byte"
    )


def sample_texts(config: TrainLM, model: MoMLanguageModel) -> str:
    """The prompts continued at temperature 0.8, ready to print."""
    tokenizer = load_tokenizer(config.data.path)
    longest = 1 + max(len(tokenizer.encode(prompt)) for prompt in config.sample_prompts)
    rows = generate(
        model, config.sample_prompts, max_new_tokens=config.sample_tokens, max_length=longest + config.sample_tokens,
        sampling=Sampling(0.8, top_k=40), tokenizer=tokenizer,
    )  # fmt: skip
    texts = [prompt + row.text for prompt, row in zip(config.sample_prompts, rows, strict=True)]
    rule = "-" * 80
    return f"\n{rule}\n".join(["", *texts, ""])


if __name__ == "__main__":
    run(TrainLM, main, __doc__)
