"""The rooms of the package: what each may import of the others, read from the source."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mm4ke_plugins"

# A room is a package or a module at the top; it may import itself, `errors`, and these.
MAY_IMPORT = {
    "errors": (),
    "storage": (),
    "merging": ("storage",),
    "delta": ("merging", "storage"),
    "knowedit": ("storage",),
    "rsft": ("merging", "storage", "knowedit.prompts"),
    "sweep": ("delta", "merging", "knowedit", "rsft.layers", "report.figures", "storage"),
    "comparison": ("knowedit", "report.markdown", "storage"),
    "general": ("knowedit.answers", "storage"),
    "report": ("knowedit", "storage"),
    "study": (
        "hosts",
        "hosts.easyedit",
        "hosts.llamafactory.templates",
        "knowedit",
        "report",
        "storage",
    ),
    "default_model": ("storage",),
    "edit": ("hosts", "hosts.llamafactory.templates", "knowedit", "rsft.layers", "storage"),
    "hosts": (),
    "hosts.llamafactory": ("hosts", "delta", "knowedit", "merging", "rsft", "storage"),
    "hosts.mergekit": ("hosts", "delta", "merging", "storage"),
    "hosts.lm_eval": ("hosts", "delta", "merging", "knowedit", "storage"),
    "hosts.easyedit": ("hosts", "delta", "knowedit", "merging", "rsft", "report.markdown", "storage"),
    "activation": ("hosts",),
    "doctor": ("hosts", "activation"),
}
# The command calls all of them.
FREE = ("cli", "")


def room_of(module: str) -> str:
    parts = module.split(".")
    is_host = parts[0] == "hosts" and len(parts) > 1 and (PACKAGE / "hosts" / parts[1]).is_dir()
    return ".".join(parts[:2]) if is_host else parts[0]


def modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path) -> set[str]:
    """The modules of this package that a module imports, wherever in it."""
    known = modules()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [part for part in package[: len(package) - node.level + 1] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                name = ".".join([*base, alias.name])
                found.add(name if name in known else ".".join(base))
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE.name:
            found.add(".".join(node.module.split(".")[1:]))
    return found - {""}


@pytest.mark.parametrize("module", [name for name in modules() if name not in FREE])
def test_a_module_imports_only_what_its_room_may(module):
    room = room_of(module)
    assert room in MAY_IMPORT, f"{room} is a new room: say here what it may import"
    allowed = (room, "errors", *MAY_IMPORT[room])
    others = {
        other
        for other in imports(module, modules()[module])
        if not any(room_of(other) == name or other == name or other.startswith(f"{name}.") for name in allowed)
    }
    assert not others, f"{room} must not import {', '.join(sorted(others))}"


def test_no_test_module_imports_another():
    """What several need is a fixture of conftest.py or a module of helpers."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("test_") for name in names), f"{path.name}: line {node.lineno}"


def test_no_module_is_longer_than_what_one_reads_in_a_sitting():
    longest = max(modules().values(), key=lambda path: path.read_text(encoding="utf-8").count("\n"))
    assert longest.read_text(encoding="utf-8").count("\n") <= 550, longest
