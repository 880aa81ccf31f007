"""The directory of a training run, read back: the model, its tokenizer and what it was trained on.

    RUN/checkpoints/    see checkpoint.py
    RUN/tokenizer/      the tokenizer of the training text: its train.json and tokenizer.json (see token_files.py)
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from mom_jax.checkpoint import find_step, load_config
from mom_jax.config import DataConfig, ModelConfig
from mom_jax.config_io import from_dict
from mom_jax.inference_checkpoint import open_state
from mom_jax.model import MoMLanguageModel
from mom_jax.processes import on_first
from mom_jax.token_files import TOKENIZER_FILE, Tokenizer, load_tokenizer, require_same_tokenizer
from mom_jax.weights import Weights, to_model, with_config

CHECKPOINTS, TOKENIZER, DESCRIPTION = "checkpoints", "tokenizer", "train.json"


class Run(NamedTuple):
    """Attributes:
    model: the model of the checkpoint.
    tokenizer: of the text that it was trained on.
    step: the checkpoint's.
    data: what it was trained on, and how that was cut into rows.
    """

    model: MoMLanguageModel
    tokenizer: Tokenizer
    step: int
    data: DataConfig


DEFAULTS = {"remat": "none", "unroll": False, "implementation": None}


def load_run(directory: str | os.PathLike, *, best: bool = False, **overrides: Any) -> Run:
    """What a directory of experiments/train_lm.py holds, of the newest whole checkpoint.

    Args:
      best: of the kept checkpoint with the lowest held-out loss instead.
      overrides: fields of ModelConfig, such as ``dtype``; without them the run's, but for what depends on the machine:
        ``remat="none"``, ``unroll=False`` and ``implementation=None``.

    Raises:
      FileNotFoundError: there is no run, no checkpoint or no tokenizer.
      ValueError: all checkpoints are damaged, the tokenizer's files are not whole, or an override is not allowed.
    """
    directory = Path(directory)
    weights, step, data = open_run(directory, best)
    if not (directory / TOKENIZER).is_dir():
        raise FileNotFoundError(f"{directory} has no {TOKENIZER}/: the command that trained it, run again, adds that")
    model = to_model(with_config(weights, directory, **DEFAULTS | overrides))
    return Run(model, load_tokenizer(directory / TOKENIZER), step, data)


def open_run(directory: Path, best: bool = False) -> tuple[Weights, int, DataConfig]:
    """The weights of a run's checkpoint, verified but not read into memory yet, its step, and what it was trained on.

    Of several processes all make the same call, and read the checkpoint that the first has verified.

    ``best`` and errors as in ``load_run``.
    """
    checkpoints = directory / CHECKPOINTS
    if not checkpoints.is_dir():
        raise FileNotFoundError(f"{directory} is no training run: it has no {CHECKPOINTS}/")
    try:
        step = on_first(lambda: find_step(checkpoints, best))  # a run that goes on may save one meanwhile
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    values = load_config(checkpoints, step)
    weights = open_state(checkpoints / str(step) / "state", from_dict(ModelConfig, values["model"]))
    return weights, step, from_dict(DataConfig, values["data"])


def keep_tokenizer(data: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Copy the tokenizer of the prepared directory ``data`` into the run ``directory``.

    Raises ``ValueError`` if the run has another one already: the text was prepared anew since.
    """
    source, kept = Path(data), Path(directory) / TOKENIZER
    if (kept / DESCRIPTION).exists():
        require_same_tokenizer(source / DESCRIPTION, kept / DESCRIPTION)
        return
    kept.mkdir(parents=True, exist_ok=True)
    if (source / TOKENIZER_FILE).exists():
        shutil.copy(source / TOKENIZER_FILE, kept)
    shutil.copy(source / DESCRIPTION, kept)
