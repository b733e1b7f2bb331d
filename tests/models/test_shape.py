from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config, Qwen3Config

from labkit.errors import UserError
from labkit.models.shape import ModelShape

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "config, change, reason",
    [
        (Qwen2Config, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dy"),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding-window"),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding-window"),
        (Qwen2Config, {"hidden_act": "gelu"}, "activation 'gelu'"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias"),
        (LlamaConfig, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LlamaConfig, {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised weights \(awq\)"),
        (DeepseekV3Config, {"quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(fp8\)"),
        (DeepseekV3Config, {"attention_bias": True}, "attention_bias"),
        (DeepseekV3Config, {"rope_interleave": False}, "rope_interleave"),
        (DeepseekV3Config, {"scoring_func": "softmax"}, "routing by 'softmax'"),
        (DeepseekV2Config, {"scoring_func": "sigmoid"}, "routing by 'sigmoid'"),
        (DeepseekV2Config, {"topk_method": "noisy"}, "topk_method 'noisy'"),
        (DeepseekV2Config, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        (DeepseekV2Config, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (DeepseekV2Config, {"norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_variants_that_would_be_computed_wrongly_are_refused(config: Any, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ModelShape.from_config(config(**change))


def test_the_cache_holds_keys_and_values_or_one_latent() -> None:
    llama = ModelShape.from_config(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096))
    assert (llama.cache_planes, llama.cache_heads, llama.cache_width) == (2, 8, 128)
    deepseek = ModelShape.from_config(DeepseekV3Config())
    assert (deepseek.cache_planes, deepseek.cache_heads, deepseek.cache_width) == (1, 1, 576)
    assert deepseek.rotary_dim == 64


def test_scores_are_scaled_by_the_width_of_a_head_and_by_deepseeks_yarn() -> None:
    scale = lambda config: ModelShape.from_config(config).attention_scale  # noqa: E731
    assert scale(Qwen3Config(head_dim=64)) == 64**-0.5
    assert scale(DeepseekV3Config()) == 192**-0.5
    yarn = DeepseekV3Config(rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})
    assert scale(yarn) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    # YaRN of other models scales cosines and sines alone.
    assert scale(Qwen2Config(hidden_size=512, num_attention_heads=8, rope_parameters=YARN)) == 64**-0.5


def test_a_model_whose_layers_are_all_dense_has_no_experts() -> None:
    assert ModelShape.from_config(DeepseekV3Config(first_k_dense_replace=61)).experts is None
