"""Recurrent inference: prompts go through the model in pieces of a few sizes, then one compiled loop draws all new tokens.

The state that both carry has a size that does not depend on the number of tokens (attention without a window aside). No
length is compiled in: neither a prompt's nor that of its continuation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mom_jax.config import ModelConfig, require
from mom_jax.layers import cast_weights
from mom_jax.model import ModelState, MoMLanguageModel, Params, bind, model_structure
from mom_jax.sampling import PLAIN, Options, Sampling, next_token
from mom_jax.sharding import constrain
from mom_jax.token_files import Tokenizer

PIECES = (2048, 1024, 512, 256, 128, 64)
"""Tokens in the pieces of a prompt: powers of two down to the alignment of the dispatch, each compiled once."""
MIN_CAPACITY = 64
"""New tokens that the smallest program of the loop can hold; larger ones hold powers of two."""
CONTEXT = 16
"""Tokens of the prompt that are decoded with the new ones: a tokenizer may write a word's first token in another way."""

Ids = Sequence[int] | np.ndarray


class Continuation(NamedTuple):
    """What a prompt is continued by.

    Attributes:
      ids: the new token ids, without the one that stopped it.
      ended: "stop": one of ``stop_ids`` was drawn; "length": ``max_new_tokens`` were.
      text: ``ids`` as text; None without a tokenizer.
    """

    ids: list[int]
    ended: str
    text: str | None


class Decoding(NamedTuple):
    """What the loop carries from token to token.

    Attributes:
      state: after ``count`` new tokens.
      hidden: [B, D], the last token's, from which the next one is drawn.
      tokens: int32 [B, capacity], the new tokens; -1 from a row's stop token on, and where none has been drawn yet.
      count: int32, tokens drawn so far.
      is_done: bool [B], rows that have drawn a stop token.
      seen: bool [B, O], the tokens of prompt and continuation; None if there is no repetition penalty.
    """

    state: ModelState
    hidden: Float[Array, "B D"]
    tokens: Int[Array, "B capacity"]
    count: Int[Array, ""]
    is_done: Bool[Array, "B"]
    seen: Bool[Array, "B O"] | None


def generate(
    model: MoMLanguageModel,
    prompts: Sequence[str | Ids],
    *,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    stop_ids: Ids = (),
    seed: int | Ids = 0,
    max_length: int | None = None,
    callback: Callable[[list[list[int]]], Any] | None = None,
    block: int = 16,
    tokenizer: Tokenizer | None = None,
) -> list[Continuation]:
    """Continues every prompt, all of them at once, until each has drawn a stop token or ``max_new_tokens``.

    The processes of a mesh all make the same call, with the mesh in use, and all get the rows and hear ``callback``.

    Args:
      prompts: of any lengths: token ids, or text where there is a tokenizer. Text begins a document, with ``bos_id`` if the
        tokenizer has one; without one, empty text is ``eos_id``, which ends the document before.
      seed: row i draws with seed + i, or with seed[i]. At one shape of the batch a seed gives a prompt the same tokens in
        every row.
      max_length: tokens that attention layers without a window can hold; None: ``model.config.max_length``. Other layers
        have no limit.
      callback: called every ``block`` tokens with the new ids of each row; a stopped row has none.
      tokenizer: reads prompts and writes ``text``. Ids that it does not have are never drawn, but for ``stop_ids``.

    Raises:
      ValueError: an argument is not allowed; nothing has been computed then.
    """
    config = model.config
    for name, value in (("max_new_tokens", max_new_tokens), ("block", block)):
        require(_is_integer(value) and value > 0, name, value, "it must be a positive integer")
    require(max_length is None or _is_integer(max_length) and max_length > 0, "max_length", max_length, "None or positive")
    vocab_size, top_k = config.vocab_size, sampling.top_k
    require(top_k is None or top_k <= vocab_size, "Sampling.top_k", top_k, f"None, or from 1 to vocab_size = {vocab_size}")
    ids = [prompt_ids(config, prompt, f"prompts[{row}]", tokenizer) for row, prompt in enumerate(_listed(prompts))]
    if config.attention.layers and config.attention.window_size is None:
        max_length = max_length or config.max_length
        longest = max(map(len, ids))
        needed = longest + max_new_tokens
        allowed = f"it must be at least {needed}, the tokens of the longest prompt ({longest}) and max_new_tokens together"
        require(needed <= max_length, "max_length", max_length, allowed)
    else:
        max_length = None  # no state depends on it
    is_stop = np.zeros(vocab_size, bool)
    is_stop[_checked_ids(config, stop_ids, "stop_ids")] = True
    seeds = _seeds(seed, len(ids))

    params, options = nnx.to_pure_dict(nnx.state(inference_model(model))), sampling.options()
    if tokenizer is not None and tokenizer.vocab_size < vocab_size:
        options = options._replace(allowed=is_stop | (np.arange(vocab_size) < tokenizer.vocab_size))
    state, hidden = prefill(config, params, ids, max_length)
    width = vocab_size if options.repetition_penalty is not None else None
    decoding = begin_decoding(state, hidden, ids, max_new_tokens, width)
    done = 0
    while done < max_new_tokens and not np.all(decoding.is_done):
        limit = max_new_tokens if callback is None else min(done + block, max_new_tokens)
        decoding = decode(config, params, decoding, options, seeds, is_stop, np.int32(limit))
        if callback is not None:
            callback([row[row >= 0].tolist() for row in np.array(decoding.tokens)[:, done:limit]])
        done = limit

    rows = [row[row >= 0].tolist() for row in np.array(decoding.tokens)]
    return [
        Continuation(row, "stop" if is_done else "length", tokenizer and new_text(tokenizer, prompt, row))
        for prompt, row, is_done in zip(ids, rows, np.array(decoding.is_done), strict=True)
    ]


def inference_model(model: MoMLanguageModel) -> MoMLanguageModel:
    """The model with the weights of its matmuls in the compute type: the same outputs, half the bytes to read in bfloat16.

    :func:`generate` does this in every call; a model that is like this already costs it nothing.
    """
    params = nnx.to_pure_dict(nnx.state(model))
    return bind(model.config, cast_weights(params, model.config.dtype, of_embedding=True), {})


def new_text(tokenizer: Tokenizer, prompt: Ids, ids: Ids) -> str:
    """What the new ``ids`` add to the text of the prompt."""
    context = list(prompt[-CONTEXT:])
    # A prompt may end inside of a character, which the new tokens then complete.
    before = tokenizer.decode(context).rstrip("\ufffd")
    return tokenizer.decode([*context, *ids])[len(before) :]


def prefill(
    config: ModelConfig, params: Params, prompts: Sequence[np.ndarray], max_length: int | None
) -> tuple[ModelState, Float[Array, "B D"]]:
    """The state after the prompts, and the hidden states of their last tokens.

    Prompts are padded on the left to a multiple of the smallest piece, never to a maximum: the sizes of the pieces, and
    nothing else about the lengths, decide what is compiled. Beside the prompts' ids nothing grows with their lengths.
    """
    total = -(-max(map(len, prompts)) // PIECES[-1]) * PIECES[-1]
    state, begin = empty_state(config, len(prompts), max_length), 0
    for size in piece_sizes(total):
        tokens, mask = np.zeros((len(prompts), size), np.int32), np.zeros((len(prompts), size), bool)
        for row, prompt in enumerate(prompts):
            first = begin - (total - len(prompt))  # place of the piece's beginning in this prompt, negative in its padding
            part = prompt[max(first, 0) : max(first + size, 0)]
            tokens[row, size - len(part) :], mask[row, size - len(part) :] = part, True
        state, hidden = _prefill_piece(config, params, state, tokens, mask)
        begin += size
    return state, hidden


def piece_sizes(total: int) -> list[int]:
    """Sizes that add up to ``total``, a multiple of the smallest: the largest as often as it fits, then binary digits."""
    sizes = []
    for size in PIECES:
        count, total = divmod(total, size)
        sizes += [size] * count
    return sizes


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_state(config, batch_size, max_length):
    return nnx.merge(*model_structure(config)).init_state(batch_size, max_length)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill_piece(config, params, state, tokens, mask):
    out = bind(config, params, {}).hidden(tokens, mask, state=state)
    return out.state, out.hidden[:, -1]


def begin_decoding(state, hidden, prompts, max_new_tokens, vocab_size) -> Decoding:
    """The loop's beginning; ``vocab_size`` None: the tokens seen are not needed."""
    batch_size = len(prompts)
    capacity = max(MIN_CAPACITY, 1 << (max_new_tokens - 1).bit_length())
    seen = None
    if vocab_size is not None:
        seen = np.zeros((batch_size, vocab_size), bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
    fresh = np.full((batch_size, capacity), -1, np.int32), np.int32(0), np.zeros(batch_size, bool), seen
    return Decoding(state, hidden, *jax.device_put(fresh))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(config, params, decoding: Decoding, options: Options, seeds, is_stop, limit) -> Decoding:
    """Draws tokens until there are ``limit`` or all rows are done.

    The key of a row's token number n is its seed's, folded with n.
    """
    model, keys = bind(config, params, {}), jax.vmap(jax.random.key)(seeds)

    def one(d: Decoding) -> Decoding:
        logits = model.logits(d.hidden[:, None])[:, 0]
        token = next_token(logits, options, jax.vmap(jax.random.fold_in, (0, None))(keys, d.count), d.seen)
        # A row that is done goes on drawing, which changes nothing but its own state.
        is_done = d.is_done | is_stop[token]
        out = model.hidden(token[:, None], state=d.state)
        tokens = d.tokens.at[:, d.count].set(jnp.where(is_done, -1, token))
        seen = None if d.seen is None else d.seen.at[jnp.arange(len(token)), token].set(True)
        return Decoding(out.state, out.hidden[:, 0], tokens, d.count + 1, is_done, seen)

    d = lax.while_loop(lambda d: (d.count < limit) & ~jnp.all(d.is_done), one, decoding)
    # Whole on every device, where each process can read them.
    return d._replace(tokens=constrain(d.tokens, "BT"), is_done=constrain(d.is_done, "B"))


def prompt_ids(config: ModelConfig, prompt: str | Ids, name: str, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids int32 [number of tokens] of a prompt, which errors call ``name``."""
    if isinstance(prompt, str):
        require(tokenizer is not None, name, prompt[:40], "text needs a tokenizer; else give token ids")
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompt = [*begin, *tokenizer.encode(prompt).tolist()] or [tokenizer.eos_id]
    ids = _checked_ids(config, prompt, name)
    require(ids.size > 0, name, [], "it must have at least one token")
    return ids


def _checked_ids(config: ModelConfig, ids: Ids, name: str) -> np.ndarray:
    array = np.asarray(ids)
    is_list = array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer))
    require(is_list, name, f"{array.dtype}{list(array.shape)}", "it must be a list of integers, token ids")
    bad = array[(array < 0) | (array >= config.vocab_size)]
    allowed = f"token ids run from 0 to vocab_size - 1 = {config.vocab_size - 1}"
    require(bad.size == 0, f"a token id in {name}", bad[:1].tolist(), allowed)
    return array.astype(np.int32)


def _listed(prompts) -> list:
    allowed = "it must be a list of at least one prompt"
    require(not isinstance(prompts, str) and len(prompts) > 0, "prompts", prompts, allowed)
    return list(prompts)


def _seeds(seed, count: int) -> np.ndarray:
    seeds = [seed + row for row in range(count)] if _is_integer(seed) else np.ravel(seed).tolist()
    require(len(seeds) == count, "the number of seeds", len(seeds), f"one for each of the {count} prompts, or one integer")
    is_allowed = all(_is_integer(x) and 0 <= x < 1 << 32 for x in seeds)
    require(is_allowed, "seed", seed, "integers from 0 to 2^32 - 1")
    return np.array(seeds, np.uint32)


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
