"""Configurations: frozen dataclasses that say everything about a run, presets, and validation.

Every error names the field, the value and what is allowed, and is raised when the object is made, before any compute.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DTYPES = ("float32", "bfloat16")
MAX_HEAD_DIM = 256
MAX_VALUE_HEAD_DIM = 1280


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise ``ValueError`` naming the field, its value and what is allowed, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed: {allowed}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        require(is_integer and value > 0, f"{type(config).__name__}.{name}", value, "it must be a positive integer")


def _require_choices(config: Any) -> None:
    """Refuses a field declared as ``Literal`` (or None) that holds anything else."""
    for name, hint in get_type_hints(type(config)).items():
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        literals = [option for option in options if get_origin(option) is Literal]
        choices = ((None,) if NoneType in options else ()) + sum(map(get_args, literals), ())
        if literals:
            _require_one_of(config, name, choices)


def _require_one_of(config: Any, name: str, choices: tuple) -> None:
    value = getattr(config, name)
    require(value in choices, f"{type(config).__name__}.{name}", value, f"choose one of {', '.join(map(repr, choices))}")


def _require_not_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= 0, f"{type(config).__name__}.{name}", value, "it must be >= 0")


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention at chosen layers (the hybrid of arXiv 2502.13685, section 4: 3 layers of 24)."""

    layers: tuple[int, ...] = ()
    """Indices of the layers whose mixer is softmax attention instead of MoM; empty: none."""
    num_heads: int = 16
    """Query heads; the head width is hidden_size / num_heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); None: num_heads."""
    window_size: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""


@dataclass(frozen=True)
class ModelConfig:
    """A Mixture-of-Memories language model. The defaults are those of the official configuration (arXiv 2502.13685)."""

    vocab_size: int = 32000
    """Token ids run from 0 to vocab_size - 1."""
    hidden_size: int = 2048
    """D, the width of the residual stream."""
    num_layers: int = 24
    """L, the number of blocks."""
    num_heads: int = 4
    """H, heads of every memory."""
    head_dim: int = 256
    """K, key width of a head: a power of two from 16 to 256."""
    expand_v: float = 1.0
    """V / K: the value width of a head is head_dim * expand_v, a multiple of 16 up to 1280."""
    num_memories: int = 4
    """M, routed memories a layer."""
    top_k: int = 2
    """R, memories that each token reads and writes."""
    shared_memory: bool = True
    """Whether one more memory sees every token with weight 1."""
    single_kv_proj: bool = False
    """Whether all memories share one key/value/gate projection (the memories then differ only by their tokens)."""
    update_rule: Literal["gated_deltanet"] = "gated_deltanet"
    """How a memory takes in a token; see mom_jax/update_rules."""
    conv_size: int = 4
    """W, width in tokens of the causal short convolution over each memory's own tokens."""
    conv_bias: bool = False
    """Whether the short convolutions have a bias."""
    use_output_gate: bool = True
    """Whether the head-normalised output is multiplied by silu(x W_g)."""
    hidden_ratio: float = 4.0
    """Width of the SwiGLU MLP when intermediate_size is None: 2/3 * hidden_ratio * D, rounded up to 256."""
    intermediate_size: int | None = None
    """F, the width of the SwiGLU MLP; None: from hidden_ratio."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output head is the embedding table."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of linear layers and embeddings."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Softmax-attention layers, none by default."""
    max_length: int = 2048
    """Tokens that the cache of a full-attention layer holds by default; MoM layers have no such limit."""
    embedding_dropout: float = 0.0
    """Probability of dropping an embedding entry in training."""
    balance_loss_scale: float = 0.01
    """Weight of the load-balance loss in the training loss."""
    balance_loss_form: Literal["per_layer", "global"] = "per_layer"
    """'per_layer': mean over layers of each layer's loss; 'global': one loss over all layers' tokens (the peers')."""
    router_z_loss_scale: float = 0.0
    """Weight of mean(logsumexp(router logits)^2) in the training loss; 0: off."""
    router_bias_rate: float = 0.0
    """Step of the loss-free balancing bias on the selection (arXiv 2408.15664); 0: off."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of matmuls and activations; parameters, routing, gates, norms and states stay float32."""
    implementation: Literal["triton", "chunked", "reference"] | None = None
    """Implementation of the ops, of those under 64 tokens as far as it can; None: the fastest that the device has."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes: nothing, all but matmuls, chunk matrices and the mixer's output, or everything."""
    unroll: bool = False
    """Whether layers are compiled one by one, not as the body of a loop: faster steps, several times the compilation."""
    bos_token_id: int | None = 1
    """Id that begins a document, if any."""
    eos_token_id: int | None = 2
    """Id that ends a document, if any."""
    pad_token_id: int | None = None
    """Id of padding, if any."""

    def __post_init__(self):
        _require_positive(
            self, "vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "num_memories", "top_k", "conv_size",
            "max_length",
        )  # fmt: skip
        power_of_two = self.head_dim & (self.head_dim - 1) == 0
        require(
            power_of_two and 16 <= self.head_dim <= MAX_HEAD_DIM,
            "ModelConfig.head_dim", self.head_dim, f"it must be a power of two from 16 to {MAX_HEAD_DIM}",
        )  # fmt: skip
        width = self.head_dim * self.expand_v
        require(
            0 < width <= MAX_VALUE_HEAD_DIM and width % 16 == 0,
            "ModelConfig.expand_v", self.expand_v,
            f"head_dim * expand_v = {width:g} must be a multiple of 16 from 16 to {MAX_VALUE_HEAD_DIM}",
        )  # fmt: skip
        require(
            self.top_k <= self.num_memories,
            "ModelConfig.top_k", self.top_k, f"it must be at most num_memories = {self.num_memories}",
        )  # fmt: skip
        require(
            not self.single_kv_proj or self.num_memories > 1 or self.shared_memory,
            "ModelConfig.single_kv_proj", True, "with one memory and no shared one there is nothing to share",
        )  # fmt: skip
        if self.intermediate_size is not None:
            _require_positive(self, "intermediate_size")
        require(self.hidden_ratio > 0, "ModelConfig.hidden_ratio", self.hidden_ratio, "it must be > 0")
        require(self.norm_eps > 0, "ModelConfig.norm_eps", self.norm_eps, "it must be > 0")
        _require_not_negative(
            self, "initializer_range", "balance_loss_scale", "router_z_loss_scale", "router_bias_rate"
        )
        require(
            0 <= self.embedding_dropout < 1,
            "ModelConfig.embedding_dropout", self.embedding_dropout, "it must be in [0, 1)",
        )  # fmt: skip
        _require_choices(self)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < self.vocab_size,
                f"ModelConfig.{name}", value, f"it must be None or an id below vocab_size = {self.vocab_size}",
            )  # fmt: skip
        self._check_attention()

    def _check_attention(self):
        attention = self.attention
        layers = attention.layers
        require(isinstance(layers, tuple), "AttentionConfig.layers", layers, "it must be a tuple")
        require(
            len(set(layers)) == len(layers) and all(0 <= layer < self.num_layers for layer in layers),
            "AttentionConfig.layers", layers, f"they must be different indices from 0 to {self.num_layers - 1}",
        )  # fmt: skip
        if not layers:
            return
        _require_positive(attention, "num_heads")
        width, rest = divmod(self.hidden_size, attention.num_heads)
        require(
            rest == 0 and width % 2 == 0,
            "AttentionConfig.num_heads", attention.num_heads,
            f"hidden_size = {self.hidden_size} divided by it must be an even integer (rotary pairs)",
        )  # fmt: skip
        if attention.num_kv_heads is not None:
            _require_positive(attention, "num_kv_heads")
            require(
                attention.num_heads % attention.num_kv_heads == 0,
                "AttentionConfig.num_kv_heads", attention.num_kv_heads,
                f"it must divide num_heads = {attention.num_heads}",
            )  # fmt: skip
        if attention.window_size is not None:
            _require_positive(attention, "window_size")
        require(attention.rope_theta > 0, "AttentionConfig.rope_theta", attention.rope_theta, "it must be > 0")

    @property
    def value_head_dim(self) -> int:
        """V, the value width of a head."""
        return int(self.head_dim * self.expand_v)

    @property
    def mlp_size(self) -> int:
        """F, the width of the SwiGLU MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * math.ceil(int(self.hidden_size * self.hidden_ratio * 2 / 3) / 256)

    @property
    def step_implementation(self) -> str | None:
        """Of the ops of short inputs: "triton" takes those that its kernels can do, more than 64 rows for example not."""
        return None if self.implementation == "triton" else self.implementation

    @property
    def layer_runs(self) -> tuple[tuple[str, int], ...]:
        """Consecutive layers of one kind: (("mom" | "attention", number of layers), ...) from the bottom up."""
        runs: list[tuple[str, int]] = []
        for layer in range(self.num_layers):
            kind = "attention" if layer in self.attention.layers else "mom"
            if runs and runs[-1][0] == kind:
                runs[-1] = (kind, runs[-1][1] + 1)
            else:
                runs.append((kind, 1))
        return tuple(runs)


def tiny(**overrides) -> ModelConfig:
    """A model of 1,098,000 parameters for a CPU: tests, demonstrations, first steps."""
    return dataclasses.replace(
        ModelConfig(
            vocab_size=2048, hidden_size=128, num_layers=4, num_heads=2, head_dim=32, num_memories=4, top_k=2,
            hidden_ratio=3.0, tie_embeddings=True, dtype="float32", remat="none", max_length=512,
        ),
        **overrides,
    )  # fmt: skip


def mom_340m(**overrides) -> ModelConfig:
    """The paper's small model: 24 layers of width 1024, 4 memories, top-2, shared; 545,119,424 parameters untied."""
    return dataclasses.replace(ModelConfig(hidden_size=1024, hidden_ratio=3.0), **overrides)


def mom_1_3b(**overrides) -> ModelConfig:
    """The paper's large model: mom_340m at width 2048."""
    return dataclasses.replace(ModelConfig(hidden_size=2048, hidden_ratio=3.0), **overrides)


def gated_deltanet_340m(**overrides) -> ModelConfig:
    """mom_340m with a single memory, which is Gated DeltaNet (arXiv 2412.06464): the control."""
    return mom_340m(**{"num_memories": 1, "top_k": 1, "shared_memory": False, "balance_loss_scale": 0.0} | overrides)


def transformer_340m(**overrides) -> ModelConfig:
    """mom_340m with softmax attention in all layers: a Transformer of its size, 543,736,832 parameters, by a wider MLP.

    Another number of layers, on a command line, wants ``--model.attention.layers`` to name them all.
    """
    attention = AttentionConfig(layers=tuple(range(overrides.get("num_layers", 24))))
    return mom_340m(**{"attention": attention, "hidden_ratio": 7.5, "balance_loss_scale": 0.0} | overrides)


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    preset.__name__: preset for preset in (tiny, mom_340m, mom_1_3b, gated_deltanet_340m, transformer_340m)
}


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into rows."""

    path: str = "data/shakespeare"
    """Directory that experiments/prepare_text.py wrote: train and valid token files with their descriptions."""
    sequence_length: int = 512
    """T, tokens in a row."""
    batch_size: int = 16
    """Rows in a step, over all processes and gradient-accumulation pieces."""
    packing: bool = False
    """Whether rows hold whole documents with borders kept (True) or plain windows of the token stream (False)."""
    seed: int = 0
    """Seed of the shuffling."""

    def __post_init__(self):
        _require_positive(self, "sequence_length", "batch_size")
        require(self.seed >= 0, "DataConfig.seed", self.seed, "it must be >= 0")


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule, checkpoints and reports of a run."""

    steps: int = 1000
    """Optimiser steps of the whole run; the schedule is laid out over them."""
    stop_after: int | None = None
    """Stop (with a checkpoint) after this step though the schedule goes on; None: run to the end."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """'cosine': warm-up then cosine to the final rate; 'wsd': warm-up, stable, linear decay over the last part."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0; None: a tenth of the steps, but 100 at most."""
    decay_fraction: float = 0.2
    """Part of the steps that 'wsd' spends decaying."""
    final_learning_rate: float = 0.1
    """Final learning rate as a part of the peak."""
    beta1: float = 0.9
    """AdamW's decay of the mean."""
    beta2: float = 0.95
    """AdamW's decay of the squares."""
    weight_decay: float = 0.1
    """AdamW's weight decay; never on norms, biases, A_log and dt_bias."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    accumulation: int = 1
    """Gradient-accumulation pieces a step; it divides the batch size."""
    loss_chunk: int = 512
    """Tokens of a row whose logits are held at once in the cross-entropy."""
    seed: int = 0
    """Seed of the initialisation and of dropout."""
    log_every: int = 10
    """Steps between records in metrics.jsonl and TensorBoard."""
    eval_every: int = 200
    """Steps between held-out evaluations; the last step is always evaluated."""
    eval_batches: int | None = None
    """Batches in a held-out evaluation; None: the whole held-out file."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept beside those for their held-out loss."""
    preemption_deadline: float | None = None
    """Seconds after SIGTERM at which the run ends even if it has not saved by then; None: it takes the time it needs."""

    def __post_init__(self):
        _require_positive(
            self, "steps", "accumulation", "loss_chunk", "log_every", "eval_every", "checkpoint_every", "keep_last"
        )
        for name in ("stop_after", "eval_batches"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        _require_choices(self)
        _require_not_negative(self, "learning_rate", "weight_decay", "keep_best")
        if self.warmup_steps is not None:
            _require_not_negative(self, "warmup_steps")
            require(
                self.warmup_steps < self.steps,
                "TrainConfig.warmup_steps", self.warmup_steps, f"it must be below steps = {self.steps}",
            )  # fmt: skip
        require(self.clip_norm > 0, "TrainConfig.clip_norm", self.clip_norm, "it must be > 0")
        deadline = self.preemption_deadline
        require(deadline is None or deadline > 0, "TrainConfig.preemption_deadline", deadline, "it must be > 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"TrainConfig.{name}", value, "it must be in [0, 1)")
        for name in ("decay_fraction", "final_learning_rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"TrainConfig.{name}", value, "it must be in [0, 1]")

    @property
    def num_warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named device-mesh axes; their product is the number of devices used."""

    data: int = 1
    """Devices over which the rows of a batch are split, and nothing else."""
    fsdp: int = 1
    """Devices over which rows, parameters and the optimiser's state are split; it divides hidden_size."""
    memory: int = 1
    """Devices over which the memories are split, and all else of a layer; it divides num_memories, times tensor heads."""
    tensor: int = 1
    """Devices over which the heads of every memory are split, and all else of a layer."""
    sequence: int = 1
    """Devices over which the tokens of a row are split, for long rows; it divides the sequence length."""

    def __post_init__(self):
        _require_positive(self, "data", "fsdp", "memory", "tensor", "sequence")
