"""A Hugging Face model of flash-linear-attention as an inference checkpoint.

    python experiments/import_checkpoint.py --input HUGGING_FACE_DIRECTORY --output imported/model

A Hugging Face --input has config.json (model_type mom or gated_deltanet) and safetensors, tied or untied, in float32,
bfloat16 or float16 (kept as float32); download it first. A gated_deltanet model becomes one with a single memory. Tokenizer
files and generation_config.json come along. What the model has and we do not is refused by name: grouped value heads,
negative eigenvalues, attention biases. export_checkpoint.py writes the same tensors again, to the bit.

A checksums.json in the directory, as export_checkpoint.py writes it, is verified. The output appears when it is whole, with
checksums. mom_jax.load, evaluate.py and export_checkpoint.py read it.
"""

from dataclasses import dataclass
from typing import Literal

import export_checkpoint
from cli import run


@dataclass(frozen=True)
class Import:
    """What to write where."""

    input: str
    """Hugging Face directory; a training run or an inference checkpoint is taken, too, as by export_checkpoint.py."""
    output: str
    """Directory to make."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the parameters in the files; None: as they are, which loses nothing."""
    overwrite: bool = False
    """Whether to replace an earlier export or import in --output; other files are never removed."""


def main(config: Import) -> None:
    export_checkpoint.main(export_checkpoint.Export(**vars(config)))


if __name__ == "__main__":
    run(Import, main, __doc__)
