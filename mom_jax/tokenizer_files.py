"""Tokenizers as transformers reads them: PreTrainedTokenizerFast on a tokenizer.json."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mom_jax.config import ModelConfig
from mom_jax.files import write_json
from mom_jax.token_files import TOKENIZER_FILE, ByteTokenizer, Tokenizer

# Whatever transformers may have written beside a model; copied as they are.
TOKENIZER_FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
END_OF_TEXT = "<|endoftext|>"


def write_transformers_files(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> None:
    """Write tokenizer_config.json and special_tokens_map.json for the tokenizer of a run; for a ByteTokenizer, which has no
    file, tokenizer.json as well. That of any other is there already, but learns to put ``bos_id`` before a text."""
    path = directory / TOKENIZER_FILE
    if tokenizer.kind == ByteTokenizer.kind:
        byte_level_tokenizer().save(str(path))
    file = tokenizers.Tokenizer.from_file(str(path))
    name_of, bos_id = file.id_to_token, tokenizer.bos_id
    if bos_id is not None and bos_id not in file.encode("").ids:
        bos = {"id": "bos", "ids": [bos_id], "tokens": [name_of(bos_id)]}
        file.post_processor = processors.TemplateProcessing("bos $A", "bos $A bos $B", [bos])
        file.save(str(path))
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": config.pad_token_id}
    special = {name: name_of(token) for name, token in ids.items() if token is not None and name_of(token) is not None}
    write_json(directory / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(directory / "tokenizer_config.json", settings | {"model_max_length": config.max_length} | special)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """What ByteTokenizer does, as a tokenizer.json: byte-level BPE (GPT-2's alphabet of 256 characters) without merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])  # the next id, ByteTokenizer.eos_id
    return tokenizer
