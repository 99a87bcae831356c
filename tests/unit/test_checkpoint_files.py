import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from conftest import assert_same, build, save, tensors_in
from yopo import InvalidArgumentError, UnsupportedModelError
from yopo.checkpoint_files import INDEX, folder_of, weight_files


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    folder = save(build("llama"), tmp_path / "model", in_shards=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pickle \(`pytorch_model\.bin`\)") as raised:
        weight_files(folder)
    way = re.search(r"`(\w+)\.from_pretrained\('(.*)', dtype='auto'\)", str(raised.value))
    assert way.groups() == ("LlamaForCausalLM", str(folder))
    assert f"save_pretrained('{folder}-safetensors')`" in str(raised.value)
    (folder / "pytorch_model.bin").rename(folder / "consolidated.00.pth")
    (folder / "config.json").unlink()
    told = r"pickle \(`consolidated\.00\.pth`\).*`AutoModelForCausalLM\.from_pretrained\("
    with pytest.raises(UnsupportedModelError, match=told):
        weight_files(folder)


def test_the_way_to_convert_pickles_keeps_every_weight_and_its_dtype(tmp_path):
    model = build("llama", dtype=torch.bfloat16)
    folder = save(model, tmp_path / "model", in_shards=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError) as raised:
        weight_files(folder)
    exec(f"transformers.{str(raised.value).split('`')[-2]}", {"transformers": transformers})
    assert_same(tensors_in(tmp_path / "model-safetensors"), dict(model.named_parameters()))


def test_an_adapter_is_refused_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"holds a PEFT adapter.*merge_and_unload\(\)"):
        weight_files(tmp_path)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    save(build("llama"), tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(InvalidArgumentError, match=f"names `{shard.name}`, which is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 3, "deep/a"])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InvalidArgumentError, match=r"index\.json` names `.*`, which is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"weight_map": 3}', "\x00"])
def test_a_damaged_index_is_told(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"index\.json` is damaged"):
        weight_files(tmp_path)


def test_a_model_on_the_hub_is_downloaded_and_what_is_not_there_is_told(tmp_path, monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        if name != "some/model":
            raise OSError(f"no {name}\nlong story")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folder_of("some/model") == tmp_path
    with pytest.raises(OSError, match=r"^`no/model` is no folder, and no model on the hub: no no/"):
        folder_of("no/model")
    assert asked == ["some/model", "no/model"]


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    def download(name):
        raise LocalEntryNotFoundError("Got: ConnectError: a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        OSError, match=r"^there is no folder `nosuch`, and the hub, .* out of reach"
    ):
        folder_of("nosuch")


def test_a_path_that_is_no_folder_is_told_without_asking_anybody(tmp_path):
    for path in (tmp_path / "none", "./none", "a/b/c", tmp_path / "x" / ".." / "none"):
        with pytest.raises(OSError, match=f"^there is no folder `{re.escape(str(path))}`, and no"):
            folder_of(path)


def test_a_file_is_told_to_be_none_without_asking_anybody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for path in ("model/model.safetensors", Path("file")):
        Path(path).touch()
        with pytest.raises(OSError, match=rf"^`{path}` is a file\. Name the folder that holds"):
            folder_of(path)
