"""The documentation is true: its examples run, its drawings are what the code does, what it names exists."""

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import crossattn_kernels
from crossattn_kernels import Mask

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crossattn_kernels"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"`([\w/]+\.py)(?:: ([\w.]+(?:, [\w.]+)*))?`")  # `file.py` or `file.py: name, name`
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def named(pages):
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.parametrize("page", named(DOCS))
def test_page_opens_with_the_question_it_answers(page):
    first = page.read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")


@pytest.mark.parametrize("page", named(PAGES))
def test_examples_run_and_show_what_they_give(page):
    """Python blocks share one namespace; a text block right below one shows the value of its last line."""
    torch.manual_seed(0)
    text, namespace = page.read_text(), {}
    blocks = list(BLOCK.finditer(text))
    for block, below in zip(blocks, [*blocks[1:], None]):
        if block[1] != "python":
            continue
        value = run(block[2], namespace, page, text[: block.start(2)].count("\n"))
        if below and below[1] == "text" and not text[block.end() : below.start()].strip():
            assert shown(value) == below[2].rstrip("\n"), f"{page.name}:\n{block[2]}gives\n{shown(value)}"


def run(source, namespace, page, line):
    """The value of the last line, if that is an expression."""
    tree = ast.increment_lineno(ast.parse(source), line)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, page, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), page, "eval"), namespace) if last else None


def shown(value, M=6, N=8):
    """A mask as one drawing a batch entry and head, anything else as printed."""
    if not isinstance(value, Mask):
        return str(value)
    by_row = value.as_dense(*value.lead(), M, N).flatten(0, 1).transpose(0, 1).tolist()  # (M, entries, N)
    return "\n".join("    ".join(" ".join("·█"[key] for key in keys) for keys in row) for row in by_row)


def test_every_constructor_of_a_mask_is_drawn():
    constructors = {name for name, member in vars(Mask).items() if isinstance(member, staticmethod)}
    blocks = BLOCK.findall((ROOT / "docs/masks.md").read_text())
    above = "".join(source for (_, source), (language, _) in zip(blocks, blocks[1:]) if language == "text")
    assert constructors <= set(re.findall(r"Mask\.(\w+)\(", above))


@pytest.mark.parametrize("page", named(PAGES))
def test_every_named_file_and_function_exists(page):
    for file, names in FILE.findall(page.read_text()):
        path = PACKAGE / file if (PACKAGE / file).exists() else ROOT / file
        assert path.exists(), f"{page.name} names {file}"
        for name in filter(None, names.split(", ")):
            assert name in defined(path), f"{page.name} names {file}: {name}"


@cache
def defined(path):
    """Functions, classes and `Class.method`s of a file."""
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    classes = [node for node in top if isinstance(node, ast.ClassDef)]
    methods = {f"{c.name}.{m.name}" for c in classes for m in c.body if isinstance(m, ast.FunctionDef)}
    return {node.name for node in top} | methods


@pytest.mark.parametrize("page", named(PAGES))
def test_links_between_pages_lead_somewhere(page):
    for file, heading in LINK.findall(page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        assert not heading or heading in anchors(target), f"{page.name} links to {file}#{heading}"


def anchors(page):
    """Headings as they are addressed: lower case, words joined by hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", ["README.md", "mkdocs.yml", "docs/index.md"])
def test_every_page_is_listed(file):
    listed = (ROOT / file).read_text()
    assert not [page.name for page in DOCS if page.name != "index.md" and page.name not in listed]


def test_the_readme_names_every_argument_and_every_public_name():
    text = (ROOT / "README.md").read_text()
    arguments = list(inspect.signature(crossattn_kernels.cross_attention).parameters)[3:]
    missing = [name for name in (*arguments, *crossattn_kernels.__all__) if f"`{name}" not in text]
    assert not missing
