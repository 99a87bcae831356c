import json

import pytest
import torch
from transformers import LlamaForCausalLM

import yopo
from yopo import InvalidArgumentError, PruningPlan
from yopo.cli import main


def unevenly_cut(model):
    """Cut the first FFN to a third, which no config can express."""
    ffns = yopo.find_ffns(model)
    kept = {ffn.name: torch.arange(ffn.rows) for ffn in ffns}
    kept[ffns[0].name] = kept[ffns[0].name][::3]
    plan = PruningPlan(kept=kept, rows={ffn.name: ffn.rows for ffn in ffns}, ratio=0.2)
    yopo.apply_plan(model, plan)
    return model


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


KINDS = pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "t5", "phi3"])


@KINDS
def test_a_model_of_unequal_widths_comes_back_as_it_was(tiny_model, logits, tmp_path, kind):
    model = unevenly_cut(tiny_model(kind))
    model.save_pretrained(tmp_path)
    loaded = yopo.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


@KINDS
def test_stock_from_pretrained_refuses_unequal_widths(tiny_model, tmp_path, kind):
    model = unevenly_cut(tiny_model(kind))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        type(model).from_pretrained(tmp_path)


def test_a_model_of_one_width_is_loaded_as_stock_transformers_does(tiny_llama, logits, tmp_path):
    model = tiny_llama()
    plan = yopo.plan_by_criterion(model, 0.3, criterion=yopo.criteria.row_norm)
    yopo.apply_plan(model, plan)
    model.save_pretrained(tmp_path)
    loaded = yopo.load(str(tmp_path))
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert not hasattr(loaded.config, "yopo_widths")


def test_arguments_reach_from_pretrained(tiny_llama, tmp_path):
    unevenly_cut(tiny_llama(dtype=torch.float16)).save_pretrained(tmp_path)
    assert yopo.load(tmp_path).dtype == torch.float16
    assert yopo.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    loaded = yopo.load(tmp_path, device_map={"": "cpu"}, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_what_was_loaded_can_be_cut_saved_and_loaded_again(tiny_llama, logits, tmp_path, caplog):
    unevenly_cut(tiny_llama()).save_pretrained(tmp_path / "one")
    again = yopo.load(tmp_path / "one")
    plan = yopo.plan_by_criterion(again, 0.5, criterion=yopo.criteria.row_norm)
    assert plan.rows == {"model.layers.0.mlp": 27, "model.layers.1.mlp": 80}
    yopo.apply_plan(again, plan)
    caplog.clear()
    again.save_pretrained(tmp_path / "two")
    assert "stock `from_pretrained` will refuse" in caplog.text
    loaded = yopo.load(tmp_path / "two")
    assert torch.equal(logits(loaded), logits(again))
    assert loaded.config.yopo_widths == plan.widths


def test_loading_says_nothing_to_worry_about(tiny_llama, tmp_path, caplog):
    unevenly_cut(tiny_llama()).save_pretrained(tmp_path)
    caplog.clear()
    yopo.load(tmp_path)
    assert caplog.records == []


def test_a_checkpoint_in_shards_comes_back_too(tiny_llama, logits, tmp_path):
    model = unevenly_cut(tiny_llama())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(yopo.load(tmp_path)), logits(model))


def test_tied_embeddings_come_back_tied(tiny_llama, logits, tmp_path):
    model = unevenly_cut(tiny_llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = yopo.load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_base_model_comes_back_without_its_head(tiny_llama, tmp_path):
    model = unevenly_cut(tiny_llama().model)
    model.save_pretrained(tmp_path)
    assert type(yopo.load(tmp_path)) is type(model)


def test_loading_in_inference_mode_gives_a_model_that_can_be_trained(tiny_llama, tmp_path):
    unevenly_cut(tiny_llama()).save_pretrained(tmp_path)
    with torch.no_grad():
        model = yopo.load(tmp_path)
    ids = torch.arange(12)[None] + 3
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_a_missing_model_is_told(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"holds no model: `config\.json` is missing"):
        yopo.load(tmp_path)
    with pytest.raises(OSError, match=r"nowhere"):
        yopo.load(tmp_path / "nowhere")


def test_a_config_of_another_library_is_told(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for names in (["MyOwnModel"], [], None):
        file.write_text(json.dumps(config | {"architectures": names}))
        with pytest.raises(InvalidArgumentError, match=r"names the architecture .*does not have"):
            yopo.load(tmp_path)
    file.write_text(json.dumps(config | {"architectures": "LlamaForCausalLM"}))
    told = r"`architectures` in the config of .* must be a list of names, got 'LlamaForCausalLM'"
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "nosuch"}, "model type `nosuch` but Transformers does not recognize"),
        ({"model_type": None}, "model type `None` but Transformers does not recognize"),
        ({"model_type": ["llama"]}, "unhashable type"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_a_config_that_transformers_cannot_use_is_told(tiny_llama, tmp_path, changes, told):
    tiny_llama().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InvalidArgumentError, match=rf"{told}.*\. Where the code of a model is no"):
        yopo.load(tmp_path)


def test_a_config_of_which_no_model_can_be_built_is_told(tiny_llama, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    tiny_llama().save_pretrained(source)
    change_config(source, hidden_act="nosuch")
    told = "LlamaForCausalLM cannot be built from its config: 'nosuch' is unknown."
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.load(source)
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.prune_checkpoint(source, target, 0.3)
    assert main(["info", str(source)]) == 2
    assert told in capsys.readouterr().err


class OwnForCausalLM(LlamaForCausalLM):
    """A model whose class is no part of transformers."""


def test_a_class_of_ones_own_is_named_to_load_it(tiny_llama, logits, tmp_path, caplog):
    model = tiny_llama()
    model.__class__ = OwnForCausalLM
    unevenly_cut(model).save_pretrained(tmp_path)
    call = "`yopo.load(path, model_class=OwnForCausalLM)`"
    assert [call in record.message for record in caplog.records] == [True, True]
    with pytest.raises(InvalidArgumentError, match=r"loads with `yopo.load\(path, model_class="):
        yopo.load(tmp_path)
    loaded = yopo.load(tmp_path, model_class=OwnForCausalLM)
    assert type(loaded) is OwnForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    for wrong in (torch.nn.Linear, "OwnForCausalLM"):
        with pytest.raises(InvalidArgumentError, match="`model_class` must be a PreTrainedModel"):
            yopo.load(tmp_path, model_class=wrong)


def test_code_that_comes_with_a_model_is_refused_without_a_question(
    tiny_llama, tmp_path, monkeypatch
):
    tiny_llama().save_pretrained(tmp_path)
    change_config(tmp_path, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (tmp_path / "own.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    told = (
        r"contains custom code.*load it yourself.*`PolicyPruner\(\)\.fit\(model\)\.prune\(model\)`"
    )
    with pytest.raises(InvalidArgumentError, match=told):
        yopo.load(tmp_path)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    "text", [None, b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"]
)
def test_weights_that_are_cut_short_or_no_weights_are_told(tiny_llama, tmp_path, is_cut, text):
    model = unevenly_cut(tiny_llama()) if is_cut else tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-4] if text is None else text)
    with pytest.raises(
        InvalidArgumentError, match=rf"{file.name}` is (cut short|damaged).* again\."
    ):
        yopo.load(tmp_path)


@pytest.mark.parametrize("widths", [{"model.layers.7.mlp": 8}, {"model.layers.0.mlp": 800}, [3]])
def test_widths_that_do_not_fit_the_model_are_told(tiny_llama, tmp_path, widths):
    tiny_llama().save_pretrained(tmp_path)
    change_config(tmp_path, yopo_widths=widths)
    with pytest.raises(InvalidArgumentError, match=r"`yopo_widths` in the config of .* do not fit"):
        yopo.load(tmp_path)
