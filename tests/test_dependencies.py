"""What is declared is what is imported: all of it, and nothing else."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
NOT_IMPORTED = {
    "accelerate": "transformers places a model on its device with it",
    "flash-linear-attention": "transformers calls its kernels",
    "einops": "flash-linear-attention imports it",
}
"""Libraries that are declared and not imported, with the reason."""
NOT_DECLARED = {
    "triton": "a torch with CUDA brings the one that it was built with; without it, plain PyTorch computes"
}
"""Libraries that are imported and not declared, with the reason."""


def names(requirements):
    return {canonicalize_name(Requirement(one).name) for one in requirements}


DECLARED = names(PROJECT["dependencies"])
EXTRAS = {name: names(needs) for name, needs in PROJECT["optional-dependencies"].items()}


def imported(folder):
    """The packages that a folder's modules import, and the modules that do."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                modules = [one.value for one in node.args if isinstance(one, ast.Constant)]
            for module in modules:
                top = module.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in ("qwen_lit", "tests"):
                    found.setdefault(top, set()).add(str(path))
    return found


def distributions(module):
    """The names under which a module can be installed; its own where it is not."""
    return {canonicalize_name(one) for one in packages_distributions().get(module, [module])}


USED = imported("qwen_lit")
OURS = DECLARED | EXTRAS["gguf"] | EXTRAS["modelscope"] | EXTRAS["fla"] | EXTRAS["studio"]


def test_every_library_that_is_imported_is_declared():
    undeclared = {
        module: sorted(files)
        for module, files in USED.items()
        if not distributions(module) & OURS and module not in NOT_DECLARED
    }
    assert not undeclared
    assert NOT_DECLARED.keys() <= USED.keys() and not NOT_DECLARED.keys() & OURS, "a reason for nothing"


def test_every_library_that_is_declared_is_imported():
    used = {one for module in USED for one in distributions(module)}
    assert sorted(OURS - used) == sorted(NOT_IMPORTED)


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_declared_library_is_pinned_for_a_fresh_machine(extra):
    text = Path("constraints.txt").read_text("utf-8")
    pinned = {canonicalize_name(line.partition("==")[0]) for line in text.splitlines() if line.strip()}
    assert sorted((DECLARED | EXTRAS[extra]) - pinned - NOT_DECLARED.keys()) == []
