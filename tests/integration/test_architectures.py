"""Prune tiny models of many families, save them, load them, and compare what they compute."""

import copy
import re
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers

import yopo
from architectures import RATIO, columns_removed, try_architecture
from tiny_models import SIZES, logits_of, tiny_model, tiny_of
from yopo.writing import write_tokens

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"

CAUSAL = """llama opt phi phi3 gpt2 glm4 gptj gpt_neox bloom falcon mpt starcoder2 nemotron gemma2
    gemma3_text gemma4_text modernbert-decoder mixtral qwen2_moe qwen3_next deepseek_v3 gpt_oss
    llama4_text dbrx jamba zamba2 granitemoehybrid nemotron_h longcat_flash lfm2_moe olmoe jetmoe
    phimoe bitnet apertus cpmant ctrl rwkv reformer xlnet prophetnet recurrent_gemma xlm""".split()

TEXT, SEQ2SEQ = ["intermediate_size"], ["decoder_ffn_dim", "encoder_ffn_dim"]
TOWERS = ["text_config.intermediate_size", "vision_config.intermediate_size"]
FAMILIES = {
    **dict.fromkeys(
        """LlamaModel LlamaForSequenceClassification LlamaForTokenClassification
        LlamaForQuestionAnswering PhiModel PhiForSequenceClassification PhiForTokenClassification
        BertForMaskedLM RobertaForSequenceClassification DebertaV2ForTokenClassification
        AlbertForMaskedLM ElectraForPreTraining RobertaPreLayerNormForMaskedLM
        ModernBertForMaskedLM LiltModel""".split(),
        ("text", TEXT),
    ),
    **dict.fromkeys(
        "OPTModel OPTForSequenceClassification OPTForQuestionAnswering".split(),
        ("text", ["ffn_dim"]),
    ),
    "DistilBertForQuestionAnswering": ("text", ["hidden_dim"]),
    "FunnelModel": ("text", ["d_inner"]),
    "T5EncoderModel": ("text", ["d_ff"]),
    "T5ForConditionalGeneration": ("text to text", ["d_ff"]),
    "MT5ForConditionalGeneration": ("text to text", ["d_ff"]),
    "BartForConditionalGeneration": ("text to text", SEQ2SEQ),
    "PegasusForConditionalGeneration": ("text to text", SEQ2SEQ),
    "WhisperForConditionalGeneration": ("spectrum to text", SEQ2SEQ),
    "Wav2Vec2ForCTC": ("waveform", TEXT),
    "ViTForImageClassification": ("image", TEXT),
    "DeiTForImageClassification": ("image", TEXT),
    "SwinModel": ("image", []),
    "Dinov2Model": ("image", []),
    "CLIPModel": ("image and text", TOWERS),
    "SiglipModel": ("image and text", TOWERS),
    "LlavaForConditionalGeneration": ("image in text", TOWERS),
    "PaliGemmaForConditionalGeneration": ("image in text", TOWERS),
    "Gemma3ForConditionalGeneration": ("image in text", TOWERS),
    "Qwen2VLForConditionalGeneration": ("text", TOWERS[:1]),
    "Qwen3VLForConditionalGeneration": ("text", TOWERS),
    "Llama4ForConditionalGeneration": ("text", [TOWERS[0], f"{TOWERS[0]}_mlp"]),
    "VoxtralForConditionalGeneration": ("text", TOWERS[:1]),
}
"""What a class of models reads, and which config fields change: none where only yopo can load.

The vision towers of Qwen2-VL and Llama 4 and the audio tower of Voxtral are left alone: their
width is fixed by the architecture, or is the input of a projector as well.
"""

CHANGES = {
    "DistilBertForQuestionAnswering": {"hidden_dim": 80},
    "LiltModel": {"hidden_size": 48},
    "SwinModel": {"patch_size": 4, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4},
    "LlavaForConditionalGeneration": {"image_token_id": 60},
    "PaliGemmaForConditionalGeneration": {"image_token_id": 60, "projection_dim": 32},
    "Gemma3ForConditionalGeneration": {"image_token_id": 60, "mm_tokens_per_image": 4},
}


def build(name, **changes):
    return tiny_of(getattr(transformers, name), **CHANGES.get(name, {}) | changes)


def read(model, what):
    """Return every tensor that `model` computes from made-up inputs of the given kind."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    ids = torch.randint(3, 50, (1, 12), generator=generator)
    image = torch.randn(1, 3, 32, 32, generator=generator)
    inputs = {}
    if "image" in what:
        inputs["pixel_values"] = image.to(dtype)
    if what == "image in text":
        ids[0, 1:5] = 60
    if what == "spectrum to text":
        inputs["input_features"] = torch.randn(1, 80, 64, generator=generator).to(dtype)
    elif what == "waveform":
        inputs["input_values"] = torch.randn(1, 4000, generator=generator).to(dtype)
    elif "text" in what:
        inputs["input_ids"] = ids
    if what.endswith("to text"):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        outputs = model(**inputs)
    return [value for value in outputs.values() if isinstance(value, torch.Tensor)]


def flat(config, prefix=""):
    """Return the fields of a config and of those inside it by their path."""
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict):
            fields |= flat(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def prune(model, ratio=0.3):
    yopo.apply_plan(
        model, yopo.plan_by_criterion(model, ratio, criterion=yopo.criteria.norm_product)
    )


def reload(model, folder, by_yopo=False):
    model.save_pretrained(folder)
    load = yopo.load if by_yopo else type(model).from_pretrained
    return load(folder).eval()


@pytest.mark.parametrize(
    ("model_type", "sizes"), list(zip(CAUSAL, cycle(SIZES), strict=False)), ids=CAUSAL
)
def test_a_causal_model_of_any_layout_is_pruned_and_loads_again(model_type, sizes):
    result = try_architecture(model_type, SIZES[sizes])
    expected = "yopo.load" if model_type in ("bloom", "mpt", "xlm") else "pruned"
    assert result.status == expected, result.detail


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_any_family_is_pruned_and_loads_again(name, tmp_path):
    what, fields = FAMILIES[name]
    model = build(name)
    before = flat(model.config.to_dict())
    ffns = yopo.find_ffns(model)
    plan = yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.norm_product)
    with columns_removed(ffns, plan):
        expected = read(model, what)
    yopo.apply_plan(model, plan)
    pruned = read(model, what)
    torch.testing.assert_close(pruned, expected, atol=1e-5, rtol=1e-4)

    changed = {
        key: value
        for key, value in flat(model.config.to_dict()).items()
        if value != before.get(key)
    }
    widths = {key: value for key, value in changed.items() if not key.startswith("yopo_widths")}
    assert widths == dict.fromkeys(fields, 56)
    assert bool(fields) == (widths == changed)

    loaded = reload(model, tmp_path, by_yopo=not fields)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(read(loaded, what), pruned, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "CLIPModel", "T5ForConditionalGeneration"])
def test_pruning_a_second_time_starts_from_the_true_widths(name, tmp_path):
    model = build(name)
    prune(model)
    loaded = reload(model, tmp_path)
    assert {ffn.rows for ffn in yopo.find_ffns(loaded)} == {56}
    prune(loaded, 0.5)
    assert {ffn.rows for ffn in yopo.find_ffns(reload(loaded, tmp_path / "twice"))} == {28}


def test_widths_that_no_config_holds_shrink_twice_too(tmp_path):
    model = build("SwinModel")
    dense = [ffn.rows for ffn in yopo.find_ffns(model)]
    prune(model, 0.5)
    loaded = reload(model, tmp_path, by_yopo=True)
    prune(loaded, 0.5)
    again = reload(loaded, tmp_path / "twice", by_yopo=True)
    assert [ffn.rows for ffn in yopo.find_ffns(again)] == [rows // 4 for rows in dense]
    torch.testing.assert_close(read(again, "image"), read(loaded, "image"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    """LlamaForCausalLM OPTForCausalLM PhiForCausalLM Phi3ForCausalLM GlmForCausalLM
    GPT2LMHeadModel T5ForConditionalGeneration""".split(),
)
def test_every_precision_is_kept(name, dtype, tmp_path):
    what = "text to text" if name.startswith("T5") else "text"
    model = reload(build(name).to(dtype), tmp_path)
    prune(model)
    loaded = reload(model, tmp_path / "pruned")
    kept = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    assert dtype in kept.values()
    assert {key: tensor.dtype for key, tensor in loaded.state_dict().items()} == kept
    torch.testing.assert_close(read(loaded, what), read(model, what), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    """MixtralForCausalLM Qwen2MoeForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM
    Llama4ForCausalLM""".split(),
)
def test_experts_and_what_stands_beside_them_all_shrink(name, dtype, tmp_path):
    model = reload(build(name).to(dtype), tmp_path)
    dense = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    prune(model)
    loaded = reload(model, tmp_path / "pruned")
    torch.testing.assert_close(read(loaded, "text"), read(model, "text"), atol=0, rtol=0)
    cut = {ffn.name: ffn.rows for ffn in yopo.find_ffns(loaded)}
    assert cut.keys() == dense.keys()
    assert all(0.55 <= cut[key] / rows <= 0.85 for key, rows in dense.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_embeddings_stay_tied_or_untied(name, tied, tmp_path):
    model = build(name, tie_word_embeddings=tied)
    prune(model)
    loaded = reload(model, tmp_path)
    for each in (model, loaded):
        first, last = each.get_input_embeddings().weight, each.get_output_embeddings().weight
        assert (first is last) == tied
    torch.testing.assert_close(read(loaded, "text"), read(model, "text"))


def test_biases_of_a_gated_ffn_go_with_their_rows(tmp_path):
    model = build("LlamaForCausalLM", mlp_bias=True)
    dense = copy.deepcopy(model)
    plan = yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.norm_product)
    yopo.apply_plan(model, plan)
    for index, layer in enumerate(model.model.layers):
        kept = plan.kept[f"model.layers.{index}.mlp"]
        old = dense.model.layers[index].mlp
        torch.testing.assert_close(layer.mlp.gate_proj.bias, old.gate_proj.bias[kept])
        torch.testing.assert_close(layer.mlp.up_proj.bias, old.up_proj.bias[kept])
        torch.testing.assert_close(layer.mlp.down_proj.bias, old.down_proj.bias)
    torch.testing.assert_close(read(reload(model, tmp_path), "text"), read(model, "text"))


def test_the_page_lists_every_type_and_nine_in_ten_load_with_stock_transformers():
    text = PAGE.read_text(encoding="utf-8")
    built, pruned, percent = map(
        int, re.search(r"(\d+) could be built; \*\*(\d+) of them \((\d+)%\)", text).groups()
    )
    listed = {
        title: re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)
        for title, section in re.findall(r"^## (.*)\n([^#]*)", text, re.MULTILINE)
    }
    assert percent >= 90
    assert len(listed["Load with stock transformers"]) == pruned
    assert sum(map(len, listed.values())) - len(listed["Could not be built"]) == built
    assert "Fail" not in listed


@pytest.mark.parametrize("model_type", [name for name in CAUSAL if name != "jamba"])
def test_the_default_recipe_prunes_every_family(model_type, monkeypatch):
    """All but Jamba, whose cache in transformers asks for a layer of attention that this lacks."""
    few = partial(write_tokens, sequences=4, length=12)
    monkeypatch.setattr("yopo.evidence.write_tokens", few)
    model = tiny_model(model_type)
    before = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    yopo.PolicyPruner().fit(model).prune(model, RATIO)
    after = {ffn.name: ffn.rows for ffn in yopo.find_ffns(model)}
    assert after.keys() == before.keys()
    assert all(after[name] < rows for name, rows in before.items())
    assert torch.isfinite(logits_of(model)).all()
