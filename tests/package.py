"""Try yopo where a plain `pip install` has put it: `python tests/package.py`.

It must run with what is installed beside it, without any extra, and tell how to get one.
"""

import importlib.metadata
import importlib.util
import sys
import tempfile
from pathlib import Path

import yopo
from yopo.embedded import model_path

EXTRAS = "matplotlib lm_eval datasets peft accelerate".split()


def main():
    """Prune the model that travels with yopo, save and load it, and ask for what is not there."""
    place = Path(yopo.__file__).parent
    assert "site-packages" in place.parts, f"this is the source tree: {place}"
    assert (place / "py.typed").is_file()
    assert yopo.__version__ == importlib.metadata.version("yopo-prune")
    brought = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not brought, f"a plain install brings {brought}"
    model = yopo.load(model_path())
    yopo.PolicyPruner.lean().fit(model).prune(model, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert yopo.load(folder).config.intermediate_size == 272
    told = ""
    try:
        yopo.recover(model, teacher=yopo.load(model_path()))
    except yopo.YopoError as error:
        told = str(error)
    assert 'pip install "yopo-prune[recover]"' in told, "recovery without peft was not refused"
    print(f"yopo-prune {yopo.__version__} works from {place}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
