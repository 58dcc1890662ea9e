"""The map in DESIGN sec. 2 and 7, held to by reading the code as text; and each rule is seen to bite."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a layer may import besides itself. The longest name that fits a module is its layer.
BASICS = ("ldm", "ldm.names", "ldm.types")
LAYERS: dict[str, tuple[str, ...]] = {
    "ldm": (),
    "ldm.names": (),
    "ldm.config": (),
    "ldm.types": (),
    "ldm.images": BASICS,
    "data_pipeline": (),
    "ldm.nn": BASICS,
    "ldm.models": (*BASICS, "ldm.nn"),
    "ldm.diffusion": BASICS,
    "ldm.checkpoints": (*BASICS, "ldm.nn", "ldm.models"),
    "ldm.adapters": (*BASICS, "ldm.nn", "ldm.models", "ldm.diffusion", "ldm.checkpoints"),
    "ldm.prompts": (*BASICS, "ldm.models"),
    "ldm.pipeline": (
        *BASICS, "ldm.images", "ldm.nn", "ldm.models", "ldm.diffusion", "ldm.checkpoints", "ldm.adapters",
        "ldm.prompts",
    ),
    "ldm.evaluation": (*BASICS, "ldm.images", "ldm.diffusion", "ldm.pipeline", "data_pipeline"),
    "ldm.training": (
        *BASICS, "ldm.images", "ldm.nn", "ldm.models", "ldm.diffusion", "ldm.checkpoints", "ldm.adapters",
        "ldm.prompts", "ldm.pipeline", "ldm.evaluation", "data_pipeline",
    ),
    "ldm.training.run": (
        *BASICS, "ldm.config", "ldm.nn", "ldm.checkpoints", "ldm.adapters", "ldm.training", "data_pipeline",
    ),
    "ldm.server": (*BASICS, "ldm.images", "ldm.checkpoints", "ldm.adapters", "ldm.prompts", "ldm.pipeline"),
    "ldm.cli": (
        *BASICS, "ldm.config", "ldm.images", "ldm.nn", "ldm.models", "ldm.diffusion", "ldm.checkpoints",
        "ldm.adapters", "ldm.prompts", "ldm.pipeline", "ldm.evaluation", "ldm.training", "ldm.training.run",
        "ldm.server", "data_pipeline",
    ),
    "ldm.__main__": ("ldm.cli",),
}  # fmt: skip

# Who may import what is heavy, optional or replaceable; a name covers everything below it.
HEAVY: dict[str, tuple[str, ...]] = {
    "omegaconf": ("ldm.config",),
    "xformers": ("ldm.nn.attention",),
    "open_clip": ("ldm.models.text", "ldm.models.clip"),
    "torchvision": ("ldm.models.text",),  # to see whether open_clip will find it in working order
    "transformers": ("ldm.models.transformers_text",),
    "tokenizers": ("ldm.models.transformers_text",),
    "accelerate": ("ldm.training.engine", "ldm.training.state", "ldm.training.run"),
    "bitsandbytes": ("ldm.training.optim",),
    "peft": ("ldm.adapters",),
    "safetensors": ("ldm.checkpoints",),
    "typer": ("ldm.cli",),
    "fastapi": ("ldm.server",),
    "fontTools": ("data_pipeline.sources.emoji",),
    "pyarrow": ("data_pipeline.sources.rows", "data_pipeline.fetch_rows"),
    "fsspec": ("data_pipeline.storage",),
    "aiohttp": ("data_pipeline.download", "data_pipeline.fetch"),
    "yarl": ("data_pipeline.addresses", "data_pipeline.download"),
    "ray": ("data_pipeline.executors",),
    "skimage": ("data_pipeline.conditions",),
    "imagehash": ("data_pipeline.duplicates",),
    "faiss": ("data_pipeline.duplicates",),
    "webdataset": (),  # we write and read the format ourselves; the tests check us against it
    "diffusers": (),
}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 60, 7
ONE_PER_OPTION = "a command of the command line has one parameter an option"
EXEMPT = {
    "ldm.training.engine.train": "the one loop is one function, in reading order",
    "ldm.cli.generate.generate": ONE_PER_OPTION,
    "ldm.cli.data.build.build": ONE_PER_OPTION,
    "ldm.cli.evaluate.emoji": ONE_PER_OPTION,
    "ldm.cli.evaluate.shapes": ONE_PER_OPTION,
    "ldm.cli.evaluate.edges": ONE_PER_OPTION,
    "ldm.cli.evaluate.inpainting": ONE_PER_OPTION,
    "ldm.cli.finetune.finetune": ONE_PER_OPTION,
}

FORBIDDEN_CALLS = {"print", "eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
HARMLESS_CALLS = {"logging.getLogger", "re.compile", "TypeVar", "frozenset", "tuple", "range", "dict", "set"}


@dataclass(frozen=True)
class Module:
    """A source file under its import name."""

    name: str
    source: str
    package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def functions(self) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
        """(qualified name, function, whether anything that encloses it is private or a function)."""
        return list(_functions(self.tree, self.name, hidden=False))

    @cached_property
    def imports(self) -> list[str]:
        """Dotted names of everything imported when it runs, inside functions too (not under TYPE_CHECKING)."""
        names: list[str] = []
        for node in _running(self.tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.name}: relative import"
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        return names


def _functions(node: ast.AST, name: str, *, hidden: bool) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            path = f"{name}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield path, child, hidden
            inside = hidden or child.name.startswith("_") or not isinstance(child, ast.ClassDef)
            yield from _functions(child, path, hidden=inside)
        else:
            yield from _functions(child, name, hidden=hidden)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _running(child)


def read_all() -> dict[str, Module]:
    found = {}
    for package in ("ldm", "data_pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(p for p in parts if p != "__init__")
            found[name] = Module(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    return found


Modules = dict[str, Module]


def within(name: str, area: str) -> bool:
    return name == area or name.startswith(f"{area}.")


def layer(name: str) -> str:
    return max(
        (area for area in LAYERS if within(name, area) and (area != "ldm" or name == "ldm")), key=len, default=""
    )


def targets(module: Module, modules: Modules) -> list[str]:
    """The modules of ours that it imports: `from a import b` is a.b where that is a module, else a."""
    ours = [n for n in module.imports if n.split(".")[0] in ("ldm", "data_pipeline")]
    return [n if n in modules else n.rpartition(".")[0] or n for n in ours]


def upward(modules: Modules) -> list[str]:
    wrong = []
    for module in modules.values():
        here = layer(module.name)
        if not here:
            wrong.append(f"{module.name} is in no layer of the table")
            continue
        for target in targets(module, modules):
            there = layer(target)
            if there != here and there not in LAYERS[here]:
                wrong.append(f"{module.name} imports {target}")
    return wrong


def cycles(modules: Modules) -> list[str]:
    """Depth first; a package's `__init__` that its own modules import is a cycle only if it imports them."""
    graph = {name: sorted(set(targets(m, modules)) - {name}) for name, m in modules.items()}
    done: set[str] = set()
    found = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            loop = path[path.index(name) :]
            first = loop.index(min(loop))
            found.append(" -> ".join([*loop[first:], *loop[:first], loop[first]]))
        elif name not in done:
            for target in graph.get(name, []):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def heavy(modules: Modules) -> list[str]:
    return [
        f"{module.name} imports {name}"
        for module in modules.values()
        for name in module.imports
        if (top := name.split(".")[0]) in HEAVY and not any(within(module.name, area) for area in HEAVY[top])
    ]


def top_level(modules: Modules) -> list[str]:
    """Definitions, imports, docstrings, constants; calls only where they do nothing but make a value."""
    wrong = []
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                continue
            if isinstance(node, ast.Assign | ast.AnnAssign):
                calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
                bad = [c for c in calls if c not in HARMLESS_CALLS and not c.startswith("typer.")]
                wrong += [f"{module.name}:{node.lineno} calls {c} when imported" for c in bad]
                continue
            wrong.append(f"{module.name}:{node.lineno} runs {ast.unparse(node).splitlines()[0]} when imported")
    return wrong


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p for i, p in enumerate(every) if not (i == 0 and p.arg in ("self", "cls"))]


def too_big(modules: Modules) -> list[str]:
    wrong = []
    for module in modules.values():
        lines = len(module.source.splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{module.name} has {lines} lines")
        for name, function, _ in module.functions:
            lines, count = function.end_lineno - function.lineno + 1, len(parameters(function))
            if name in EXEMPT:
                continue
            if lines > MAX_FUNCTION_LINES:
                wrong.append(f"{name} has {lines} lines")
            if count > MAX_PARAMETERS:
                wrong.append(f"{name} has {count} parameters")
    return wrong


def forbidden(modules: Modules) -> list[str]:
    wrong = []
    for module in modules.values():
        imports = [n for n in module.imports if n != "pickle.UnpicklingError"]  # an error's name does nothing
        wrong += [f"{module.name} imports {n}" for n in imports if n.split(".")[0] in FORBIDDEN_IMPORTS]
        for call in (n for n in ast.walk(module.tree) if isinstance(n, ast.Call)):
            told = {k.arg: ast.unparse(k.value) for k in call.keywords}
            risky = told.get("shell", "False") != "False" or told.get("allow_pickle", "False") != "False"
            restricted = ast.unparse(call.func) == "torch.load" and told.get("weights_only") == "True"
            if (ast.unparse(call.func) in FORBIDDEN_CALLS and not restricted) or risky:
                wrong.append(f"{module.name}:{call.lineno} {ast.unparse(call)}")
    return wrong


def unexplained(modules: Modules) -> list[str]:
    """Public modules, classes and functions say what they are; methods may inherit that."""
    wrong = []
    for module in modules.values():
        if not ast.get_docstring(module.tree):
            wrong.append(f"{module.name} has no docstring")
        for node in module.tree.body:
            known = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if known and not node.name.startswith("_") and not ast.get_docstring(node):
                wrong.append(f"{module.name}.{node.name} has no docstring")
    return wrong


def untyped(modules: Modules) -> list[str]:
    wrong = []
    for module in modules.values():
        for name, function, hidden in module.functions:
            dunder = function.name.startswith("__") and function.name.endswith("__")
            if hidden or (function.name.startswith("_") and not dunder):
                continue
            bare = [p.arg for p in parameters(function) if p.annotation is None]
            wrong += [f"{name}: {p} has no type" for p in bare]
            wrong += [] if function.returns else [f"{name}: no return type"]
    return wrong


# rule, where a defect is planted, the defect, what must be said about it
PLANTED: list[tuple[Callable[[Modules], list[str]], str, str, str]] = [
    (upward, "ldm.nn.planted", "from ldm.models.unet import UNet", "ldm.nn.planted imports ldm.models.unet"),
    (upward, "ldm.models.planted", "import ldm.diffusion.noise", "imports ldm.diffusion.noise"),
    (upward, "ldm.diffusion.planted", "def f():\n    from ldm.nn import attention", "imports ldm.nn.attention"),
    (upward, "data_pipeline.planted", "from ldm import types", "imports ldm.types"),
    (upward, "data_pipeline.planted", "import ldm", "imports ldm"),
    (upward, "ldm.training.planted", "from ldm.config import load_config", "imports ldm.config"),
    (upward, "ldm.training.planted", "from ldm.training.run import run", "imports ldm.training.run"),
    (upward, "ldm.pipeline", "import ldm.evaluation.report", "ldm.pipeline imports ldm.evaluation.report"),
    (upward, "ldm.names", "from ldm.cli.main import main", "ldm.names imports ldm.cli.main"),
    (upward, "ldm.strange.planted", "", "ldm.strange.planted is in no layer"),
    (cycles, "ldm.nn.attention", "from ldm.nn.blocks import Attention", "ldm.nn.attention -> ldm.nn.blocks -> ldm.nn."),
    (cycles, "data_pipeline.images", "from data_pipeline.sources import folder", "data_pipeline.images -> data_pip"),
    (heavy, "ldm.training.planted", "from omegaconf import OmegaConf", "imports omegaconf.OmegaConf"),
    (heavy, "ldm.models.unet", "def f():\n    import xformers.ops", "ldm.models.unet imports xformers.ops"),
    (heavy, "data_pipeline.planted", "import webdataset as wds", "imports webdataset"),
    (top_level, "ldm.planted", "for i in range(3):\n    pass", "ldm.planted:1 runs for i in range(3):"),
    (top_level, "ldm.planted", "import torch\nX = torch.zeros(3)", "ldm.planted:2 calls torch.zeros"),
    (top_level, "ldm.planted", "import os\nos.environ['A'] = b()", "ldm.planted:2 calls b"),
    (top_level, "ldm.planted", "import torch\ntorch.set_num_threads(1)", "ldm.planted:2 runs torch.set_num"),
    (too_big, "ldm.planted", "\n" * 351, "ldm.planted has 351 lines"),
    (too_big, "ldm.planted", "def f() -> None:\n" + "    pass\n" * 60, "ldm.planted.f has 61 lines"),
    (too_big, "ldm.planted", "class C:\n    def f(self, a, b, c, d, *, e, f, g, h): ...", "C.f has 8 parameters"),
    (forbidden, "ldm.planted", "def f():\n    print('here')", "ldm.planted:2 print('here')"),
    (forbidden, "ldm.planted", "x = lambda s: eval(s)", "eval(s)"),
    (forbidden, "data_pipeline.planted", "def f():\n    import pickle", "imports pickle"),
    (forbidden, "ldm.planted", "from pickle import loads", "imports pickle.loads"),
    (forbidden, "ldm.planted", "def f(p): return torch.load(p)", "torch.load(p)"),
    (forbidden, "ldm.planted", "def f(p): return yaml.load(p, yaml.Loader)", "yaml.load(p, yaml.Loader)"),
    (forbidden, "ldm.planted", "def f(p): subprocess.run(p, shell=True)", "shell=True"),
    (forbidden, "ldm.planted", "def f(p): return np.load(p, allow_pickle=True)", "allow_pickle=True"),
    (unexplained, "ldm.planted", "x = 1", "ldm.planted has no docstring"),
    (unexplained, "ldm.planted", "'''Here.'''\nclass C: ...", "ldm.planted.C has no docstring"),
    (unexplained, "ldm.planted", "'''Here.'''\ndef f() -> None: ...", "ldm.planted.f has no docstring"),
    (untyped, "ldm.planted", "def f(a: int, *b) -> None: ...", "ldm.planted.f: b has no type"),
    (untyped, "ldm.planted", "class C:\n    def __call__(self, a: int): ...", "C.__call__: no return type"),
]
RULES = list(dict.fromkeys(rule for rule, *_ in PLANTED))


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_the_rule(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(read_all()) == []


@pytest.mark.parametrize(("rule", "name", "source", "said"), PLANTED)
def test_the_rule_notices_a_defect(rule: Callable[[Modules], list[str]], name: str, source: str, said: str) -> None:
    modules = read_all()
    before = rule(modules)
    old = modules[name].source + "\n" if name in modules else ""
    modules[name] = Module(name, old + source)
    assert [line for line in rule(modules) if line not in before and said in line], rule(modules)


def test_every_exemption_is_needed_and_explained() -> None:
    functions = {name: f for m in read_all().values() for name, f, _ in m.functions}
    for name, reason in EXEMPT.items():
        function = functions[name]
        big = function.end_lineno - function.lineno + 1 > MAX_FUNCTION_LINES
        assert (big or len(parameters(function)) > MAX_PARAMETERS) and len(reason) > 20, name


BLOCKED = ("torchvision", "open_clip", "xformers", "bitsandbytes", "transformers")
IMPORT_ALL = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("fine")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_module_imports_without_the_optional_packages() -> None:
    names = [n for n in read_all() if n != "ldm.__main__"]
    result = python("-c", IMPORT_ALL, *names)
    assert result.stdout == "fine\n", result.stderr[-2000:]
    blocked = python("-c", IMPORT_ALL, "open_clip")  # the block itself works
    assert "blocked: open_clip" in blocked.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['ldm', '--help']; from ldm.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('HEAVY', sorted({'torch', 'accelerate', 'omegaconf', 'numpy'} & set(sys.modules)))"
    )
    result = python("-c", code)
    assert "train" in result.stdout and "generate" in result.stdout, result.stderr[-2000:]
    loaded = result.stdout.rpartition("HEAVY ")[2]
    assert "torch" not in loaded and "accelerate" not in loaded
