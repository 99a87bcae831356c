"""Prune a tiny model of every causal-LM architecture of transformers, save, reload, compare logits.

    python benchmarks/architectures.py            writes docs/reference/architectures.md
    python benchmarks/architectures.py llama opt  prints these only

Random weights are enough here: the question is whether the cut is exact and the checkpoint loads.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import yopo

RATIO = 0.3
LARGEST = 5_000_000
"""Parameters that a tiny model may have."""

_LAYERS = 2
_WORDS: dict[str, int] = {
    """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
    num_decoder_layers num_encoder_layers depth num_blocks""": _LAYERS,
    "hidden_size n_embd d_model dim embed_dim embedding_size emb_dim embedding_dim": 32,
    "vocab_size encoder_vocab_size": 64,
    """num_attention_heads n_head n_heads num_heads encoder_attention_heads
    decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads""": 4,
    "num_key_value_heads num_kv_heads": 2,
    """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff d_inner dff
    ffn_hidden_size feed_forward_size dim_ff intermediate_size_mlp""": 80,
    """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    expert_ffn_hidden_size moe_shared_expert_intermediate_size""": 40,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_top_k moe_k top_k_experts": 2,
    "q_lora_rank kv_lora_rank": 16,
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim": 8,
    "n_group topk_group zero_expert_num": 1,
}
_SIZES: dict[str, Any] = {
    **{name: value for names, value in _WORDS.items() for name in names.split()},
    "max_position_embeddings": 128,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 32,
    "patch_size": 16,
    "max_source_positions": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
}
"""Small values for the fields that architectures call by these names."""

_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4, "num_kv_heads": 4},
    {"head_dim": None, "num_key_value_heads": 4, "layer_types": None},
    {"hidden_size": 64, "head_dim": None, "num_key_value_heads": 4, "layer_types": None},
)
"""Changes to try in turn where the sizes above contradict each other in an architecture."""

_SPECIAL: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], _LAYERS]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
        "feed_forward_size": 80,
    },
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 80, "vocab_size": 64},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {"layer_types": None, "num_hidden_layers": 6, "attn_layer_period": 2},
    "dots1": {"num_key_value_heads": 4},
    "musicgen": {},
}
"""Fields that one architecture needs besides."""


@dataclass(frozen=True)
class Result:
    """Say how one architecture fared."""

    model_type: str
    status: str
    detail: str
    fields: tuple[str, ...] = ()
    found: str = ""


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a small causal language model of `model_type` with random weights, which runs.

    Raises:
        Exception: The first complaint, if no variant of the small config can be built and run.
    """
    complaint: Exception | None = None
    for variant in _VARIANTS:
        try:
            model = _build(model_type, variant, seed)
            logits_of(model)
            return model
        except Exception as error:
            complaint = complaint or error
    assert complaint is not None
    raise complaint


def _build(model_type: str, variant: dict[str, Any], seed: int) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_tiny_values(config_class, model_type, variant))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"has {parameters:,} parameters even so")
    torch.manual_seed(seed)
    config = config_class(**_tiny_values(config_class, model_type, variant))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # models start with zero biases and equal norms, which would hide a slip
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of `model` for a few fixed tokens."""
    ids = torch.randint(3, 60, (1, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits


def try_architecture(model_type: str) -> Result:
    """Prune, save, reload and compare one architecture."""
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Result(model_type, "not built", _first_line(error))
    try:
        ffns = yopo.find_ffns(model)
        plan = yopo.plan_by_criterion(model, RATIO, criterion=yopo.criteria.norm_product)
        yopo.apply_plan(model, plan)
        fields = tuple(sorted({str(ffn.width) for ffn in ffns}))
        found = "layout" if all(ffn.known for ffn in ffns) else "structure, proved"
        pruned = logits_of(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if any(ffn.width is None for ffn in ffns):
                loaded = yopo.load(folder).eval()
                status, detail = "yopo.load", "the architecture fixes the width of its FFN"
            else:
                loaded = type(model).from_pretrained(folder).eval()
                status, detail = "pruned", f"ratio {plan.ratio_reached:.3f}"
            same = torch.allclose(logits_of(loaded), pruned, atol=1e-5, equal_nan=False)
        if not same:
            return Result(model_type, "failed", "logits differ after reloading", fields, found)
        return Result(model_type, status, detail, fields, found)
    except Exception as error:
        no_ffn = "no FFN was found" in str(error)
        return Result(model_type, "no FFN" if no_ffn else "failed", _first_line(error))


def report(results: list[Result]) -> str:
    """Return the page of the documentation that lists every architecture."""
    counts = Counter(result.status for result in results)
    built = len(results) - counts["not built"]
    lines = [
        "# Architectures",
        "",
        f"Every causal-LM `model_type` of transformers {transformers.__version__}, made tiny from "
        f"its config class, pruned at {RATIO}, saved, reloaded and compared by its logits "
        "(`python benchmarks/architectures.py`). "
        f"Of {len(results)} types {built} could be built; **{counts['pruned']} of them "
        f"({counts['pruned'] / built:.0%}) reload with stock `from_pretrained` and equal logits**, "
        f"{counts['yopo.load']} need `yopo.load`, {counts['no FFN']} have no FFN, "
        f"{counts['failed']} fail.",
        "",
        "| model type | result | width set by | found by | remark |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        fields = ", ".join(f"`{field}`" for field in result.fields if field != "None")
        detail = "" if result.status == "pruned" else result.detail.replace("|", "/")
        lines.append(
            f"| `{result.model_type}` | {result.status} | {fields} | {result.found} | {detail} |"
        )
    return "\n".join(lines) + "\n"


def _tiny_values(config_class: Any, model_type: str, variant: dict[str, Any]) -> dict[str, Any]:
    base = config_class()
    special = _SPECIAL.get(model_type, {})
    values = {key: value for key, value in _SIZES.items() if key in vars(base)}
    if isinstance(vars(base).get("layer_types"), list):
        values["layer_types"] = _two_layers(base.layer_types)
    values |= {key: value for key, value in variant.items() if key in values}
    for key in getattr(config_class, "sub_configs", {}):
        nested = getattr(base, key, None)
        if nested is not None and hasattr(nested, "to_dict"):
            values[key] = _tiny_values(type(nested), getattr(nested, "model_type", ""), variant)
    values |= special
    return {key: value for key, value in values.items() if value is not None}


def _two_layers(layer_types: list[str]) -> list[str]:
    """Return two layer types that show as much of the architecture as two can."""
    kinds = list(dict.fromkeys(layer_types))
    return (kinds * 2)[:_LAYERS]


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and "validation error" in lines[0].lower() else lines[0]
    return f"{type(error).__name__}: {line}"[:160]


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--output", default="docs/reference/architectures.md", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for model_type in arguments.model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        result = try_architecture(model_type)
        results.append(result)
        print(json.dumps(asdict(result)), flush=True)
    if not arguments.model_types:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(results), encoding="utf-8")
        print(Counter(result.status for result in results), file=sys.stderr)


if __name__ == "__main__":
    main()
