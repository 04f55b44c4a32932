"""The shape of the package: direction of imports, lazy imports, sizes, documented names, paths in documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "moesaic"
FILES = sorted(SRC.rglob("*.py"))

# A layer may import from its own and from earlier ones.
LAYERS = (
    ("errors", "interpreter", "hardware"),
    ("launcher",),
    ("launch",),
    ("activations", "formats"),
    ("guards",),
    ("op",),
    ("routing",),
    ("ops",),
    ("flops",),
    ("cases",),
    ("testing",),
    ("parallel",),
    ("nn",),
    ("integrations", "compat", "bench", "diagnose"),
    ("tuning",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
HEAVY = ("triton", "transformers", "matplotlib", "typer", "rich", "safetensors", "hypothesis", "pytest")


def imports(path: Path, top_level_only: bool = False, root: Path = SRC.parent):
    """Absolute dotted names that a file imports, also inside functions and by string."""
    package = path.parent.relative_to(root).parts
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                stem = ".".join((*base, *([node.module] if node.module else [])))
                yield from (f"{stem}.{alias.name}" for alias in node.names)
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in (
            getattr(node.func, "attr", ""),
            getattr(node.func, "id", ""),
        ):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                ups = len(name.value) - len(name.value.lstrip("."))
                base = package[: len(package) - ups + 1] if ups else ()
                yield ".".join((*base, name.value.lstrip(".")))


def test_imports_by_string_are_seen(tmp_path):
    lines = ("import importlib", "def f():", "    importlib.import_module('moesaic.cli.app')",
             "    importlib.import_module('..permute._torch', __package__)")  # fmt: skip
    path = tmp_path / "moesaic" / "ops" / "route" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    assert list(imports(path, root=tmp_path)) == ["importlib", "moesaic.cli.app", "moesaic.ops.permute._torch"]


def area(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "moesaic" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_one_way(path):
    here = path.relative_to(SRC).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    assert here in RANK, f"{here} has no layer: give it one in LAYERS"
    for name in imports(path):
        there = area(name)
        if there in RANK:
            assert RANK[there] <= RANK[here], f"{path.name} ({here}) may not import {name} ({there})"


@pytest.mark.parametrize("path", sorted((SRC / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(SRC)))
def test_operators_stay_apart(path):
    """Each of them knows itself, and those that compose what lies below; a backend knows the same backend of these."""
    below = dict(fused_experts={"permute", "grouped_matmul"}, route={"index"}, gate={"index", "route"})
    op = path.relative_to(SRC / "ops").parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] != ["moesaic", "ops"] or len(parts) < 4:
            continue
        if parts[2] != op:
            assert parts[2] in below.get(op, ()), f"{path} imports its sibling {name}"
            same = parts[3] == "gpu" or path.stem.startswith(parts[3]) or parts[3].startswith(path.stem)
            assert same or path.stem == "__init__", f"{path} imports another backend: {name}"
        elif path.stem.startswith("_") and path.stem != "__init__":
            kinds = {"_reference", "_torch", "_triton"} - {path.stem}
            assert parts[3] not in kinds, f"{path} imports another backend: {name}"


@pytest.mark.parametrize("path", sorted((SRC / "ops").rglob("_reference.py")), ids=lambda p: p.parent.name)
def test_the_oracle_needs_torch_only(path):
    for name in imports(path):
        root = name.split(".")[0]
        ours = name.startswith("moesaic.activations") or "._reference" in name or name.endswith("gradients.incoming")
        assert ours or root in ("torch", "math", "typing", "__future__"), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    if path.name.startswith("_triton") or path.parent.name == "gpu" or path.parts[-2] == "cli":
        return
    for name in imports(path, top_level_only=True):
        if path.parts[-2] == "integrations" and name.startswith(path.stem):
            continue  # the module whose import is the request
        assert name.split(".")[0] not in HEAVY, f"{path} imports {name} at import time"


def test_import_is_light_and_quick():
    code = (
        "import sys, time, torch; t = time.perf_counter(); import moesaic; print(time.perf_counter() - t, *sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    loaded = {name.split(".")[0] for name in out[1:]}
    assert not loaded & set(HEAVY), loaded & set(HEAVY)
    assert float(out[0]) < 1.0, f"import moesaic took {out[0]} s after torch"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path):
    lines = path.read_text().splitlines()
    kernels = path.name.startswith("_triton") or path.parent.name == "gpu"
    assert len(lines) <= (600 if kernels else 420), f"{path} has {len(lines)} lines: one purpose a file"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            body = node.end_lineno - node.lineno + 1
            doc = ast.get_docstring(node)
            body -= len(doc.splitlines()) + 1 if doc else 0
            assert body <= (150 if kernel else 70), f"{path}:{node.lineno} {node.name} has {body} lines"


@pytest.mark.parametrize("name", moesaic.__all__)
def test_public_names_are_documented(name):
    value = getattr(moesaic, name)
    if callable(value) or isinstance(value, type):
        assert value.__doc__ and len(value.__doc__) > 20, f"moesaic.{name} has no docstring"


def test_no_catch_all():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = "everything" if node.type is None else ast.unparse(node.type)
                assert caught not in ("everything", "Exception", "BaseException"), (
                    f"{path}:{node.lineno} catches {caught}"
                )


DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", [d for d in DOCS if d.exists()], ids=lambda p: p.name)
def test_paths_that_documents_name_exist(path):
    for word in re.findall(r"`([\w./-]+\.(?:py|md|json|png|txt|toml))`", path.read_text()):
        if word.startswith("_"):
            continue  # a file name meant in general
        places = (ROOT / word, path.parent / word, SRC / word)
        assert any(p.exists() for p in places), f"{path.name} names {word}, which does not exist"
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{path.name} links to {link}, which does not exist"
