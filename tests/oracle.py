"""The whole MoM language model (arXiv 2502.13685) in float64 numpy: one token after another, one memory after another.

No dispatch, no chunks, no JAX: it is what the fast code is tested against, so every line is meant to be believed at
sight. It reads the official Hugging Face layout (flash-linear-attention's `MomForCausalLM`): tensors named as in
model.safetensors, the fields of config.json. Letters: B batch, T tokens, D model width, H heads, K key width, V value
width, M memories, W convolution width, O vocabulary, F MLP width. A linear layer's weight is [out, in].

At padded positions every output is NaN: their values are unspecified, and a real token that read one would be NaN too.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "data" / "golden"

OFFICIAL_DEFAULTS = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "vocab_size": 32000,
    "num_heads": 4,
    "head_dim": 256,
    "expand_v": 1,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "conv_size": 4,
    "conv_bias": False,
    "use_output_gate": True,
    "num_memories": 4,
    "topk": 2,
    "shared_mem": True,
    "single_kv_proj": False,
    "tie_word_embeddings": False,
    "attn": None,
}


@dataclass
class OracleOutput:
    """What `oracle_forward` returns, all float64; NaN at padded positions."""

    logits: np.ndarray
    """[B, T, O]"""
    router_logits: np.ndarray
    """[MoM layers, B, T, M], before the softmax."""
    states: list[np.ndarray | None]
    """For each layer the final [B, M (+ 1, the shared memory, last), H, K, V]; None for a softmax-attention layer."""
    balance_loss_global: float
    """One balance loss over the tokens of all MoM layers together; 0 without a MoM layer."""
    balance_loss_per_layer: float
    """Mean over the MoM layers of each layer's own balance loss; 0 without a MoM layer."""
    hidden: list[np.ndarray]
    """The residual stream [B, T, D] after the embedding and after each block; the final norm is not applied."""


def oracle_forward(
    tensors: dict[str, np.ndarray],
    config: dict,
    tokens: np.ndarray,
    attention_mask: np.ndarray | None = None,
    document_ids: np.ndarray | None = None,
) -> OracleOutput:
    """Run the model on tokens [B, T].

    attention_mask [B, T]: 0 marks padding. It may stand anywhere in a row; the result is as if it were not there.
    document_ids [B, T]: tokens of different documents of a row never see each other; ids at padding do not matter.

    Raises:
      ValueError: a real token is outside the vocabulary, or a document of a row is interrupted by another one.
    """
    config = OFFICIAL_DEFAULTS | config
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    real_BT = np.ones((B, T), bool) if attention_mask is None else np.asarray(attention_mask) != 0
    document_BT = np.zeros((B, T), int) if document_ids is None else np.asarray(document_ids)
    check_inputs(config, tokens, real_BT, document_BT)

    embeddings_OD = tensors["model.embeddings.weight"]
    head_OD = embeddings_OD if config["tie_word_embeddings"] else tensors["lm_head.weight"]
    attention_layers = config["attn"]["layers"] if config["attn"] else []
    eps = config["norm_eps"]

    x_BTD = np.full((B, T, config["hidden_size"]), np.nan)
    x_BTD[real_BT] = embeddings_OD[tokens[real_BT]]
    hidden, states, router_logits = [x_BTD], [], []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        normed_BTD = rms_norm(x_BTD, weights["attn_norm.weight"], eps)
        rows = range(B)
        if layer in attention_layers:
            mixed = [attention_row(weights, config, normed_BTD[b], real_BT[b], document_BT[b]) for b in rows]
            states.append(None)
        else:
            results = [mom_row(weights, config, normed_BTD[b], real_BT[b], document_BT[b]) for b in rows]
            mixed = [result[0] for result in results]
            router_logits.append(np.stack([result[1] for result in results]))
            states.append(np.stack([result[2] for result in results]))
        x_BTD = x_BTD + np.stack(mixed)
        x_BTD = x_BTD + swiglu(weights, rms_norm(x_BTD, weights["mlp_norm.weight"], eps))
        hidden.append(x_BTD)
    logits_BTO = rms_norm(x_BTD, tensors["model.norm.weight"], eps) @ head_OD.T

    real_logits = [logits_BTM[real_BT] for logits_BTM in router_logits]
    balance_global = balance_per_layer = 0.0
    if real_logits:
        balance_global = balance_loss(np.concatenate(real_logits), config["topk"])
        balance_per_layer = float(np.mean([balance_loss(logits, config["topk"]) for logits in real_logits]))
    router_logits_LBTM = np.array(router_logits).reshape(-1, B, T, config["num_memories"])
    return OracleOutput(logits_BTO, router_logits_LBTM, states, balance_global, balance_per_layer, hidden)


def check_inputs(config: dict, tokens: np.ndarray, real_BT: np.ndarray, document_BT: np.ndarray) -> None:
    """Refuse token ids outside the vocabulary and documents that are taken up again after another one."""
    real_tokens = tokens[real_BT]
    if np.any(real_tokens < 0) or np.any(real_tokens >= config["vocab_size"]):
        raise ValueError(f"token ids must be from 0 to {config['vocab_size'] - 1}")
    for real_T, document_T in zip(real_BT, document_BT, strict=True):
        documents = document_T[real_T]
        borders = np.count_nonzero(documents[1:] != documents[:-1])
        if len(documents) and borders + 1 != len(set(documents.tolist())):
            raise ValueError(f"the documents of a row must be contiguous, not {documents.tolist()}")


# The token mixer: a mixture of memories.


@dataclass
class Memory:
    """One recurrent memory of one row: its projections [out, D], and what it has taken in so far."""

    W_q: np.ndarray
    W_k: np.ndarray
    W_v: np.ndarray
    W_a: np.ndarray
    W_b: np.ndarray
    state_HKV: np.ndarray
    document: int | None = None
    past_q: list[np.ndarray] = field(default_factory=list)
    past_k: list[np.ndarray] = field(default_factory=list)
    past_v: list[np.ndarray] = field(default_factory=list)


def mom_row(
    weights: dict[str, np.ndarray], config: dict, x_TD: np.ndarray, real_T: np.ndarray, document_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Route each token to its memories: (output [T, D], router logits [T, M], final states [M (+ 1), H, K, V])."""
    H, M = config["num_heads"], config["num_memories"]
    memories = make_memories(weights, config)
    y_TD = np.full_like(x_TD, np.nan)
    router_logits_TM = np.full((len(x_TD), M), np.nan)
    for t in np.flatnonzero(real_T):
        x_D = x_TD[t]
        router_logits_TM[t] = weights["attn.gate.weight"] @ x_D
        p_M = softmax(router_logits_TM[t])
        chosen = top_k(p_M, config["topk"])

        routes = [(memories[m], p_M[m] / p_M[chosen].sum()) for m in chosen]
        if config["shared_mem"]:
            routes.append((memories[M], 1.0))

        o_HV = sum(weight * memory_step(memory, weights, config, x_D, document_T[t]) for memory, weight in routes)

        o_HV = rms_norm(o_HV, weights["attn.o_norm.weight"], config["norm_eps"])
        if config["use_output_gate"]:
            o_HV = o_HV * silu(weights["attn.g_proj.weight"] @ x_D).reshape(H, -1)
        y_TD[t] = weights["attn.o_proj.weight"] @ o_HV.reshape(-1)
    return y_TD, router_logits_TM, np.stack([memory.state_HKV for memory in memories])


def make_memories(weights: dict[str, np.ndarray], config: dict) -> list[Memory]:
    """The M routed memories, empty, and after them the shared memory if there is one."""
    H, K = config["num_heads"], config["head_dim"]
    memories = []
    for m in range(config["num_memories"] + int(config["shared_mem"])):
        if config["single_kv_proj"] or m == config["num_memories"]:
            W_k, W_v, W_a, W_b = (weights[f"attn.shared_{name}.weight"] for name in "kvab")
        else:
            W_k, W_v, W_a, W_b = (weights[f"attn.{name}_proj.{m}.weight"] for name in "kvab")
        memories.append(Memory(weights["attn.q_proj.weight"], W_k, W_v, W_a, W_b, np.zeros((H, K, len(W_v) // H))))
    return memories


def memory_step(
    memory: Memory, weights: dict[str, np.ndarray], config: dict, x_D: np.ndarray, document: int
) -> np.ndarray:
    """Write one token into one memory by the gated delta rule (arXiv 2412.06464), then read it: [H, V]."""
    H, K = config["num_heads"], config["head_dim"]
    if memory.document != document:
        memory.state_HKV = np.zeros_like(memory.state_HKV)
        memory.past_q, memory.past_k, memory.past_v = [], [], []
        memory.document = document

    memory.past_q.append(memory.W_q @ x_D)
    memory.past_k.append(memory.W_k @ x_D)
    memory.past_v.append(memory.W_v @ x_D)
    q_HK = silu(convolve(memory.past_q, "q", weights, config)).reshape(H, -1)
    k_HK = silu(convolve(memory.past_k, "k", weights, config)).reshape(H, -1)
    v_HV = silu(convolve(memory.past_v, "v", weights, config)).reshape(H, -1)
    q_HK = l2_norm(q_HK) * K**-0.5
    k_HK = l2_norm(k_HK)
    a_H = np.exp(-np.exp(weights["attn.A_log"]) * softplus(memory.W_a @ x_D + weights["attn.dt_bias"]))
    b_H = sigmoid(memory.W_b @ x_D)

    o_HV = np.zeros_like(v_HV)
    for h in range(H):
        S_KV, q, k, v = memory.state_HKV[h], q_HK[h], k_HK[h], v_HV[h]
        S_KV = a_H[h] * S_KV  # decay
        S_KV = S_KV - b_H[h] * np.outer(k, S_KV.T @ k)  # erase what is stored under k
        S_KV = S_KV + b_H[h] * np.outer(k, v)  # write
        o_HV[h] = S_KV.T @ q  # read
        memory.state_HKV[h] = S_KV
    return o_HV


def convolve(past: list[np.ndarray], name: str, weights: dict[str, np.ndarray], config: dict) -> np.ndarray:
    """Depthwise causal convolution at a memory's newest token, past[-1]: sum_i w[:, W-1-i] past[-1-i] + bias."""
    W = config["conv_size"]
    weight_CW = weights[f"attn.{name}_conv1d.weight"][:, 0, :]
    y_C = sum(weight_CW[:, W - 1 - i] * past[-1 - i] for i in range(min(W, len(past))))
    if config["conv_bias"]:
        y_C = y_C + weights[f"attn.{name}_conv1d.bias"]
    return y_C


def top_k(p_M: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest, largest first; among equals the lowest index comes first."""
    return sorted(range(len(p_M)), key=lambda m: (-p_M[m], m))[:k]


def balance_loss(router_logits_NM: np.ndarray, k: int) -> float:
    """Load-balance loss M sum_{r,m} f[r,m] P[m] of N tokens (Switch, arXiv 2101.03961, equation 4, for each choice r).

    f[r,m] is the fraction of tokens whose r-th choice is m, P[m] the mean router probability of m.
    """
    N, M = router_logits_NM.shape
    p_NM = np.stack([softmax(logits_M) for logits_M in router_logits_NM])
    f_RM = np.zeros((k, M))
    for p_M in p_NM:
        for r, m in enumerate(top_k(p_M, k)):
            f_RM[r, m] += 1 / N
    return float(M * (f_RM * p_NM.mean(0)).sum())


# The token mixer of hybrid models: softmax attention.


def attention_row(
    weights: dict[str, np.ndarray], config: dict, x_TD: np.ndarray, real_T: np.ndarray, document_T: np.ndarray
) -> np.ndarray:
    """Causal rotary attention with grouped key-value heads over a token's own document, in a window: [T, D]."""
    D, H = config["hidden_size"], config["attn"]["num_heads"]
    kv_heads = config["attn"].get("num_kv_heads") or H
    window = config["attn"].get("window_size") or math.inf
    base = config["attn"].get("rope_theta") or 10000.0
    width = D // H
    y_TD = np.full_like(x_TD, np.nan)
    keys, values, document = [], [], None  # of the current document's real tokens so far
    for t in np.flatnonzero(real_T):
        if document_T[t] != document:
            keys, values, document = [], [], document_T[t]
        position = len(keys)
        q = rotate((weights["attn.q_proj.weight"] @ x_TD[t]).reshape(H, width), position, base)
        keys.append(rotate((weights["attn.k_proj.weight"] @ x_TD[t]).reshape(kv_heads, width), position, base))
        values.append((weights["attn.v_proj.weight"] @ x_TD[t]).reshape(kv_heads, width))

        seen = [s for s in range(position + 1) if position - s < window]
        o = np.zeros((H, width))
        for h in range(H):
            g = h // (H // kv_heads)  # the key-value head that this query head shares
            p = softmax(np.array([q[h] @ keys[s][g] for s in seen]) / math.sqrt(width))
            o[h] = sum(p[i] * values[s][g] for i, s in enumerate(seen))
        y_TD[t] = weights["attn.o_proj.weight"] @ o.reshape(-1)
    return y_TD


def rotate(x: np.ndarray, position: int, base: float) -> np.ndarray:
    """Rotary embedding (arXiv 2104.09864), GPT-NeoX pairing: x[i] with x[width/2 + i], by position base^(-2i/width)."""
    half = x.shape[-1] // 2
    angle = position * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


# Small functions.


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def l2_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def swiglu(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate = silu(x @ weights["mlp.gate_proj.weight"].T)
    return (gate * (x @ weights["mlp.up_proj.weight"].T)) @ weights["mlp.down_proj.weight"].T


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


# Material for tests: the golden cases, and models of any shape.


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict, dict[str, np.ndarray]]:
    """A golden case made by the float32 official code in torch: (tensors, config, inputs and outputs)."""
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config, load_file(folder / "case.safetensors")


def random_tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """A complete float32 tensor set in the official layout for any config, the same for the same seed.

    Linear weights are N(0, 1.5^2 / fan-in) (0.19 at width 64), so that activations, router logits and gates stay of
    order one at any width. Norms are near 1, A_log = log U(0.5, 16), dt_bias the inverse softplus of
    exp U(log 0.001, log 0.1).
    """
    config = OFFICIAL_DEFAULTS | config
    rng = np.random.default_rng(seed)
    D, O, M = config["hidden_size"], config["vocab_size"], config["num_memories"]
    H, K, W = config["num_heads"], config["head_dim"], config["conv_size"]
    V = int(K * config["expand_v"])
    F = config["intermediate_size"] or 256 * math.ceil(int(D * config["hidden_ratio"] * 2 / 3) / 256)
    tensors = {}

    def linear(name, outputs, inputs):
        tensors[f"{name}.weight"] = rng.normal(0, 1.5 / math.sqrt(inputs), (outputs, inputs))

    def norm(name, width):
        tensors[f"{name}.weight"] = rng.normal(1, 0.1, width)

    tensors["model.embeddings.weight"] = rng.normal(0, 1, (O, D))
    norm("model.norm", D)
    if not config["tie_word_embeddings"]:
        linear("lm_head", O, D)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        norm(f"{block}.attn_norm", D)
        norm(f"{block}.mlp_norm", D)
        linear(f"{block}.mlp.gate_proj", F, D)
        linear(f"{block}.mlp.up_proj", F, D)
        linear(f"{block}.mlp.down_proj", D, F)

        mixer = f"{block}.attn"
        if config["attn"] and layer in config["attn"]["layers"]:
            heads = config["attn"]["num_heads"]
            kv_width = D // heads * (config["attn"].get("num_kv_heads") or heads)
            linear(f"{mixer}.q_proj", D, D)
            linear(f"{mixer}.k_proj", kv_width, D)
            linear(f"{mixer}.v_proj", kv_width, D)
            linear(f"{mixer}.o_proj", D, D)
            continue
        linear(f"{mixer}.gate", M, D)
        linear(f"{mixer}.q_proj", H * K, D)
        for name, width in (("k", H * K), ("v", H * V), ("a", H), ("b", H)):
            if not config["single_kv_proj"]:
                for m in range(M):
                    linear(f"{mixer}.{name}_proj.{m}", width, D)
            if config["single_kv_proj"] or config["shared_mem"]:
                linear(f"{mixer}.shared_{name}", width, D)
        for name, width in (("q", H * K), ("k", H * K), ("v", H * V)):
            tensors[f"{mixer}.{name}_conv1d.weight"] = rng.normal(0, 1 / math.sqrt(W), (width, 1, W))
            if config["conv_bias"]:
                tensors[f"{mixer}.{name}_conv1d.bias"] = rng.normal(0, 0.2, width)
        tensors[f"{mixer}.A_log"] = np.log(rng.uniform(0.5, 16, H))
        dt = np.exp(rng.uniform(math.log(0.001), math.log(0.1), H))
        tensors[f"{mixer}.dt_bias"] = np.log(np.expm1(dt))
        norm(f"{mixer}.o_norm", V)
        if config["use_output_gate"]:
            linear(f"{mixer}.g_proj", H * V, D)
        linear(f"{mixer}.o_proj", D, H * V)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
