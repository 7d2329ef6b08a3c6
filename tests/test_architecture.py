"""The house: who may import whom, what no file contains, and that everything but the kernels works without triton."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import crossattn_kernels

ROOT = Path(crossattn_kernels.__file__).parent
PACKAGE = ROOT.name
KERNELS = "kernels"

# file or package: what it may import from this package; "lazily" inside a function only
DOOR = {"functional", "problem", "masks"}
MAY_IMPORT = {
    "__init__": {"functional", "masks", "chunked"},
    "__main__": {"cli"},
    "masks": set(),
    "dropout": set(),
    "problem": {"masks"},
    "reference": {"problem", "dropout"},
    "tiled": {"problem", "dropout"},
    "tuning": {"problem"},
    "aot": {"problem", "masks", "tuning"},
    "ops": {"tiled", "problem"},
    "functional": {"ops", "problem", "masks", "tiled", "reference", "tuning"},
    "chunked": DOOR,
    "maps": DOOR | {"reference"},
    "layers": DOOR | {"maps"},
    "integrations": DOOR | {"layers", "maps"},
    "cli": {"__init__"},
    "demo": {"__init__", "layers", "maps", "testing"},
    "testing": {"functional", "masks"},
    "trial": {"testing", "tuning", "problem"},
    "tune": {"trial", "testing", "tuning"},
    "kernels": {
        *(f"kernels.{name}" for name in ("forward", "backward", "short_queries", "bias_grad", "views")),
        "problem",
    },
}
LAZILY = {
    "ops": {"kernels"},
    "functional": {"kernels"},
    "cli": {"demo", "aot", "tune", "integrations"},
    "aot": {"kernels"},
    "trial": {"kernels.launch"},
}

# views <- launch, tiles <- softmax <- scores <- schedules
SCHEDULES = ["bounds", "forward", "dq", "dkv", "backward", "short_queries", "bias_grad"]
LAYERS = [["views"], ["launch", "tiles"], ["softmax", "partials"], ["scores"], SCHEDULES]
SIDEWAYS = {
    *((name, "bounds") for name in ("forward", "dkv", "backward")),
    *(("backward", name) for name in ("dq", "dkv")),
    *((name, "backward") for name in ("bias_grad", "short_queries")),
}
FROM_OUTSIDE = {"problem", "tuning", "dropout"}


class Import(NamedTuple):
    module: str  # dotted, absolute
    name: str | None  # what `from module import name` takes
    lazy: bool  # inside a function
    types_only: bool  # under `if TYPE_CHECKING`


def module_of(path: Path) -> str:
    """`kernels.forward`, `tuning`, `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
every_file = pytest.mark.parametrize("module", FILES)


def imports(node: ast.AST, lazy: bool = False, types_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, None, lazy, types_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(child.module, alias.name, lazy, types_only) for alias in child.names)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from imports(child, lazy or inside, types_only or checking)


def own_imports(module: str) -> Iterator[tuple[str, Import]]:
    """(module of this package, import); `from crossattn_kernels import ops` is one of ops."""
    for found in imports(TREES[module]):
        top, _, rest = found.module.partition(".")
        if top == PACKAGE:
            child = f"{rest}.{found.name}".strip(".")
            yield (child if child in FILES else rest or "__init__"), found


def may_import(importer: str, imported: str, lazy: bool) -> bool:
    if importer.startswith(f"{KERNELS}."):
        return kernel_may_import(importer.removeprefix(f"{KERNELS}."), imported)
    home, target = importer.partition(".")[0], imported.partition(".")[0]
    if home == target and home != KERNELS:
        return True  # within tiled, tuning, layers, integrations
    allowed = MAY_IMPORT.get(home, set()) | (LAZILY.get(home, set()) if lazy else set())
    return imported in allowed or (target in allowed and (target != KERNELS or home == "aot"))


def kernel_may_import(importer: str, imported: str) -> bool:
    if imported.partition(".")[0] != KERNELS:
        return imported.partition(".")[0] in FROM_OUTSIDE
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    imported = imported.removeprefix(f"{KERNELS}.")
    return level.get(imported, 99) < level[importer] or (importer, imported) in SIDEWAYS


@every_file
def test_imports_go_one_way(module):
    wrong = [
        f"{module} imports {imported}{' lazily' if found.lazy else ''}"
        for imported, found in own_imports(module)
        if not found.types_only and not may_import(module, imported, found.lazy)
    ]
    assert not wrong, f"{'; '.join(wrong)}; the permitted directions are at the top of this file and in CONTRIBUTING.md"


@every_file
def test_every_file_has_a_place(module):
    if module.startswith(f"{KERNELS}."):
        assert module.removeprefix(f"{KERNELS}.") in [name for names in LAYERS for name in names]
    else:
        assert module.partition(".")[0] in MAY_IMPORT, f"say at the top of this file what {module} may import"
    assert Path(FILES[module]).stem not in ("utils", "helpers", "common")


@every_file
def test_who_knows_triton_and_testing(module):
    for found in imports(TREES[module]):
        if found.module.partition(".")[0] == "triton":
            assert module.partition(".")[0] in (KERNELS, "aot"), f"{module} imports triton"
    for imported, _ in own_imports(module):
        if imported == "testing":
            assert module in ("demo", "trial", "tune"), f"{module} imports testing"


def identifiers(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.alias):
            yield part.name
        elif isinstance(part, (ast.FunctionDef, ast.ClassDef)):
            yield part.name
        elif isinstance(part, ast.arg):
            yield part.arg


@every_file
def test_forbidden_names(module):
    names = set(identifiers(TREES[module]))
    assert not names & {"environ", "getenv", "putenv"}, "no environment variables"
    assert "make_block_ptr" not in names
    assert not [name for name in names if "atomic" in name.lower()], "sums are ordered"
    arguments = [part.arg for part in ast.walk(TREES[module]) if isinstance(part, ast.arg)]
    assert not [name for name in arguments if "stride" in name], "a tensor crosses as a View"


@every_file
def test_files_are_short(module):
    assert len(FILES[module].read_text().splitlines()) <= 500


# ---- kernels ----

KERNEL_FILES = [module for module in FILES if module.startswith(f"{KERNELS}.")]
JITTED = {
    f"{module.partition('.')[2]}.{node.name}": node
    for module in KERNEL_FILES
    for node in TREES[module].body
    if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
}
ENTRIES = {name: node for name, node in JITTED.items() if name.endswith("_kernel")}


def calls(module):
    return (node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call))


def test_kernels_are_found():
    assert {"forward.forward_kernel", "dq.dq_kernel", "dkv.dkv_kernel"} <= ENTRIES.keys()


@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_are_short(name):
    """Without the docstring."""
    docstring, *body = ENTRIES[name].body
    assert ast.get_docstring(ENTRIES[name]), "an entry kernel says what one program owns"
    assert body[-1].end_lineno - body[0].lineno + 1 <= 45


@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_are_launched_in_one_place(name):
    """By a Launcher, which knows how each is launched and says whether products may be fused with sums."""
    kernel = name.partition(".")[2]
    users = [node for module in KERNEL_FILES for node in calls(module) if any(_names(a, kernel) for a in node.args)]
    # Backward.run_kernel adds what all its kernels take and launches
    assert users and all(ast.unparse(node.func).rpartition(".")[2] in ("launch", "run_kernel") for node in users)
    assert f'"{kernel}"' in FILES["kernels.launch"].read_text()
    assert "enable_fp_fusion" in [word.arg for node in calls("kernels.launch") for word in node.keywords]


def _names(node, name):
    return isinstance(node, ast.Name) and node.id == name


def test_every_product_names_its_precision():
    products = [
        (name, node)
        for name, function in JITTED.items()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot"
    ]
    assert products
    for name, node in products:
        assert "input_precision" in [keyword.arg for keyword in node.keywords], name


# ---- without triton ----

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import crossattn_kernels as package

q, k = torch.randn(2, 4, 5, 16, requires_grad=True), torch.randn(2, 2, 7, 16)
y = package.cross_attention(q, k, k, package.Mask.causal(5, 7), gate=torch.randn(4), dropout_p=0.1)
y.sum().backward()
assert y.shape == q.grad.shape == q.shape
expected = package.cross_attention(q, k, k, backend="reference")
assert (package.cross_attention(q, k, k) - expected).abs().max() < 1e-5
assert package.explain(q, k, k).reasons["triton"] == ("triton is not installed",)
try:
    package.cross_attention(q, k, k, backend="triton")
except NotImplementedError as error:
    assert "triton is not installed" in str(error)
else:
    raise AssertionError("the triton backend ran without triton")
assert not [name for name in sys.modules if name.startswith("crossattn_kernels.kernels")]
"""


def run(script: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_the_package_works_without_triton():
    done = run(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


def test_import_loads_no_kernels_and_no_extras():
    heavy = [f"{PACKAGE}.{name}" for name in ("kernels", "demo", "testing", "tune")] + ["matplotlib", "rich", "sklearn"]
    done = run(f"import sys, crossattn_kernels; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
