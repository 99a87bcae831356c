"""Tiny models with random weights, made from nothing but a config class of transformers.

Random weights are enough for questions about structure: is a cut exact, does a checkpoint load.
"""

import inspect
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LARGEST = 8_000_000
"""Parameters that a tiny model may have."""


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes that a tiny model is made with."""

    hidden: int = 32
    ffn: int = 80
    expert: int = 40
    vocab: int = 64
    layers: int = 4


SIZES = {
    "usual": Sizes(),
    "equal": Sizes(hidden=64, ffn=128, expert=128),
    "odd": Sizes(hidden=96, ffn=52, expert=28, vocab=61),
    "square": Sizes(hidden=64, ffn=64, expert=64),
    "few": Sizes(hidden=32, ffn=64, expert=16, vocab=128, layers=2),
}
"""Settings that differ in which sizes coincide: widths of experts, of the model, its vocabulary."""


def tiny_model(model_type: str, *, sizes: Sizes = SIZES["usual"], seed: int = 0) -> PreTrainedModel:
    """Return a small causal language model that runs and survives saving and loading.

    Raises:
        Exception: If the small model cannot be built, run, or saved and loaded as it is.
    """
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    with torch.device("meta"):
        skeleton = model_class(tiny_config(model_class.config_class, sizes))
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if parameters > LARGEST:
        raise ValueError(f"has {parameters:,} parameters even so")
    model = tiny_of(model_class, sizes=sizes, seed=seed)
    _check_reload(model)
    return model


def tiny_of(
    model_class: Any, *, sizes: Sizes = SIZES["usual"], seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Return a small model of `model_class` with random weights.

    The global generator of torch is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(
            tiny_config(model_class.config_class, sizes, **changes)
        )
        shake(model)
    return model.eval()


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of `model` for a few fixed tokens."""
    ids = torch.randint(3, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with torch.no_grad():
        return model(**inputs).logits


def _check_reload(model: PreTrainedModel) -> None:
    """Refuse a model that loses something when it is saved and loaded as it is."""
    logits = logits_of(model)
    if not logits.isfinite().all():
        raise ValueError("gives logits that are not finite")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder).eval()
    if not torch.allclose(logits_of(reloaded), logits, atol=1e-5):
        raise ValueError("gives other logits after saving and loading, without any pruning")


def shake(model: nn.Module) -> None:
    """Add noise to every parameter: zero biases and equal norms would hide a slip."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0


def tiny_config(config_class: Any, sizes: Sizes, **changes: Any) -> Any:
    """Return a small config of `config_class`, with `changes` in the end."""
    return config_class(**_tiny_values(config_class, sizes) | changes)


def _tiny_values(config_class: Any, sizes: Sizes) -> dict[str, Any]:
    """Return the arguments of a small config: every field whose name `_named_sizes` knows."""
    base = config_class()
    fields = vars(base)
    named = _named_sizes(sizes)
    aliases = [alias for alias, key in base.attribute_map.items() if key not in named]
    values = {key: named[key] for key in (*fields, *aliases) if key in named}
    values |= {
        key: sizes.vocab
        for key, value in fields.items()
        if "vocab" in key and (type(value) is int or key == "vocab_size")
    }
    values |= {
        key: _few(value, sizes.layers)
        for key, value in fields.items()
        if isinstance(value, list) and len(value) > 2 and all(isinstance(v, str) for v in value)
    }
    for key, nested in fields.items():
        if hasattr(nested, "to_dict") and hasattr(nested, "model_type"):
            values[key] = _tiny_values(type(nested), sizes)
    for key, value in _special(base.model_type, sizes).items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return values


def _few(kinds_by_layer: list[str], layers: int) -> list[str]:
    """Return kinds for a few layers that show as much of the architecture as so few can."""
    kinds = list(dict.fromkeys(kinds_by_layer))
    return (kinds * layers)[:layers]


def _named_sizes(sizes: Sizes) -> dict[str, Any]:
    """Return small values for the fields that architectures call by these names."""
    words: dict[str, Any] = {
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_decoder_layers num_encoder_layers depth num_blocks""": sizes.layers,
        "hidden_size n_embd d_model dim embed_dim embedding_size emb_dim embedding_dim": (
            sizes.hidden
        ),
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads""": 4,
        "num_key_value_heads num_kv_heads": 4,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff d_inner dff
        ffn_hidden_size feed_forward_size dim_ff intermediate_size_mlp""": sizes.ffn,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size""": sizes.expert,
        "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
        "num_experts_per_tok moe_top_k moe_k top_k_experts moe_topk": 2,
        "n_shared_experts num_shared_experts moe_num_shared_experts": 2,
        "first_k_dense_replace num_dense_layers moe_layer_start_index expert_layer_offset": 1,
        "decoder_sparse_step interleave_moe_layer_step expert_layer_period": 2,
        "q_lora_rank kv_lora_rank": 16,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim": sizes.hidden // 4,
        "qk_head_dim": sizes.hidden // 2,
        "n_group topk_group zero_expert_num": 1,
        "max_position_embeddings n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_size": 32,
        "patch_size": 16,
        "max_source_positions": 32,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
        "mamba_d_ssm": 2 * sizes.hidden,
    }
    return {name: value for names, value in words.items() for name in names.split()}


def _special(model_type: str, sizes: Sizes) -> dict[str, Any]:
    """Return the fields that one architecture needs besides."""
    layers = sizes.layers
    special: dict[str, dict[str, Any]] = {
        "bamba": {"attn_layer_indices": [1]},
        "blt_local_encoder": {"hidden_size_global": sizes.hidden},
        "blt_local_decoder": {"hidden_size_global": sizes.hidden},
        "blt": {"patch_size": 4},
        "cohere_compass_text": {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
        },
        "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
        "dots3_note_vision_encoder": {
            "adapter_in_dim": sizes.hidden,
            "adapter_out_dim": sizes.hidden,
            "mlp_layer_types": _few(["dense", "sparse"], layers),
        },
        "dots3_note_audio_encoder": {
            "adapter_input_size": sizes.hidden,
            "adapter_out_dim": sizes.hidden,
        },
        "dots3_note_text": {
            "layer_types": _few(["indexed_attention", "sliding_attention"], layers),
            "num_attention_heads": 4,
            "index_n_heads": 2,
            "index_head_dim": sizes.hidden // 4,
            "head_dim": sizes.hidden // 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": sizes.hidden // 2,
            "swa_qk_nope_head_dim": sizes.hidden // 4,
            "swa_v_head_dim": sizes.hidden // 4,
        },
        "gemma4_text": {
            "enable_moe_block": True,
            "use_double_wide_mlp": True,
            "num_kv_shared_layers": layers // 4 * 2,
        },
        "gemma3n_text": {"num_kv_shared_layers": layers // 4 * 2},
        "granitemoehybrid": {"layer_types": _few(["linear_attention", "full_attention"], layers)},
        "lfm2_moe": {"layer_types": _few(["conv", "full_attention"], layers)},
        "mimo_v2_flash": {"num_key_value_heads": 2},
        "musicgen_decoder": {"num_codebooks": 1},
        "musicgen_melody_decoder": {"num_codebooks": 1},
        "qwen2_vl_text": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [sizes.hidden // 16, sizes.hidden // 32, sizes.hidden // 32],
            }
        },
        "qwen4_exp_text": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": sizes.hidden // 4,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        "codegen": {"rotary_dim": 8},
        "gptj": {"rotary_dim": 8},
        "gpt_neo": {"attention_types": [[["global"], layers]]},
        "mamba2": {"num_heads": 8, "head_dim": 2 * sizes.hidden // 8, "n_groups": 1},
        "reformer": {
            "is_decoder": True,
            "axial_pos_embds": False,
            "attention_head_size": 8,
            "attn_layers": ["local"] * layers,
            "local_attn_chunk_length": 16,
            "feed_forward_size": sizes.ffn,
        },
        "xmod": {"languages": ["en"], "default_language": "en"},
        "zamba": {
            "num_hidden_layers": 4,
            "layers_block_type": _few(["linear_attention", "hybrid"], 4),
        },
        "zaya": {"num_experts_per_tok": 1},
        "xlnet": {"d_model": sizes.hidden, "n_layer": layers, "n_head": 4, "d_inner": sizes.ffn},
    }
    return special.get(model_type, {})
