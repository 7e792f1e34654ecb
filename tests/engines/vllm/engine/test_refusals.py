"""What is refused when the engine starts: the reason, and what to use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BloomConfig,
    DeepseekV2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from quantpress.cache import WidthPlan
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.errors import QuantPressError, UnsupportedModelError
from tests.engines.vllm.engine.running import engine
from tests.engines.vllm.engine.tiny import CONFIG

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 64,
}


def latent() -> PreTrainedConfig:
    return DeepseekV2Config(**CONFIG | LATENT, architectures=["DeepseekV2ForCausalLM"])


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**CONFIG | changes, architectures=["LlamaForCausalLM"])


REFUSED: dict[str, tuple[PreTrainedConfig, dict[str, Any], str]] = {
    "mixed windows": (
        llama(sliding_window=256, layer_types=["full_attention", "sliding_attention"]),
        {},
        "sliding window of 256.*--disable-sliding-window.*use --kv-cache-dtype",
    ),
    "windows everywhere": (
        llama(sliding_window=256, layer_types=["sliding_attention"] * 2),
        {},
        "sliding window of 256.*use --kv-cache-dtype",
    ),
    "ALiBi": (
        BloomConfig(vocab_size=512, hidden_size=256, n_layer=2, n_head=4, architectures=["BloomForCausalLM"]),
        {},
        "ALiBi.*use --kv-cache-dtype",
    ),
    "MLA": (latent(), {}, "not supported by MLA"),  # on a CPU vLLM itself refuses
    "block size": (llama(), {"block_size": 64}, "blocks of 64 tokens.*128"),
    "KV transfer": (
        llama(),
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "KV connector.*kv-transfer-config",
    ),
    "offloading": (llama(), {"kv_offloading_size": 1.0}, "KV connector.*kv-offloading-size"),
    "an unknown option": (llama(), {"additional_config": {"quantpress": {"profil": "x"}}}, "profil.*profile"),
}


PLANS: dict[str, tuple[PreTrainedConfig, dict[int, tuple[int, int]], str]] = {
    "of another model": (
        llama(num_hidden_layers=3),
        {0: (3, 3)},
        "num_hidden_layers was 3, is 2.*quantpress fit",
    ),
    "8 bits": (
        llama(),
        {0: (3, 2), 1: (8, 4)},
        "8 bits for the keys.*of layer 1.*quantpress fit --widths 2,3,4",
    ),
    "1 bit": (llama(), {0: (3, 1), 1: (8, 4)}, "1 bits for the values of layer 0.*--widths 2,3,4"),
    "without a layer": (llama(), {0: (3, 2)}, r"no widths of layer 1 \(it has 0\).*quantpress fit"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_is_refused(case: str, tmp_path: Path) -> None:
    """Before weights are loaded."""
    of_model, widths, message = PLANS[case]
    llama().save_pretrained(tmp_path)
    WidthPlan("tiny", config_fingerprint(of_model), widths).save(tmp_path / "plan.json")
    options = {"additional_config": {"quantpress": {"plan": str(tmp_path / "plan.json")}}}
    with pytest.raises(QuantPressError, match=f"(?s){message}"), engine(tmp_path, **options):
        pass


@pytest.mark.parametrize("case", REFUSED)
def test_an_engine_that_is_refused(case: str, tmp_path: Path) -> None:
    config, options, message = REFUSED[case]
    config.save_pretrained(tmp_path)
    with (
        pytest.raises((QuantPressError, ValueError), match=f"(?s){message}"),
        engine(tmp_path, load_format="dummy", **options),
    ):
        pass


def test_mla_is_refused_on_a_gpu_too(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from quantpress.engines.vllm.checks import check_engine

    latent().save_pretrained(tmp_path)
    config = EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_engine_config()
    with pytest.raises(UnsupportedModelError, match=r"MLA.*use --kv-cache-dtype"):
        check_engine(config, on_gpu=True)


def test_a_head_dim_without_kernels_is_refused_on_a_gpu() -> None:
    from quantpress.engines.vllm.checks import check_layer

    layer: dict[str, Any] = {
        "sliding_window": None,
        "alibi_slopes": None,
        "attn_type": "decoder",
        "shared_with": None,
        "others": {},
        "on_gpu": True,
    }
    check_layer(head_dim=64, **layer)
    for dim in (48, 80, 96, 112, 192):
        check_layer(head_dim=dim, **layer)
    for dim in (32, 72, 272):
        message = rf"head_dim of {dim}: .*multiples of 16 from 48 to 256; use --kv-cache-dtype"
        with pytest.raises(UnsupportedModelError, match=message):
            check_layer(head_dim=dim, **layer)


def test_windows_that_are_turned_off(tmp_path: Path) -> None:
    """As the error says: requests are then no longer than a window."""
    llama(sliding_window=256).save_pretrained(tmp_path)
    options = {"disable_sliding_window": True, "max_model_len": 256}
    with engine(tmp_path, load_format="dummy", **options) as running:
        (answer,) = running.generate([5] * 240)
        assert len(answer.outputs[0].token_ids) == 8


def test_the_same_model_without_what_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with engine(tmp_path, load_format="dummy") as running:
        assert running.generate([5, 6, 7])
