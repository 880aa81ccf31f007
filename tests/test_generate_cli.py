"""experiments/generate.py: streams to the terminal, files in batches that are resumed, refusals in one line."""

import io
import json
import sys
from functools import cache
from pathlib import Path

import cli
import generate as script
import pytest
import tokenizers
from models import model_of, small
from tokenizers import decoders, models, pre_tokenizers, processors

from mom_jax import save_pretrained
from mom_jax.generation import generate
from mom_jax.sampling import Sampling

NEW = 10


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, 0 to 255; 256 ends a document, 257 begins one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>"])
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model with its tokenizer in the Hugging Face layout."""
    path = tmp_path_factory.mktemp("model")
    save_pretrained(model_of(small("attention_only", vocab_size=258, bos_token_id=257, eos_token_id=256)), path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def call(directory, monkeypatch, capsys):
    """Runs the script with these flags; gives what it prints."""

    def call(*flags: str, status: int = 0):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(directory), "--max-new-tokens", str(NEW), *flags])
        if status == 0:
            cli.run(script.Generate, script.main, script.__doc__)
            return capsys.readouterr().out
        with pytest.raises(SystemExit, match=str(status)):
            cli.run(script.Generate, script.main, script.__doc__)
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("generate.py: error: ") and error.count("\n") == 1
        return error

    return call


@cache
def loaded(directory):
    return script.load(script.Generate(model=str(directory)))


def expected(directory, prompt: str, seed: int, **settings) -> str:
    model, tokenizer = loaded(directory)
    settings = {"max_new_tokens": NEW, "stop_ids": [tokenizer.eos_id]} | settings
    return generate(model, [prompt], tokenizer=tokenizer, seed=seed, **settings)[0].text


# The terminal


def test_prompts_are_continued_one_after_another(directory, call):
    out = call("--prompt", "To be", "--prompt", "Night", "--seed", "4", "--sampling.temperature", "0.5")
    sampling = Sampling(0.5)
    texts = [prompt + expected(directory, prompt, 4 + i, sampling=sampling) for i, prompt in enumerate(["To be", "Night"])]
    assert out == f"{texts[0]}\n\n{'-' * 80}\n{texts[1]}\n"
    assert call("--prompt", "To be", "--seed", "4", "--sampling.temperature", "0.5", "--no-echo") == texts[0][5:] + "\n"


def test_a_prompt_comes_from_a_file_or_the_standard_input(directory, call, monkeypatch, tmp_path):
    (tmp_path / "prompt.txt").write_text("line\nend\n")
    text = "line\nend" + expected(directory, "line\nend", 0) + "\n"
    assert call("--prompt-file", str(tmp_path / "prompt.txt")) == text
    monkeypatch.setattr(sys, "stdin", io.StringIO("line\nend\n"))
    assert call() == text
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    error = call("--prompt-file", str(tmp_path / "prompt.txt"), status=1)
    assert error.endswith("prompt.txt is no UTF-8 text: invalid start byte at 2\n")


def test_half_a_character_is_held_back(directory):
    _, tokenizer = loaded(directory)
    written = []
    more = script.printer(tokenizer, "a", written.append)
    for token in tokenizer.encode("bé€").tolist():
        more([[token]])
    assert written == ["b", "", "é", "", "", "€"]
    more([tokenizer.encode("é").tolist()[:1]])
    more([[]], is_last=True)
    assert written[-2:] == ["", "\ufffd"]


def test_bos_comes_first_if_the_tokenizer_puts_it_there(directory, tmp_path):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert loaded(directory)[1].bos_id is None
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert loaded(tmp_path)[1].bos_id == 257


def test_text_is_written_as_it_comes(call, monkeypatch):
    parts = []

    def listening(*args, callback, **settings):
        return generate(*args, **settings, callback=lambda new: (parts.append(len(new[0])), callback(new)))

    monkeypatch.setattr(script, "generate", listening)
    call("--prompt", "a")
    assert parts == [4, 4, 2]


# Files in batches

PROMPTS = ["one", "two words", "", "three\u2028", "four", "five"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_is_continued_and_an_interrupted_output_too(name, directory, call, tmp_path, monkeypatch):
    output = tmp_path / "output.jsonl"
    lines = PROMPTS if name.endswith("txt") else [json.dumps({"prompt": prompt, "id": 1}) for prompt in PROMPTS]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    flags = ["--batch-file", str(tmp_path / name), "--output", str(output), "--batch-size", "4", "--seed", "3"]
    call(*flags)
    whole = output.read_text()
    records = {record["index"]: record for record in map(json.loads, whole.split("\n")[:-1])}
    assert [records[index]["prompt"] for index in range(len(PROMPTS))] == PROMPTS
    for index, record in records.items():
        assert record["text"] == expected(directory, PROMPTS[index], 3 + index)
        assert record["ended"] == "length" and len(record["ids"]) == NEW

    rows = []

    def counting(model, prompts, **settings):
        rows.append(len(prompts))
        return generate(model, prompts, **settings)

    monkeypatch.setattr(script, "generate", counting)
    call(*flags)
    assert rows == [] and output.read_text() == whole
    kept = "".join(line + "\n" for line in whole.split("\n")[:4])
    output.write_text(kept + whole[len(kept) :][:9])  # killed while writing the second batch
    call(*flags)
    assert rows == [4] and output.read_text() == whole


def test_an_output_of_something_else_is_refused(call, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "output.jsonl"
    prompts.write_text("one\n")
    flags = ["--batch-file", str(prompts), "--output", str(output)]
    call(*flags)
    error = call(*flags, "--seed", "1", "--sampling.top-k", "3", status=1)
    assert f"--output = '{output}' is not allowed: it holds continuations of other settings (seed, sampling)" in error
    prompts.write_text("two\n")
    assert f"its prompt 0 is not that of {prompts}" in call(*flags, status=1)
    (tmp_path / "output.jsonl.config.json").unlink()
    assert "it exists without output.jsonl.config.json" in call(*flags, status=1)


# Refusals


@pytest.mark.parametrize(
    "flags, status, message",
    [
        (["--best", "--prompt", "a"], 1, "is no training run, which alone has checkpoints to choose from"),
        (["--prompt", "a", "--prompt-file", "b"], 2, "--prompt-file = 'b' is not allowed: there is already --prompt"),
        (["--batch-file", "a"], 2, "--batch-file = 'a' is not allowed: it needs --output"),
        (["--output", "a"], 2, "--output = 'a' is not allowed: it needs --batch-file"),
        (["--batch-size", "0"], 2, "--batch-size = 0 is not allowed: it must be a positive integer"),
        (["--sampling.top-p", "0"], 2, "--sampling.top-p = 0.0 is not allowed: it must be above 0 and at most 1"),
        (["--prompt", "a", "--sampling.top-k", "999"], 1, "--sampling.top-k = 999 is not allowed: None, or from 1 to"),
        (["--prompt", "a", "--stop", "999"], 1, "a token id in stop_ids = [999] is not allowed"),
        (["--prompt", "a", "--max-length", "5"], 1, "error: --max-length = 5 is not allowed: it must be at least 11"),
        (["--prompt-file", "a.txt"], 1, "--prompt-file = 'a.txt' is not allowed: it must be a text file (No such file"),
        (["--batch-file", "a.txt", "--output", "b"], 1, "--batch-file = 'a.txt' is not allowed: it must be a text file (No"),
        (["--model", "missing", "--prompt", "a"], 1, "there is no directory missing"),
    ],
)
def test_refusals_are_one_line_that_names_the_flag(call, flags, status, message):
    assert message in call(*flags, status=status)


def test_lines_without_a_prompt_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for line in ("[]", "{}", "{", '{"prompt": 1}', '"text"', '{"prompt": "\\ud800"}'):
        path.write_text('{"prompt": ""}\n' + line + "\n")
        with pytest.raises(ValueError, match="prompts.jsonl, line 2 = .* is not allowed: it must be"):
            script.read_prompts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="it must have at least one line"):
        script.read_prompts(path)


def test_a_model_without_a_tokenizer_that_fits_is_refused(tmp_path, directory):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(ValueError, match="model = .* is not allowed: it must have a tokenizer, tokenizer.json"):
        loaded(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the model's vocab_size = 258 is not allowed: .*tokenizer.json needs 259"):
        loaded(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="eos_token_id = None is not allowed: the config.json beside .* must name it"):
        loaded(tmp_path)
