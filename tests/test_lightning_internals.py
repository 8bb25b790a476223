"""Private parts of Lightning are touched in one file, so that a new version of it is read against one file."""

import ast
import importlib
import inspect
from pathlib import Path

import lightning

PACKAGE = Path("qwen_lit")
THE_FILE = PACKAGE / "lightning_internals.py"
OURS = ("self", "cls")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, and attributes that are set."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {name for name in found | {node.attr for node in stored} if private(name)}


def lightning_names() -> set[str]:
    folder = Path(lightning.__file__).parent
    files = [*(folder / "pytorch").rglob("*.py"), *(folder / "fabric").rglob("*.py")]
    return set().union(*(names_of(ast.parse(path.read_text("utf-8"))) for path in files))


def asked_of_others(tree: ast.AST, theirs: set[str]) -> set[str]:
    """Private names of Lightning that are read or set of something else than the object itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in theirs - own
        and not (isinstance(node.value, ast.Name) and node.value.id in OURS)
    }


def asked_of_itself(path: Path, tree: ast.AST) -> set[str]:
    """Private names of Lightning's own classes that a class made from one of them overrides, reads or sets."""
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    found = set()
    for node in (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and hasattr(module, one.name)):
        kind = getattr(module, node.name)
        bases = [one for one in inspect.getmro(kind) if one.__module__.startswith(("lightning", "pytorch_lightning"))]
        sources = [ast.parse(Path(inspect.getfile(one)).read_text("utf-8")) for one in bases]
        theirs = {name for one in bases for name in vars(one) if private(name)}.union(*map(names_of, sources))
        used = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute) and private(one.attr)}
        used |= {one.name for one in node.body if isinstance(one, ast.FunctionDef) and private(one.name)}
        found |= {f"{node.name}.{name}" for name in used & theirs}
    return found


def test_private_parts_of_lightning_are_touched_in_one_file():
    theirs, found = lightning_names(), {}
    assert {"_logger_connector", "_can_stop_early", "_run_subcommand", "_duration"} <= theirs
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        if asked := asked_of_others(tree, theirs) | asked_of_itself(path, tree):
            found[path] = asked
    assert len(found.pop(THE_FILE)) >= 5
    # Goes with the counting of micro-batches, where a batch is an optimizer step.
    assert found.pop(PACKAGE / "callbacks" / "checkpoint.py", {"_should_accumulate"}) == {"_should_accumulate"}
    assert not found, found


def test_the_file_names_the_version_it_was_read_in():
    major, minor = lightning.__version__.split(".")[:2]
    assert f"Lightning {major}.{minor}." in THE_FILE.read_text("utf-8").split('"""')[1]


def test_what_is_asked_of_others_is_seen_and_what_is_its_own_is_not():
    asked = asked_of_others(
        ast.parse("def f(trainer):\n    trainer.fit_loop._data_fetcher = None\n"), {"_data_fetcher"}
    )
    assert asked == {"_data_fetcher"}
    assert not asked_of_others(ast.parse("class A:\n    def f(self):\n        return self._x\n"), {"_x"})
