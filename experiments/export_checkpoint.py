"""Weights of a training run, without its optimiser, for inference here or for flash-linear-attention.

    python experiments/export_checkpoint.py --input runs/shakespeare --output exported/orbax
    python experiments/export_checkpoint.py --input runs/shakespeare --output exported/hf --format huggingface

--input is a directory that train_lm.py wrote, an inference checkpoint or a Hugging Face directory. --format orbax writes an
inference checkpoint: parameters, router biases, configuration, tokenizer. --format huggingface writes what
MomForCausalLM.from_pretrained of flash-linear-attention loads, or GatedDeltaNetForCausalLM for a model of one memory with
--model-type gated_deltanet; its router, which decides nothing, is left out. The tokenizer comes along as transformers'
PreTrainedTokenizerFast; that of byte models, which has no file, as an equal byte-level tokenizer.json.

The output appears when it is whole, with SHA-256 checksums, which every reading verifies. No more of the model is held in
memory at once than a few times its largest array. mom_jax.load, evaluate.py and this program read both outputs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cli import run

from mom_jax.config import require
from mom_jax.interchange import open_source, to_hugging_face, to_inference_checkpoint


@dataclass(frozen=True)
class Export:
    """What to write where."""

    input: str
    """Directory of a training run, an inference checkpoint or a Hugging Face model."""
    output: str
    """Directory to make."""
    format: Literal["orbax", "huggingface"] = "orbax"
    """Inference checkpoint, or Hugging Face directory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the parameters in the files; None: as they are, which loses nothing."""
    best: bool = False
    """Of a run: the checkpoint of lowest held-out loss instead of the newest one."""
    model_type: Literal["mom", "gated_deltanet"] | None = None
    """Of a Hugging Face directory; None: what the input was imported from, else mom."""
    max_shard_bytes: float = 5e9
    """Of a Hugging Face directory: size above which the tensors are spread over several files."""
    overwrite: bool = False
    """Whether to replace an earlier export or import in --output; other files are never removed."""

    def __post_init__(self):
        is_used = self.model_type is None or self.format == "huggingface"
        require(is_used, "model_type", self.model_type, "it needs --format huggingface")


def main(config: Export) -> None:
    source = open_source(config.input, best=config.best)
    output = {"dtype": config.dtype, "overwrite": config.overwrite}
    if config.format == "orbax":
        to_inference_checkpoint(source, config.output, **output)
    else:
        more = {"model_type": config.model_type, "max_shard_bytes": config.max_shard_bytes}
        to_hugging_face(source, config.output, **output, **more)
    size = sum(file.stat().st_size for file in Path(config.output).rglob("*") if file.is_file())
    print(f"{config.output}: {size / 1e6:,.1f} MB; python: mom_jax.load({config.output!r})")


if __name__ == "__main__":
    run(Export, main, __doc__)
