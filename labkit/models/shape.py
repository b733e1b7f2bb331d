"""The sizes of a model and the variants of its layers, from a ``transformers`` config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.errors import UserError

ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class LatentShape:
    """Multi-head latent attention (MLA): keys and values are expanded from one latent of each token."""

    query_rank: int | None
    """Width of the latent that queries are expanded from; None: they come from the hidden state."""
    rank: int
    """Width of the latent that keys and values are expanded from."""
    plain_dim: int
    """Dimensions of a query or key head without rotation; ``rotary_dim`` with rotation follow."""
    rotary_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Width of a query or key head."""
        return self.plain_dim + self.rotary_dim


@dataclass(frozen=True)
class ExpertsShape:
    """Mixture of experts, in all layers but the first ``dense_layers``. The routing is that of labkit.kernels.moe."""

    count: int
    per_token: int
    intermediate_size: int
    """Of one routed expert."""
    shared_size: int
    """Intermediate size of the experts that see every token, taken as one; 0 where there are none."""
    dense_layers: int
    scoring: str
    method: str
    groups: int
    top_groups: int
    normalise: bool
    scale: float
    correction: bool
    """Whether a bias is added to the scores for choosing."""


@dataclass(frozen=True)
class Quantization:
    """How a GPTQ checkpoint stores its linear maps."""

    bits: int
    """4 or 8."""
    group_size: int
    """Inputs that share a scale, a multiple of 32; -1: all."""
    zero_stored_less_one: bool = True
    """Format v1; not so v2."""

    @classmethod
    def from_config(cls, config: Any) -> Quantization:
        """From ``quantization_config`` of a config.json. Raises UserError naming the field that cannot be read."""
        config = config if isinstance(config, Mapping) else {}
        method = config.get("quant_method")
        if method != "gptq":
            raise UserError(
                f"quantised weights ({method or 'quantization_config'}) are not supported; give the model in GPTQ "
                "format, or in 16 or 32 bits"
            )
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        bits, group_size = config.get("bits"), config.get("group_size", -1)
        if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise _refusal("checkpoint_format", "marlin" if config.get("is_marlin_format") else form, "gptq, gptq_v2")
        if bits not in (4, 8):
            raise _refusal("bits", bits, "4, 8")
        if not isinstance(group_size, int) or (group_size != -1 and (group_size < 32 or group_size % 32)):
            raise _refusal("group_size", group_size, "multiples of 32, and -1")
        if not config.get("sym", True):
            raise _refusal("sym", False, "true")
        if config.get("pack_dtype", "int32") != "int32":
            raise _refusal("pack_dtype", config["pack_dtype"], "int32")
        return cls(bits, group_size, form == "gptq")

    def group(self, inputs: int) -> int:
        """The number of inputs that share a scale in a linear map of this many."""
        return inputs if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class ModelShape:
    """What the layers of a model look like. Of a model that is split over ranks, ``Parallel.share`` gives one part."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """Width of a query head."""
    norm_eps: float
    rope: Mapping[str, Any]
    """The config's ``rope_parameters``."""
    max_positions: int
    tied: bool
    """Whether the output head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False
    """Whether each query and key head is normed before it is rotated (Qwen3)."""
    latent: LatentShape | None = None
    experts: ExpertsShape | None = None
    extra_layers: int = 0
    """Layers past the last that a checkpoint may hold for predicting more tokens; they are not loaded."""
    quantization: Quantization | None = None
    """How the checkpoint stores its linear maps; None: as they are, in 16 or 32 bits."""

    @property
    def rotary_dim(self) -> int:
        return self.latent.rotary_dim if self.latent else self.head_dim

    @property
    def cache_planes(self) -> int:
        """Keys and values, or the latents alone."""
        return 1 if self.latent else 2

    @property
    def cache_heads(self) -> int:
        return 1 if self.latent else self.kv_heads

    @property
    def cache_width(self) -> int:
        """Elements of one token in one plane and head of a layer's cache."""
        return self.latent.rank + self.latent.rotary_dim if self.latent else self.head_dim

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by before the softmax; DeepSeek's YaRN raises it with the stretched context."""
        scale = self.head_dim**-0.5
        if self.latent and self.rope.get("rope_type") != "default" and self.rope.get("mscale_all_dim"):
            factor = self.rope["factor"]
            scale *= (0.1 * self.rope["mscale_all_dim"] * math.log(factor) + 1 if factor > 1 else 1) ** 2
        return scale

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a ``transformers`` config of one of ARCHITECTURES, by its ``model_type``.

        Raises UserError for variants that would be computed wrongly.
        """
        kind = config.model_type
        _refuse_variants(config)
        latent = _latent(config) if kind in ("deepseek_v2", "deepseek_v3") else None
        attention_bias = bool(getattr(config, "attention_bias", False))
        quantization = getattr(config, "quantization_config", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=latent.query_dim if latent else head_dim,
            norm_eps=config.rms_norm_eps,
            rope=dict(config.rope_parameters),
            max_positions=config.max_position_embeddings,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=kind == "qwen2" or attention_bias,
            out_bias=kind != "qwen2" and attention_bias,
            head_norms=kind == "qwen3",
            latent=latent,
            experts=_experts(config) if latent else None,
            extra_layers=getattr(config, "num_nextn_predict_layers", None) or 0,
            quantization=Quantization.from_config(quantization) if quantization else None,
        )


def _refusal(field: str, value: object, supported: str) -> UserError:
    return UserError(f"GPTQ weights with {field} {value!r} are not supported; supported are: {supported}")


def _refuse_variants(config: Any) -> None:
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UserError(f"rope type {rope_type!r} is not supported; supported are: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError("heads that are rotated in part (partial_rotary_factor) are not supported")
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or []):
        raise UserError("sliding-window attention is not supported; set use_sliding_window to false in config.json")
    if config.hidden_act != "silu":
        raise UserError(f"activation {config.hidden_act!r} is not supported; only 'silu' is")
    if getattr(config, "mlp_bias", False):
        raise UserError("biases of the MLP (mlp_bias) are not supported")


def _latent(config: Any) -> LatentShape:
    if getattr(config, "attention_bias", False):
        raise UserError("biases of latent attention (attention_bias) are not supported")
    if not getattr(config, "rope_interleave", True):
        raise UserError("latent attention with rope_interleave false is not supported")
    return LatentShape(
        query_rank=config.q_lora_rank,
        rank=config.kv_lora_rank,
        plain_dim=config.qk_nope_head_dim,
        rotary_dim=config.qk_rope_head_dim,
        value_dim=config.v_head_dim,
    )


def _experts(config: Any) -> ExpertsShape | None:
    third = config.model_type == "deepseek_v3"
    scoring, method = ("sigmoid", "noaux_tc") if third else ("softmax", config.topk_method)
    if getattr(config, "scoring_func", None) not in (None, scoring):
        raise UserError(f"routing by {config.scoring_func!r} is not supported here; this architecture's is {scoring!r}")
    if not third and method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"topk_method {method!r} is not supported; use 'greedy' or 'group_limited_greedy'")
    if getattr(config, "moe_layer_freq", 1) != 1:
        raise UserError(f"experts in every {config.moe_layer_freq}th layer are not supported; moe_layer_freq must be 1")
    if not third and config.norm_topk_prob:
        raise UserError("DeepSeek-V2 with norm_topk_prob is not supported: its published code and transformers differ")
    if config.first_k_dense_replace >= config.num_hidden_layers:
        return None
    grouped = method != "greedy"
    return ExpertsShape(
        count=config.n_routed_experts,
        per_token=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
        dense_layers=config.first_k_dense_replace,
        scoring=scoring,
        method=method,
        groups=config.n_group if grouped else 1,
        top_groups=config.topk_group if grouped else 1,
        normalise=third and bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
        correction=third,
    )
