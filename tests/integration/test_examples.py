import runpy
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))

TOLD = {
    "compile": ["width 272, 4 layers, 1 compiled"],
    "convert_to_gguf": ["`intermediate_size` in the config: 256, in the tensors: {256}"],
    "push_to_hub": ["bytes  model.safetensors", "Nothing was uploaded."],
    "quantise": [
        "width 256, weights of type Int8Tensor",
        "width 256, weights of type Int4OpaqueTensor",
        "saved and loaded: equal logits: True",
        "width 272, groups of 32, int4 as above: no error, and down_proj are not quantised",
        "width 268, groups of 32, int4 as above: RuntimeError: ",
        "AssertionError: Expecting input size at 1 dimension: 268 to be divisible by block_size",
    ],
    "sparsify": ["50% zeros in each of 28 matrices"],
}
"""What an example has to print, where that says more than that it came to its end."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
# What the libraries beside yopo that examples show say of themselves:
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_the_example_runs(path, monkeypatch, capsys):
    if path.stem == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr("sys.argv", [str(path)])
    with suppress(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr().out
    assert told
    for line in TOLD.get(path.stem, []):
        assert line in told
