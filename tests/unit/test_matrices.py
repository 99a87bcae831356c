"""Which matrices a metric sees, in every architecture."""

import pytest
import torch
import transformers

from conftest import CONFIGS
from tiny_models import SIZES, tiny_of
from yopo import UnsupportedModelError
from yopo.symbolic.matrices import find_blocks


@pytest.mark.parametrize(
    ("kind", "blocks", "matrices"),
    [
        ("llama", ["model.layers.0", "model.layers.1"], 7),
        ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"], 6),
        ("phi", ["model.layers.0", "model.layers.1"], 6),
        ("phi3", ["model.layers.0", "model.layers.1"], 4),
        ("gpt2", ["transformer.h.0", "transformer.h.1"], 4),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"], 11),
        ("qwen2_moe", ["model.layers.0", "model.layers.1"], 4 + 4 + 2 * 4),
        ("gpt_oss", ["model.layers.0", "model.layers.1"], 4 + 2 * 4),
    ],
)
def test_layers_and_their_linear_maps_are_found(tiny_model, kind, blocks, matrices):
    found = find_blocks(tiny_model(kind))
    assert [block.name for block in found] == blocks
    assert len(found[-1].matrices) == matrices


@pytest.mark.parametrize("kind", CONFIGS)
def test_matrices_lie_in_the_model_and_each_weight_is_in_one(tiny_model, kind):
    model = tiny_model(kind)
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for block in find_blocks(model):
        for matrix in block.matrices:
            assert matrix.key.startswith(block.name)
            assert matrix.weight.untyped_storage().data_ptr() == (
                model.get_parameter(matrix.key).untyped_storage().data_ptr()
            )
            matrix.view(counts[matrix.key]).add_(1)
    wide = {name for name, count in counts.items() if count.dim() > 1 and count.any()}
    assert all(counts[name].eq(1).all() for name in wide)
    left_out = {name for name, count in counts.items() if count.dim() > 1} - wide
    known = (
        "embed",
        "shared",
        "wte",
        "wpe",
        "lm_head",
        "router",
        "mlp.gate.",
        "relative_attention",
        "_bias",
    )
    assert all(any(part in name for part in known) for name in left_out), left_out


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("SiglipModel", "vision_model.head.mlp"),
        ("Gemma3ForConditionalGeneration", "model.vision_tower.head.mlp"),
        ("Idefics2Model", "connector.modality_projection"),
    ],
)
def test_an_ffn_outside_the_lists_of_layers_is_a_layer_of_its_own(name, beside):
    model = tiny_of(getattr(transformers, name), sizes=SIZES["few"])
    blocks = find_blocks(model)
    (own,) = (block for block in blocks if block.name == beside)
    assert {matrix.key.rpartition(".")[0].rpartition(".")[0] for matrix in own.matrices} == {beside}
    matrices = [matrix for block in blocks for matrix in block.matrices]
    assert len({matrix.place for matrix in matrices}) == len(matrices)
    assert not any(
        part in matrix.name for matrix in matrices for part in ("embed", "lm_head", "merger")
    )


def test_a_matrix_that_layers_share_is_in_the_first_of_them():
    model = tiny_of(transformers.Zamba2ForCausalLM)
    first, *_, last = (block for block in find_blocks(model) if len(block.matrices) > 2)
    shared = "model.layers.1.shared_transformer.self_attn.q_proj.weight"
    assert shared in {matrix.name for matrix in first.matrices}
    places = [{matrix.place for matrix in block.matrices} for block in (first, last)]
    assert not set.intersection(*places)


def test_attentions_in_a_list_beside_that_of_the_ffns_are_layers_too():
    found = find_blocks(tiny_of(transformers.XLMModel, sizes=SIZES["few"]))
    assert [(block.name, len(block.matrices)) for block in found] == [
        ("attentions.0", 4),
        ("attentions.1", 4),
        ("ffns.0", 2),
        ("ffns.1", 2),
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_matrix_is_read_as_outputs_by_inputs(tiny_model, kind):
    """d_model is 32 everywhere, and no other width is."""
    model = tiny_model(kind, **({"n_head": 2} if kind == "gpt2" else {}))
    for block in find_blocks(model):
        for matrix in block.matrices:
            out, into = matrix.weight.shape
            if any(part in matrix.name for part in ("down", "fc2", "wo.", "mlp.c_proj")):
                assert out == 32
            elif any(part in matrix.name for part in ("gate", "up", "fc1", "wi_", "c_fc")):
                assert into == 32


def test_weights_that_are_not_finite_or_not_there_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"q_proj.weight` has weights that are NaN"):
        find_blocks(model)
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        find_blocks(tiny_llama().to("meta"))
