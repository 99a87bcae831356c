import pytest

from conftest import files_in
from yopo.card import base_name, front_matter, loading_code, read_metadata, set_aside


def test_a_base_is_called_by_its_name_on_the_hub_or_its_folder(tmp_path, monkeypatch):
    (tmp_path / "deep" / "my model").mkdir(parents=True)
    assert base_name(tmp_path / "deep" / "my model") == "my model"
    monkeypatch.chdir(tmp_path / "deep" / "my model")
    assert base_name(".") == "my model"
    assert base_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"
    assert base_name("") == ""


@pytest.mark.parametrize(
    ("folder", "name"),
    [("models--meta-llama--Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"), ("models--gpt2", "gpt2")],
)
def test_a_folder_in_the_cache_of_the_hub_is_called_as_on_the_hub(tmp_path, folder, name):
    snapshot = tmp_path / folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert base_name(snapshot) == base_name(f"{snapshot}/") == name


def test_licence_languages_and_task_are_taken_over(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n"
        "pipeline_tag: text-generation\nbase_model: somebody/else\ntags: [a]\ndatasets: [b]\n---\n"
    )
    assert read_metadata(tmp_path) == {
        "license": "other",
        "license_name": "llama2",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
    }


@pytest.mark.parametrize(
    "text", ["# no metadata\n", "---\nlicense: [1, 2]\n---\n", "---\n---\n", ""]
)
def test_a_card_that_says_nothing_says_nothing(tmp_path, text, caplog):
    (tmp_path / "README.md").write_text(text)
    assert read_metadata(tmp_path) == {}
    assert caplog.records == []


@pytest.mark.parametrize("content", [b"---\na: [b\n---\n", b"---\n- a\n---\n", b"\xff\xfe\x00"])
def test_a_damaged_card_is_told_and_keeps_nobody_from_pruning(tmp_path, content, caplog):
    (tmp_path / "README.md").write_bytes(content)
    assert read_metadata(tmp_path) == {}
    assert "its licence is not taken over" in caplog.text


@pytest.mark.parametrize("source", ["", "nobody/nothing", "no name / at all", "/no/such/folder"])
def test_where_there_is_no_card_nothing_is_looked_up_on_the_network(source, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    assert read_metadata(source) == {}


def test_the_front_of_a_card_is_yaml_whatever_the_names():
    import yaml

    fields = {"base_model": "a: [b\n---\n", "license": "", "tags": ["yopo", "pruned"], "x": None}
    text = front_matter(fields)
    assert text.startswith("---\n")
    assert text.endswith("\n---")
    found = yaml.safe_load(text.removeprefix("---\n").removesuffix("\n---"))
    assert found == {"base_model": "a: [b\n---\n", "tags": ["yopo", "pruned"]}


@pytest.mark.parametrize(
    ("model_class", "needs_yopo", "line"),
    [
        ("LlamaForCausalLM", False, "model = AutoModelForCausalLM.from_pretrained("),
        ("GPT2LMHeadModel", False, "model = AutoModelForCausalLM.from_pretrained("),
        (
            "T5ForConditionalGeneration",
            False,
            "model = T5ForConditionalGeneration.from_pretrained(",
        ),
        ("LlamaForCausalLM", True, 'model = yopo.load("path/to/this/folder", dtype='),
        ("OwnModel", True, 'yopo.load("path/to/this/folder", model_class=OwnModel, dtype='),
    ],
)
def test_the_card_says_how_to_load(model_class, needs_yopo, line):
    code = loading_code(model_class, needs_yopo=needs_yopo)
    assert line in code
    compile(code, "card", "exec")


def test_what_makes_room_keeps_its_order(tmp_path):
    for text in ("first", "second", "third"):
        (tmp_path / "README.md").write_text(text)
        set_aside(tmp_path / "README.md")
    assert files_in(tmp_path) == {
        "README.dense.md": b"third",
        "README.dense.2.md": b"second",
        "README.dense.3.md": b"first",
    }
    set_aside(tmp_path / "README.md")  # which is not there
    assert len(files_in(tmp_path)) == 3
    (tmp_path / "report").mkdir()
    set_aside(tmp_path / "report")
    assert (tmp_path / "report.dense").is_dir()
