"""Assembles the pages of the documentation site in a folder, from which Zensical builds it; see tools/build_docs.sh.

    uv run python tools/docs_pages.py FOLDER

Pages are docs/*.md, the READMEs and CONTRIBUTING.md, which stay the only place of their text, the notebooks, and those
that tools/docs_reference.py generates. A page takes over a section of a README by a line with a link to it:

    [Manifests](../packages/umbrella-data/README.md#manifests) <!-- include -->

A link without an anchor takes over all sections that no other page has. Links between files become links between pages;
links to notebooks lead to pages with their cells, and links to other files that are on no page, such as scripts,
become text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

import docs_reference

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples/notebooks"
CONFIG = "docs/zensical.toml"
_INCLUDE = re.compile(r"^\[[^\]]+\]\((?P<target>[^)#]+)(?:#(?P<anchor>[^)]+))?\) <!-- include -->$")
# Code in a line comes first: it is not searched for links.
_LINK = re.compile(r"`[^`]+`|(?P<bang>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
_ITEM = re.compile(r"^(- |\d\. )")
_HEADING = re.compile(r"^(?P<marks>#{1,6}) (?P<title>.+)$")


@dataclass
class Section:
    """A heading of a file, with the lines up to the next heading of any level."""

    file: str
    level: int
    anchor: str
    lines: list[str] = field(default_factory=list)


def sections(file: str, text: str) -> list[Section]:
    """The sections of a file in order; lines before the first heading are a section of level 0."""
    found = [Section(file, 0, "")]
    for line, is_code in _lines(text.splitlines()):
        heading = None if is_code else _HEADING.match(line)
        if heading:
            found.append(Section(file, len(heading["marks"]), slug(heading["title"])))
        found[-1].lines.append(line)
    return [section for section in found if section.lines]


def slug(title: str) -> str:
    """The anchor of a heading, as Markdown and GitHub form it."""
    words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower()
    return re.sub(r"\s", "-", words)


def _lines(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Lines, and whether each is in a code block."""
    is_code = False
    for line in lines:
        is_fence = line.lstrip().startswith("```")
        yield line, is_code or is_fence
        is_code ^= is_fence


def assemble(sources: dict[str, str], *, root: Path = ROOT) -> dict[str, str]:
    """The pages with included sections and links between pages.

    Args:
        sources: Text of each page by its file name in docs/.
        root: Folder of the files that pages include and link to.

    Raises:
        ValueError: All links to files or sections that do not exist, and sections that two lines include.
    """
    site = _Site(root)
    for name, text in sources.items():
        site.add(name, text)
    site.place()
    pages = {name: "\n".join(_for_python_markdown("\n".join(site.lines(name)))) + "\n" for name in sources}
    if site.problems:
        raise ValueError("\n".join(dict.fromkeys(site.problems)))
    return pages


class _Site:
    """The sections of all files, and the page of each.

    Attributes:
        problems: Links and includes that do not hold.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parts: dict[str, list[Section]] = {}
        self._includes: dict[tuple[str, str], str] = {}
        self._page_of: dict[int, str] = {}
        self._claim: dict[int, tuple[str, str]] = {}
        self.problems: list[str] = []

    def add(self, page: str, text: str) -> None:
        """Add a page, and the files that it includes from."""
        file = f"docs/{page}"
        self._parts[file] = sections(file, text)
        self._page_of |= {id(part): page for part in self._parts[file]}
        for line, is_code in _lines(text.splitlines()):
            target = None if is_code else _target(line, file)
            if target is None:
                continue
            if target in self._includes:
                self.problems.append(f"{file}: {'#'.join(target)} is included twice")
            self._includes[target] = page
            source = self._root / target[0]
            if target[0] not in self._parts and source.is_file():
                self._parts[target[0]] = sections(target[0], source.read_text(encoding="utf-8"))

    def place(self) -> None:
        """Give every section its page: that of the smallest block around it which a page includes."""
        blocks = {target: _block(self._parts.get(target[0], []), target[1]) for target in self._includes}
        for target, block in sorted(blocks.items(), key=lambda each: -len(each[1])):
            if not block:
                self.problems.append(
                    f"docs/{self._includes[target]}: includes {'#'.join(target)}, which does not exist"
                )
            self._claim |= {id(part): target for part in block}
            self._page_of |= {id(part): self._includes[target] for part in block}

    def lines(self, page: str) -> Iterator[str]:
        """The lines of a page."""
        file = f"docs/{page}"
        for own in self._parts[file]:
            for text, is_code in _runs(own.lines):
                target = None if is_code else _target(text, file)
                if target is None:
                    yield text if is_code else self._with_links(text, file, page)
                    continue
                for part in self._parts.get(target[0], []):
                    if self._claim.get(id(part)) == target:
                        for included, inside in _runs(part.lines):
                            yield included if inside else self._with_links(included, part.file, page)

    def _with_links(self, text: str, file: str, page: str) -> str:
        """Text of a file, without code blocks, with links that hold on a page."""

        def link(match: re.Match[str]) -> str:
            if match["target"] is None or match["target"].startswith(("http://", "https://", "mailto:")):
                return match[0]
            target, _, anchor = match["target"].partition("#")
            path = _resolve(file, target)
            parts = [part for part in self._parts.get(path, []) if not anchor or part.anchor == anchor]
            where = next((self._page_of[id(part)] for part in parts if id(part) in self._page_of), None)
            if where is not None:
                # "docs/cluster.md" says nothing to a reader of the site.
                titles = [part.lines[0][2:] for part in self._parts[path] if part.level == 1]
                text = titles[0] if match["text"].endswith(".md") and titles else match["text"]
                return f"[{text}]({'' if where == page and anchor else where}{f'#{anchor}' if anchor else ''})"
            if path.endswith(".ipynb") and (self._root / path).exists():
                return f"[{match['text']}]({PurePosixPath(path).stem}.md)"
            if match["bang"]:
                return f"![{match['text']}]({PurePosixPath(path).relative_to('docs')})"
            if anchor and path in self._parts:
                self.problems.append(f"{file}: link to {match['target']}, but {path} has no such section")
            elif not (self._root / path).exists():
                self.problems.append(f"{file}: link to {match['target']}, but there is no {path}")
            return str(match["text"])

        return _LINK.sub(link, text)


def _for_python_markdown(text: str) -> Iterator[str]:
    """Lines as Python-Markdown wants them: lists and tables after a blank line, and list items indented by four."""
    before = ""
    indent = ""
    for line, is_code in _lines(text.splitlines()):
        item = None if is_code else _ITEM.match(line)
        is_first_row = not is_code and line.startswith("|") and not before.startswith("|")
        if before and (is_first_row or (item and not indent)):
            yield ""
        if item:
            indent = " " * (4 - len(item[0]))
        elif line and not line.startswith(" "):
            indent = ""
        yield indent + line if line.startswith(" ") else line
        before = line


def _runs(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Lines in a row that are code or not, joined; an include is alone."""

    def kind(numbered: tuple[int, tuple[str, bool]]) -> tuple[bool, int]:
        number, (line, is_code) = numbered
        return is_code, number if not is_code and _INCLUDE.match(line) else -1

    for (is_code, _), group in groupby(enumerate(_lines(lines)), key=kind):
        yield "\n".join(line for _, (line, _) in group), is_code


def _target(line: str, file: str) -> tuple[str, str] | None:
    """File and anchor of the section that a line includes; "" is the whole file."""
    match = _INCLUDE.match(line)
    return match and (_resolve(file, match["target"]), match["anchor"] or "")


def _block(parts: list[Section], anchor: str) -> list[Section]:
    """A section with those below it; all of them without an anchor."""
    if not anchor:
        return parts
    start = next((index for index, part in enumerate(parts) if part.anchor == anchor), None)
    if start is None:
        return []
    end = next((i for i in range(start + 1, len(parts)) if parts[i].level <= parts[start].level), len(parts))
    return parts[start:end]


def _resolve(file: str, target: str) -> str:
    return os.path.normpath(PurePosixPath(file).parent / target) if target else file


def notebook_pages() -> dict[str, str]:
    """The cells of each notebook, which is kept without outputs, as a page with a link to the file."""
    pages = {}
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        kinds = [cell["cell_type"] for cell in cells]
        texts = ["".join(cell["source"]) for cell in cells]
        title, *rest = [
            f"```python\n{text}\n```" if kind == "code" else text for kind, text in zip(kinds, texts, strict=True)
        ]
        link = f'A notebook, shown without its outputs: <a href="notebooks/{path.name}" download>{path.name}</a>'
        pages[f"{path.stem}.md"] = "\n\n".join((title, link, *rest)) + "\n"
    return pages


def named_pages() -> set[str]:
    """The pages in the navigation."""
    navigation = tomllib.loads((ROOT / CONFIG).read_text(encoding="utf-8"))["project"]["nav"]
    return set(re.findall(r"[\w-]+\.md", str(navigation)))


def main() -> None:
    """Write the folder: the configuration, docs/ and a link to the packages, whose docstrings are read."""
    folder = Path(sys.argv[1])
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    pages = assemble(sources | docs_reference.pages() | notebook_pages())
    if differing := named_pages() ^ set(pages):
        raise SystemExit(f"{CONFIG}: in nav or a page, but not both: {', '.join(sorted(differing))}")
    docs = folder / "docs"
    docs.mkdir(parents=True)
    for name, text in pages.items():
        (docs / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs/images", docs / "images")
    (docs / "notebooks").mkdir()
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, docs / "notebooks")
    shutil.copy(ROOT / "docs/site.css", docs)
    shutil.copy(ROOT / CONFIG, folder)
    (folder / "packages").symlink_to(ROOT / "packages")


if __name__ == "__main__":
    main()
