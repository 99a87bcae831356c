"""How the house is built: who may import whom, and what every module has to keep to."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import yopo

SOURCE = Path(yopo.__file__).parent
MODULES = sorted(file for file in SOURCE.rglob("*.py") if file.name != "__main__.py")

ORDER = (
    "errors generators precision files shards adapters memory parallel ranks damping plan "
    "sampling upkeep surgery loading stored checkpoint_files checkpoint spectrum writing watching "
    "moments imagining evidence elimination allocation budget features scorer restore lean reward "
    "divergence criteria policy decision reinforce published training report evaluation "
    "symbolic speed pages plots calls card pruning_report pruner rewriting staging on_disk "
    "recovery embedded demo cli"
).split()
"""A module may import only those before it."""

HEAVY = "transformers peft lm_eval matplotlib accelerate tokenizers scipy pandas".split()


def name_of(file):
    return str(file.relative_to(SOURCE).with_suffix("")).replace("/", ".").removesuffix(".__init__")


def tree_of(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def floor_of(name):
    return name.partition(".")[0]


def imports_of(tree):
    """Yield the names below `yopo` of every module that is imported, at the top or later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("yopo.") for alias in node.names if "yopo." in alias.name
            )
        elif isinstance(node, ast.ImportFrom) and node.module == "yopo":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("yopo."):
            yield node.module.removeprefix("yopo.")


@pytest.fixture(params=MODULES, ids=name_of)
def module(request):
    return request.param


def test_every_module_has_its_place_in_the_order():
    assert {floor_of(name_of(file)) for file in MODULES} - {"__init__"} == set(ORDER)


def test_imports_go_down_the_order_and_never_up(module):
    floor = floor_of(name_of(module))
    if floor == "__init__":
        return
    for imported in imports_of(tree_of(module)):
        below = ORDER.index(floor_of(imported))
        assert below < ORDER.index(floor) or floor_of(imported) == floor, imported


def test_imports_are_absolute(module):
    assert not any(
        isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree_of(module))
    )


def test_no_module_names_a_kind_of_accelerator(module):
    assert "cuda" not in module.read_text(encoding="utf-8").lower()


def test_the_library_does_not_print(module):
    if name_of(module).startswith("cli") or name_of(module) in ("demo", "embedded.train"):
        return
    assert not any(
        isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree_of(module))
    )


def test_logs_go_to_the_librarys_own_logger_and_nobody_adds_handlers(module):
    text = module.read_text(encoding="utf-8")
    assert "basicConfig" not in text
    assert "addHandler" not in text
    found = set(re.findall(r"get_?logger\(.*?\)", text, re.IGNORECASE))
    assert found <= {"getLogger(__name__)", 'getLogger("lm_eval")'}  # the second is but quietened


def test_the_global_generators_are_not_touched(module):
    """`torch.manual_seed` may stand only inside `torch.random.fork_rng`."""
    if name_of(module) == "embedded.train":
        return
    tree = tree_of(module)
    forked = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(i) for i in node.items)
    ]
    allowed = {id(inside) for node in forked for inside in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not re.fullmatch(r"(np|numpy)\.random\.\w+|random\.seed", ast.unparse(node))
            if ast.unparse(node) in ("torch.manual_seed", "torch.seed", "torch.set_rng_state"):
                assert id(node) in allowed, f"line {node.lineno}"


def test_importing_yopo_imports_nothing_heavy():
    code = f"import sys, yopo; print([name for name in {HEAVY} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    assert told.stderr == ""


def documented():
    """Yield every public name with what it stands for, methods included."""
    for name in yopo.__all__:
        thing = getattr(yopo, name)
        yield name, thing
        if inspect.isclass(thing):
            for key, member in vars(thing).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if inspect.isfunction(function) and not key.startswith("_"):
                    yield f"{name}.{key}", function
    for key, member in vars(yopo.criteria).items():
        if getattr(member, "__module__", "") == "yopo.criteria" and not key.startswith("_"):
            yield f"criteria.{key}", member


@pytest.mark.parametrize("name", dict(documented()))
def test_every_public_name_says_what_it_is(name):
    thing = dict(documented())[name]
    text = inspect.getdoc(thing)
    assert text
    first = text.splitlines()[0]
    assert first.endswith((".", ":")), first
    if inspect.isfunction(thing):
        parameters = [
            p
            for p in inspect.signature(thing).parameters.values()
            if p.name not in ("self", "cls", "other")
        ]
        positional = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
        most = 3 if name == "prune_checkpoint" else 2  # the ratio follows source and target
        assert len(positional) <= most, "what comes later is keyword-only"
        if "Args:" in text:
            told = re.findall(r"^    \**(\w+): ", text.partition("Args:")[2], re.MULTILINE)
            for parameter in parameters:
                assert parameter.name in told
    for error in raises_of(text):
        found = getattr(yopo, error, getattr(builtins, error, None))
        assert issubclass(found, Exception)


MADE_BY = {"missing_extra": "YopoError", "no_gradients": "UnsupportedModelError"}
"""What a function that makes an error returns."""


def raises_of(text):
    section = (text or "").partition("Raises:\n")[2].partition("\n\n")[0]
    return set(re.findall(r"^ {4}(\w+): ", section, re.MULTILINE))


def test_whoever_raises_on_purpose_says_so(module):
    for node in ast.walk(tree_of(module)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        raised = {
            MADE_BY.get(child.exc.func.id, child.exc.func.id)
            for child in ast.walk(node)
            if isinstance(child, ast.Raise)
            and isinstance(child.exc, ast.Call)
            and isinstance(child.exc.func, ast.Name)
        }
        told = raises_of(inspect.cleandoc(ast.get_docstring(node) or ""))
        assert raised <= told, f"{node.name} raises {raised - told}"


def test_every_error_is_one_of_ours_and_a_builtin():
    for name in yopo.__all__:
        thing = getattr(yopo, name)
        if inspect.isclass(thing) and issubclass(thing, Exception) and thing is not yopo.YopoError:
            assert issubclass(thing, yopo.YopoError)
            assert issubclass(thing, ValueError | RuntimeError)
