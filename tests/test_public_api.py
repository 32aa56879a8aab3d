"""Every public name is documented and typed, and imports point one way."""

import ast
import dataclasses
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

import gspo_ops

PACKAGE = Path(gspo_ops.__file__).resolve().parent
PUBLIC = {name: getattr(gspo_ops, name) for name in gspo_ops.__all__}
FUNCTIONS = [name for name, x in PUBLIC.items() if inspect.isfunction(x)]
CLASSES = [name for name, x in PUBLIC.items() if inspect.isclass(x)]


def sections(doc):
    """Return the sections of a Google-style docstring: their items by name, as name to text."""
    found = {}
    for block in re.split(r"\n\n+", inspect.cleandoc(doc)):
        heading, _, body = block.partition("\n")
        if re.fullmatch(r"(Args|Returns|Raises|Attributes):", heading):
            # continuation lines are indented further than their item
            joined = re.sub(r"\n {5,}", " ", body)
            pairs = (line.strip().partition(":") for line in joined.splitlines())
            found[heading[:-1]] = {
                name.strip(): text.strip() for names, _, text in pairs for name in names.split(",")
            }
    return found


def test_all_is_complete():
    assert len(PUBLIC) == len(gspo_ops.__all__)
    public = {
        name
        for name, x in vars(gspo_ops).items()
        if not name.startswith("_") and not isinstance(x, ModuleType)
    }
    assert public <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_has_docstring(name):
    assert inspect.getdoc(PUBLIC[name])
    assert PUBLIC[name].__doc__, "an inherited docstring says nothing about this name"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_documents_every_parameter(name):
    function = PUBLIC[name]
    parameters = inspect.signature(function).parameters
    found = sections(function.__doc__)
    assert set(found) >= {"Args", "Returns", "Raises"}
    assert set(found["Args"]) == set(parameters)
    assert all(found["Args"].values())
    assert set(get_type_hints(function)) == {*parameters, "return"}


@pytest.mark.parametrize("name", CLASSES)
def test_class_documents_every_field(name):
    cls = PUBLIC[name]
    if dataclasses.is_dataclass(cls):
        fields = {field.name for field in dataclasses.fields(cls)}
        assert cls.__dataclass_params__.frozen
    else:
        fields = set(cls._fields)
    documented = {}
    for base in cls.__mro__:
        found = sections(base.__doc__ or "")
        documented |= found.get("Args", {}) | found.get("Attributes", {})
    assert fields <= set(documented)
    assert all(documented[field] for field in fields)
    assert fields <= set(get_type_hints(cls))


NOT_OPS = {
    "global_denominator", "group_advantages", "importance_weights", "off_policy_weights",
    "plan_from_hidden", "top_entropy_weights",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NOT_OPS])
def test_reference_defines_every_op(name):
    definition = getattr(gspo_ops.reference, name)
    assert definition.__doc__
    parameters = inspect.signature(definition).parameters
    named = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    assert named == [n for n in inspect.signature(PUBLIC[name]).parameters if n in named]


# Imports

# a module imports from its own layer and those below it
LAYERS = [
    {"cli"},
    {"benchmarks"},
    {"trainer"},
    {"integrations"},
    {"testing", "environment"},
    {"gspo_ops"},  # the package itself
    {"log_probs", "losses", "reference", "advantages", "weights"},  # public functions
    {"chunks", "custom", "hidden", "logits"},  # sources
    {"autograd", "passes", "plan"},  # the seam; passes over tiles
    {
        "policy_loss",
        "logits_cpu",
        "policy_cpu",
        "tiles_gpu",
        "tiles_tma",
        "tiles_torch",
    },  # implementations
    {"policy", "tiles", "rows", "head", "softmax"},  # records
    {"parallel", "layout", "objective", "checks", "operators", "backend", "threads"},  # tools
    {"kernels"},
    {"constants"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LINKS = ("kernels", "benchmarks")  # to folders at the top level
SOURCES = sorted(
    path
    for path in [
        *PACKAGE.rglob("*.py"),
        *(p for link in LINKS for p in (PACKAGE / link).glob("*.py")),
    ]
    if "__pycache__" not in path.parts
)


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module):
    """Return the file or folder of the package to which a module belongs."""
    parts = module.split(".")
    return parts[min(1, len(parts) - 1)]


MODULES = {module_name(path): path for path in SOURCES}


def imports(module):
    """Return the full names of the modules that a module imports, wherever in its code."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = names & set(MODULES)
            found |= submodules
            if submodules != names:
                found.add(base)
    return found


def is_ours(module):
    return module == "gspo_ops" or module.startswith("gspo_ops.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    assert unit(module) in LEVEL, f"{unit(module)} needs a layer"
    for imported in filter(is_ours, imports(module)):
        assert LEVEL[unit(imported)] >= LEVEL[unit(module)], f"{module} imports {imported}"


def test_imports_have_no_cycle():
    graph = {module: imports(module) & set(MODULES) - {module} for module in MODULES}
    while leaves := [module for module, below in graph.items() if not below & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph


def test_reference_imports_only_definitions():
    others = {m for m in imports("gspo_ops.reference") if m.split(".")[0] not in STDLIB}
    ours = {f"gspo_ops.{name}" for name in ("constants", "head", "objective")}
    assert others <= {"torch", *ours}


STDLIB = set(sys.stdlib_module_names)
KERNELS = [module for module in MODULES if module.startswith("gspo_ops.kernels.")]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_triton_and_each_other(module):
    for imported in imports(module):
        assert imported.split(".")[0] == "triton" or imported in [*KERNELS, "gspo_ops.constants"]
    tree = ast.parse(MODULES[module].read_text())
    absolute = [node.module for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.level == 0]  # fmt: skip
    assert not any(map(is_ours, absolute)), "imports among kernels are relative"


@pytest.mark.parametrize("module", KERNELS)
def test_kernel_and_op_share_a_name(module):
    stem = module.rpartition(".")[2].removesuffix("_tma")
    assert stem == "common" or f"gspo_ops.{stem}" in MODULES


def test_everything_is_walked():
    assert {"gspo_ops.kernels.logits", "gspo_ops.reference", "gspo_ops"} <= set(MODULES)


# What an import does to others

PATCHES = """
import sys, warnings
import torch, triton, triton.language

def attributes():
    \"\"\"Of every module of torch and triton, and of the classes in them.\"\"\"
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("torch", "triton"):
            found[name] = dict(vars(module))
            for x in found[name].values():
                if isinstance(x, type):
                    found[f"{x.__module__}.{x.__qualname__}"] = dict(vars(x))
    return found

warnings.simplefilter("ignore")  # some modules warn of their own attributes
before, nothing = attributes(), object()
import gspo_ops
after = attributes()
print([
    f"{owner}.{name}" for owner, of in before.items() for name in of.keys() | after[owner].keys()
    if of.get(name, nothing) is not after[owner].get(name, nothing)
])
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return ast.literal_eval(done.stdout.decode())


def test_nothing_is_patched():
    assert python(PATCHES) == ["torch.ops.gspo_ops"], "only the namespace of our ops may be new"


def test_the_patch_check_sees_patches():
    patch = "torch.Tensor.exp = triton.cdiv = torch.nn.functional.linear = lambda *_: None"
    seen = python(PATCHES.replace("import gspo_ops", f"import gspo_ops; {patch}"))
    assert {"torch.Tensor.exp", "triton.cdiv", "torch.nn.functional.linear"} <= set(seen)


def test_import_takes_little_beside_that_of_torch_and_triton():
    """The import adds at most 15% CPU time in the best of some runs, as a machine may be busy."""
    code = (
        "import time, torch, triton; bare = time.process_time(); "
        "import gspo_ops; print(time.process_time() / bare)"
    )
    shares = []
    while len(shares) < 8 and min(shares, default=math.inf) > 1.15:
        shares.append(python(code))
    assert min(shares) <= 1.15, shares
