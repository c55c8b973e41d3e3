"""The shape of the package: what may import what, and what its names promise."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

import keras_squeeze as ks

PACKAGE = pathlib.Path(ks.__file__).parent
NAME = PACKAGE.name

# Data flows down this list. A module imports only what stands above it; what is in a folder stands together.
ORDER = [
    "checks",
    "configurable",
    "data",
    "schedules",
    "atomic_write",
    "progress",
    "introspection",
    "quantizers",
    "training",
    "channel_graph",
    "analysis",
    "reconstruction",
    "weight_pruning",
    "neuron_pruning",
    "quantization",
    "deployment",
    "evaluation",
    "recipes",
    "search",
    "tfmot_compat",
    "cli",
    "criteria",  # from here on public names, which no other module imports
    "plots",
    "steps",
]
STRANGERS = [("weight_pruning", "quantization"), ("neuron_pruning", "quantization")]  # these never import each other

# Slow to import, or not wanted by everybody: only inside the functions that need them.
HEAVY = {
    "ai_edge_litert",
    "ai_edge_quantizer",
    "grpc",
    "keras_tuner",
    "matplotlib",
    "optuna",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "tensorflow",
    "tensorflow_model_optimization",
    "tf_keras",
    "yaml",
}

# What derives from Keras Tuner's classes cannot wait; the package imports it only when it is asked for.
DERIVED = {("search", name) for name in ("alive", "chief", "hypermodel", "oracle", "resuming", "tuner")}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TREES = {path.relative_to(PACKAGE).with_suffix("").parts: ast.parse(path.read_text()) for path in FILES}


def imports(tree):
    """Dotted names of what a tree imports; `from a import b` gives `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module):
    """The part after `keras_squeeze.` of what a module imports from its own package."""
    parts = (name.split(".") for name in imports(TREES[module]))
    return {tuple(part[1:]) or ("__init__",) for part in parts if part[0] == NAME}


class AtImport(ast.NodeTransformer):
    """Leaves out what does not run when a module is imported."""

    def visit_FunctionDef(self, node):
        return None

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


@pytest.mark.parametrize("module", TREES, ids="/".join)
def test_imports_point_down_the_list(module):
    place = ORDER.index(module[0])
    for imported in own_imports(module):
        assert imported[0] in ORDER[: place + 1], f"{'.'.join(module)} imports {'.'.join(imported)}"
        assert imported[0] != module[0] or len(module) > 1, f"{module[0]} imports itself"


@pytest.mark.parametrize("folder", sorted({module[0] for module in TREES if len(module) > 1}))
def test_no_circles_inside_a_folder(folder):
    inside = {module for module in TREES if module[0] == folder}
    graph = {
        module: {other for other in inside for name in own_imports(module) if name[: len(other)] == other}
        for module in inside
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_strangers_do_not_import_each_other(one, other):
    for module in TREES:
        for mine, theirs in ((one, other), (other, one)):
            assert module[0] != mine or all(name[0] != theirs for name in own_imports(module)), module


@pytest.mark.parametrize("module", TREES, ids="/".join)
def test_no_private_name_comes_from_another_module(module):
    nodes = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.ImportFrom)]
    own = [node for node in nodes if node.module.partition(".")[0] == NAME]
    assert not [alias.name for node in own for alias in node.names if alias.name.startswith("_")]


def test_folders_are_at_most_one_deep():
    assert max(map(len, TREES)) <= 2


def test_no_module_is_named_for_being_useful():
    assert not {"utils", "util", "helpers", "misc", "common"} & {part for module in TREES for part in module}


@pytest.mark.parametrize("module", [("__init__",), *TREES], ids="/".join)
def test_nothing_heavy_is_imported_with_the_package(module):
    tree = ast.parse((PACKAGE / "__init__.py").read_text()) if module == ("__init__",) else TREES[module]
    at_import = AtImport().visit(ast.parse(ast.unparse(tree)))
    allowed = {"keras_tuner"} if module in DERIVED else set()
    assert not {name.split(".")[0] for name in imports(at_import)} & (HEAVY - allowed)


@pytest.mark.parametrize("module", TREES, ids="/".join)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("name", ks.__all__)
def test_every_public_name_is_there_and_documented(name):
    public = getattr(ks, name)
    assert (public.__doc__ or "").strip()


@pytest.mark.parametrize("name", ["criteria", "plots", "quantizers", "schedules", "steps", "tfmot_compat"])
def test_public_namespaces_can_be_imported_from(name):
    namespace = importlib.import_module(f"{NAME}.{name}")
    assert getattr(ks, name) is namespace
    for public in getattr(namespace, "__all__", ()):
        assert getattr(namespace, public) is not None


@pytest.mark.parametrize("name", ["criteria", "plots", "quantizers", "schedules", "steps"])
def test_public_namespaces_are_there_without_being_imported(name):
    """In another process: here, tests have imported them."""
    program = f"import keras_squeeze; print(keras_squeeze.{name}.__name__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{NAME}.{name}"


def test_public_names_are_listed_once_and_in_order():
    assert sorted(set(ks.__all__)) == list(ks.__all__)
