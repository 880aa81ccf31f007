"""Continue prompts with a trained model: on the terminal as the tokens come, or a whole file of them in batches.

    python experiments/generate.py --model runs/shakespeare --prompt "To be, or not" --sampling.temperature 0.8
    python experiments/generate.py --model HUGGING_FACE_DIRECTORY --prompt-file story.txt --max-new-tokens 1000
    python experiments/generate.py --model runs/mine --batch-file prompts.jsonl --output continued.jsonl --batch-size 32

--model is a directory that train_lm.py, export_checkpoint.py or import_checkpoint.py wrote, or one in the official Hugging
Face layout with its tokenizer.json. Without --prompt, --prompt-file and --batch-file the prompt is read from the standard
input; an empty prompt begins a new document, so the text is unprompted. A batch file has a prompt in each line, or, if its
name ends in .jsonl, {"prompt": ...}; each line of the output is {"index", "prompt", "text", "ids", "ended"}, the index being
the line's number from 0, in no certain order. The same command continues an output that was interrupted: what is in it is
not generated again. --mesh.* and --distributed.* are those of train_lm.py, for models that no device holds alone; of several
processes the first alone reads the prompts and writes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from cli import run
from jax.sharding import Mesh
from tqdm import tqdm

import mom_jax
from mom_jax.config import MeshConfig, require
from mom_jax.config_io import to_dict
from mom_jax.files import read_json, write_json
from mom_jax.generation import generate, inference_model, new_text, prompt_ids
from mom_jax.model import MoMLanguageModel
from mom_jax.processes import DistributedConfig, console, is_first, join, on_first, raising, require_same, row_share
from mom_jax.sampling import Sampling
from mom_jax.sharding import make_mesh, use_mesh
from mom_jax.token_files import TOKENIZER_FILE, Tokenizer

PLACES = ("batch_file", "output", "batch_size", "mesh", "distributed")
"""Settings that may differ when an output is continued: the prompts themselves are compared."""


@dataclass(frozen=True)
class Generate:
    """What to continue with what."""

    model: str
    """Directory of a training run or an inference checkpoint, or in the Hugging Face layout."""
    best: bool = False
    """Of a run: the checkpoint of lowest held-out loss instead of the newest one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; None: the model's own."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be given several times. An empty one: a new document, unprompted."""
    prompt_file: str | None = None
    """UTF-8 file to continue; a line end at its end is left out."""
    echo: bool = True
    """Whether to print each prompt before its continuation."""
    batch_file: str | None = None
    """File of prompts, a line each; needs an output."""
    output: str | None = None
    """JSONL file for the continuations of the batch file; the settings go beside it, as OUTPUT.config.json."""
    batch_size: int = 16
    """Prompts of the batch file at a time."""
    max_new_tokens: int = 200
    """Tokens after which a continuation ends."""
    max_length: int | None = None
    """Tokens of prompt and continuation that full-attention layers can hold; None: the model's max_length."""
    seed: int = 0
    """Seed of the first prompt; prompt i has seed + i."""
    stop: tuple[int, ...] = ()
    """Token ids, not text, that end a continuation; the one that does is left out of the ids returned."""
    stop_at_eos: bool = True
    """Whether the tokenizer's id that ends a document also ends a continuation."""
    sampling: Sampling = field(default_factory=Sampling)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self):
        prompts = [name for name in ("prompt", "prompt_file", "batch_file") if getattr(self, name)]
        for name in prompts[1:]:
            require(False, name, getattr(self, name), f"there is already --{prompts[0].replace('_', '-')}")
        for name, other in (("batch_file", "output"), ("output", "batch_file")):
            needs = getattr(self, name) is not None and getattr(self, other) is None
            require(not needs, name, getattr(self, name), f"it needs --{other.replace('_', '-')}")
        for name in ("batch_size", "max_new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be a positive integer")


def load(config: Generate, mesh: Mesh | None = None) -> tuple[MoMLanguageModel, Tokenizer]:
    """The model, ready for inference and split over the mesh, and its tokenizer."""
    overrides = {} if config.dtype is None else {"dtype": config.dtype}
    model, tokenizer = mom_jax.load(config.model, best=config.best, mesh=mesh, **overrides)
    require(tokenizer is not None, "model", config.model, f"it must have a tokenizer, {TOKENIZER_FILE}")
    return inference_model(model), tokenizer


def printer(tokenizer: Tokenizer, prompt: str, write: Callable[[str], None], heading: str = "") -> Callable[..., None]:
    """A callback that writes the heading and the new text of a row; what may be half a character waits for the rest, or for
    ``is_last``."""
    context, ids, written = tokenizer.encode(prompt), [], ""

    def more(new: list[list[int]], is_last: bool = False) -> None:
        nonlocal written
        ids.extend(*new)
        text = heading + new_text(tokenizer, context, ids)
        text = text if is_last else text.rstrip("\ufffd")
        write(text[len(written) :])
        written = text

    return more


def stream(config: Generate, model: MoMLanguageModel, tokenizer: Tokenizer, settings: dict) -> None:
    prompts = list(config.prompt)
    if not prompts:
        prompts = [on_first(lambda: read_text(config.prompt_file, "prompt_file")).removesuffix("\n")]

    def write(text):
        if is_first():
            print(text, end="", flush=True)

    for index, prompt in enumerate(prompts):
        # With the first tokens, so that a prompt that is refused is not printed.
        heading = ("\n" + "-" * 80 + "\n" if index else "") + (prompt if config.echo else "")
        more = printer(tokenizer, prompt, write, heading)
        generate(model, [prompt], seed=config.seed + index, callback=more, block=4, tokenizer=tokenizer, **settings)
        more([[]], is_last=True)
        write("\n")


def read_text(path: str | None, flag: str) -> str:
    """The text in the file at ``path``, which ``flag`` gave, or of the standard input; ``ValueError`` if there is none."""
    try:
        text = sys.stdin.read() if path is None else Path(path).read_text(encoding="utf-8")
        text.encode()  # Python may have read the standard input without a complaint
        return text
    except OSError as error:
        require(False, flag, path, f"it must be a text file ({error.strerror})")
    except UnicodeError as error:
        raise ValueError(f"{path or 'the standard input'} is no UTF-8 text: {error.reason} at {error.start}") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a batch file; ``ValueError`` naming the line that has none."""
    text = read_text(str(path), "batch_file")
    require(text != "", "batch_file", str(path), "it must have at least one line")
    lines = text.removesuffix("\n").split("\n")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
            prompts[-1].encode()  # JSON can write half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError):
            require(False, f"{path}, line {number}", line[:80], 'it must be {"prompt": "text"}')
    return prompts


def read_done(config: Generate, model: MoMLanguageModel, prompts: list[str]) -> set[int]:
    """Indices of the prompts that the output already continues; half a line at its end, left by a kill, is cut off."""
    output, path = Path(config.output), Path(f"{config.output}.config.json")
    # Every step of training changes the last norm: so a run that has gone on since is known as another model.
    settings = to_dict(config) | {"weights": hashlib.sha256(np.asarray(model.final_norm[...])).hexdigest()}
    if not output.exists():
        write_json(path, settings)
        output.touch()
    require(path.is_file(), "output", config.output, f"it exists without {path.name}: choose another file")
    former = read_json(path)
    differ = [name for name, value in settings.items() if name not in PLACES and former.get(name) != value]
    allowed = f"it holds continuations of other settings ({', '.join(differ)}): choose another file, or delete it"
    require(not differ, "output", config.output, allowed)
    *lines, torn = output.read_bytes().split(b"\n")
    os.truncate(output, output.stat().st_size - len(torn))
    records = [json.loads(line) for line in lines]
    for record in records:
        same = record["index"] < len(prompts) and prompts[record["index"]] == record["prompt"]
        require(same, "output", config.output, f"its prompt {record['index']} is not that of {config.batch_file}")
    return {record["index"] for record in records}


def run_batches(config: Generate, model: MoMLanguageModel, tokenizer: Tokenizer, settings: dict) -> None:
    prompts = on_first(lambda: read_prompts(Path(config.batch_file)))
    ids = [prompt_ids(model.config, text, f"prompt {i} of the file", tokenizer) for i, text in enumerate(prompts)]
    done = on_first(lambda: read_done(config, model, prompts))
    # The longest first: what does not fit is found at once.
    by_length = sorted(range(len(prompts)), key=lambda index: -len(ids[index]))
    # Batches are cut from the whole file: so an interrupted output is continued in the same ones.
    batches = [by_length[begin : begin + config.batch_size] for begin in range(0, len(prompts), config.batch_size)]
    tokens = 0
    with (
        open(config.output if is_first() else os.devnull, "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), unit=" prompts", file=console()) as bar,
    ):
        for batch in batches:
            missing = [index for index in batch if index not in done]
            if not missing:
                continue
            # The last batch is filled up, so that nothing is compiled for it.
            rows = batch + batch[-1:] * (config.batch_size - len(batch)) * (len(batches) > 1)
            found = generate(
                model, [ids[row] for row in rows], seed=[config.seed + row for row in rows], tokenizer=tokenizer, **settings
            )  # fmt: skip
            results = {row: result for row, result in zip(batch, found, strict=False) if row in missing}
            for index, result in results.items():
                record = {"index": index, "prompt": prompts[index], "text": result.text}
                file.write(json.dumps(record | {"ids": result.ids, "ended": result.ended}, ensure_ascii=False) + "\n")
            file.flush()
            tokens += sum(len(result.ids) for result in results.values())
            bar.update(len(missing))
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s")


def main(config: Generate) -> None:
    join(config.distributed)
    require_same(to_dict(config), but=("distributed", "model", "prompt_file", "batch_file", "output"))
    mesh = make_mesh(config.mesh)
    row_share(mesh)  # refuses a mesh without some of the processes
    model, tokenizer = load(config, mesh)
    eos = (tokenizer.eos_id,) if config.stop_at_eos else ()
    settings = {
        "max_new_tokens": config.max_new_tokens, "max_length": config.max_length, "sampling": config.sampling,
        "stop_ids": (*config.stop, *eos),
    }  # fmt: skip
    work = stream if config.batch_file is None else run_batches
    with use_mesh(mesh), raising():
        work(config, model, tokenizer, settings)


if __name__ == "__main__":
    run(Generate, main, __doc__)
