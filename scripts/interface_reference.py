#!/usr/bin/env python3
"""Write docs/interface.md, the reference of quire.core.interface, from its docstrings.

    python scripts/interface_reference.py [--check]

Reads the source with griffe and imports nothing of Quire. `--check` writes nothing and ends with 1
if the page is not what the docstrings say.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "interface.md"
PACKAGE = "quire.core.interface"
HEAD = """# The interface, name by name

All that a backend imports: `from quire.core.interface import ...`. This page is written from the
docstrings by `python scripts/interface_reference.py`; do not edit it. How to use it:
[write-a-backend.md](write-a-backend.md).
"""


def main() -> int:
    """Write or check the page."""
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"{PAGE} is not what the docstrings say; run python scripts/interface_reference.py")
    return 1


def render() -> str:
    """The page, from the source as it is now."""
    package = griffe.load(PACKAGE, search_paths=[str(ROOT / "typing")])
    lines = [HEAD]
    names = sorted(package.exports or [], key=lambda name: (module_of(package[name]), str(name)))
    module = ""
    for name in names:
        if module_of(package[name]) != module:
            module = module_of(package[name])
            lines += [f"## {module}\n", first_paragraphs(package[module])]
        lines += list(describe(str(name), target_of(package[name])))
    return "\n".join(lines)


def target_of(item: griffe.Object | griffe.Alias) -> griffe.Object:
    """What a name of the package stands for."""
    return item.final_target if isinstance(item, griffe.Alias) else item


def module_of(item: griffe.Object | griffe.Alias) -> str:
    """The module of the package that a name is written in."""
    return target_of(item).module.name


def first_paragraphs(item: griffe.Object | griffe.Alias) -> str:
    """A docstring as Markdown; its indented parts stay code by their indentation."""
    return (item.docstring.value.strip() if item.docstring else "") + "\n"


def describe(name: str, item: griffe.Object) -> Iterator[str]:
    """One exported name, with its fields and methods."""
    if isinstance(item, griffe.Function):
        yield f"### `{name}{signature_of(item)}`\n"
        yield first_paragraphs(item)
        return
    if not isinstance(item, griffe.Class):
        yield f"### `{name}`\n"
        yield first_paragraphs(item)
        return
    bases = ", ".join(str(base) for base in item.bases)
    yield f"### class `{name}`" + (f" ({bases})\n" if bases else "\n")
    yield first_paragraphs(item)
    for member in item.members.values():
        yield from describe_member(member)


def describe_member(member: griffe.Object | griffe.Alias) -> Iterator[str]:
    """A public field or method of a class."""
    if member.name.startswith("_") or isinstance(member, griffe.Alias):
        return
    if isinstance(member, griffe.Function):
        kind = " *(abstract)*" if "abstractmethod" in str(decorators_of(member)) else ""
        yield f"- **`{member.name}{signature_of(member)}`**{kind}"
    elif isinstance(member, griffe.Attribute):
        annotation = f": {member.annotation}" if member.annotation else ""
        value = f" = {member.value}" if member.value is not None else ""
        yield f"- `{member.name}{annotation}{value}`"
    else:
        return
    if member.docstring:
        yield "\n" + indented(member.docstring.value.strip()) + "\n"
    else:
        yield ""


def decorators_of(function: griffe.Function) -> list[str]:
    """The decorators of a function, as they are written."""
    return [str(decorator.value) for decorator in function.decorators]


def signature_of(function: griffe.Function) -> str:
    """Parameters and result as they are written, `self` left out."""
    parts: list[str] = []
    has_star = False
    for parameter in function.parameters:
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not has_star:
            parts.append("*")
            has_star = True
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        default = f" = {parameter.default}" if parameter.default is not None else ""
        parts.append(f"{parameter.name}{annotation}{default}")
    returns = f" -> {function.returns}" if function.returns else ""
    return f"({', '.join(parts)}){returns}"


def indented(text: str) -> str:
    """The lines of a text, as the body of a list item."""
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
