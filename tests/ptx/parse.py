"""PTX text to instructions: names resolved, scopes of inline assembly flattened, operands still text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """`@guard opcode operands`; an operand in braces is a tuple of names."""

    opcode: str
    operands: tuple[str | tuple[str, ...], ...]
    guard: str | None
    negated: bool
    text: str
    source: str  # where in the kernel's Python it comes from

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" of {self.source}" if self.source else "")


@dataclass
class Entry:
    """One kernel."""

    name: str
    params: dict[str, str]  # type by name, in order
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  # type by name


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)[^{]*\{", re.S)
PARAM = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)")
PIECE = re.compile(r"\.loc[^\n]*|[$\w]+:(?!:)|[@.a-z][^;{}]*(?:\{[^{};]*\}[^;{}]*)*;|[{}]")
GUARDED = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
NAME = re.compile(r"%?[A-Za-z_$][\w$]*")


def parse(ptx: str) -> Entry:
    """The kernel of a module that has one."""
    found = ENTRY.search(ptx)
    if found is None:
        raise NotImplementedError("no kernel with a known number of threads")
    name, params, threads = found.groups()
    entry = Entry(name, {n: t for t, n in PARAM.findall(params)}, int(threads))
    scopes: list[dict[str, str]] = []
    source = ""
    for piece in _pieces(ptx[found.end() - 1 :]):
        if piece.startswith(".loc"):
            source = piece.partition("//")[2].strip()
        elif piece == "{":
            scopes.append({})
        elif piece == "}":
            scopes.pop()
            if not scopes:
                break
        elif piece.endswith(":"):
            entry.labels[piece[:-1]] = len(entry.instructions)
        elif piece.startswith(".reg"):
            _declare(entry, piece, scopes)
        elif piece.startswith("."):
            pass  # .pragma
        else:
            entry.instructions.append(_instruction(piece, scopes, source))
    return entry


def _pieces(body: str) -> Iterator[str]:
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
    # a comment ends an instruction's line; that of .loc names the line of Python
    body = re.sub(r"(?m)^(?!\s*\.loc)(.*?)//.*$", r"\1", body)
    end = 0
    for found in PIECE.finditer(body):
        if body[end : found.start()].strip():
            raise NotImplementedError(f"`{body[end : found.start()].strip()}` is read over")
        end = found.end()
        yield " ".join(found.group().strip().rstrip(";").split())


def _declare(entry: Entry, piece: str, scopes: list[dict[str, str]]) -> None:
    _, kind, names = piece.split(None, 2)
    for name in names.split(","):
        name = name.strip()
        many = re.fullmatch(r"(.*)<(\d+)>", name)
        for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
            unique = register
            if len(scopes) > 1:
                unique = scopes[-1][register] = f"{register}@{len(entry.registers)}"
            entry.registers[unique] = kind[1:]


def _instruction(piece: str, scopes: list[dict[str, str]], source: str) -> Instruction:
    def resolve(found: re.Match[str]) -> str:
        return next((s[found[0]] for s in reversed(scopes) if found[0] in s), found[0])

    found = GUARDED.fullmatch(piece)
    if found is None:
        raise NotImplementedError(f"`{piece}` is not an instruction")
    negated, guard, opcode, rest = found.groups()
    if len(scopes) > 1:
        rest, guard = NAME.sub(resolve, rest), guard and NAME.sub(resolve, guard)
    return Instruction(opcode, tuple(_operands(rest)), guard, bool(negated), piece, source)


def _operands(text: str) -> Iterator[str | tuple[str, ...]]:
    for found in re.finditer(r"\{([^}]*)\}|\[[^\]]*\]|[^,\s][^,]*", text):
        braced = found[1]
        yield found[0].strip() if braced is None else tuple(part.strip() for part in braced.split(","))
