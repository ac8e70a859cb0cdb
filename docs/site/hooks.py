"""What MkDocs does not do by itself: pages from papers outside docs/, notebooks, the reference, and source files.

The papers stay where readers of the repository look for them, with links that work there.  Here each gets an address
on the site, links between them are changed to it, and a source file that some page links to becomes a page too.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))

import notebooks
import reference

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {  # path in the repository: page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "weights/README.md": "weights.md",
    "tutorials/README.md": "tutorials/index.md",
}
LANGUAGES = {".py": "python", ".json": "json", ".cfg": "ini", ".md": "markdown"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"^( *)(```+).*?^\1\2$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LIMIT = 50_000  # characters of a source file that a page shows

_pages: dict[str, str] = {}  # path in the repository: page of the site


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends to the navigation the tutorials, the reference, and guides that nobody has listed."""
    sections = {title: pages for entry in config.nav or [] for title, pages in entry.items()}
    sections["Tutorials"] += [notebooks.page_of(path) for path in notebooks.files(ROOT)]
    sections["Reference"][1:1] = [f"reference/{name}.md" for name in reference.PAGES]
    entries = [page for pages in sections.values() for page in pages]
    listed = {next(iter(page.values())) if isinstance(page, dict) else page for page in entries}
    guides = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    sections["Guides"] += [name for name in guides if name not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    _pages.clear()
    _pages.update(PAPERS)
    texts = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in PAPERS.items()}
    for path in notebooks.files(ROOT):
        page, name = notebooks.page_of(path), path.relative_to(ROOT).as_posix()
        _pages[name] = page
        texts[page], figures = notebooks.markdown(path)
        for figure, data in figures.items():
            files.append(File.generated(config, f"tutorials/{figure}", content=data))
    for page, text in reference.texts().items():
        texts[page] = text
    for file in files:
        if not file.generated_by:
            _pages[f"docs/{file.src_uri}"] = file.src_uri
            if file.is_documentation_page():
                texts[file.src_uri] = file.content_string
    for path in sorted(_linked_sources(texts)):
        _pages[path] = f"source/{path}.md"
        texts[_pages[path]] = _source_page(path)
    present = {file.src_uri for file in files}
    for page, text in texts.items():
        if page not in present:
            files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "docs" / "site" / "theme").iterdir()):
        files.append(File.generated(config, f"theme/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Changes links from paths of the repository to pages of the site; formulas of tutorials wait for the HTML."""
    if page.file.src_uri.startswith(("source/", "reference/")):
        return markdown
    return _outside_code(markdown, lambda text: LINK.sub(lambda link: _changed(link, page.file.src_uri), text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the formulas in, and links names in the concept index to their lines."""
    return _with_lines(html) if page.file.src_uri == "where.md" else notebooks.with_formulas(html)


def _with_lines(html: str) -> str:
    """The concept index, each name after a file a link to the line that defines it."""

    def linked(entry: re.Match[str]) -> str:
        lines = _definitions(ROOT / entry[2])

        def name(code: re.Match[str]) -> str:
            line = lines.get(code[1])
            return f'<a href="{entry[1]}#__codelineno-0-{line}">{code[0]}</a>' if line else code[0]

        return entry[0].removesuffix(entry[3]) + re.sub("<code>([^<]+)</code>", name, entry[3])

    return re.sub(r'<a href="(source/([^"]+\.py)\.html)">[^\n]*?</a>((?: <code>[^<]+</code>)+)', linked, html)


def _definitions(path: Path) -> dict[str, int]:
    """The line of each function, class and constant at the top of a file, and of the members of classes."""
    found: dict[str, int] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for target in targets:
                name = getattr(target, "id", getattr(target, "name", None))
                if isinstance(name, str):
                    found[prefix + name] = node.lineno
            if isinstance(node, ast.ClassDef) and not prefix:
                collect(node.body, f"{node.name}.")

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def origin_of(page: str) -> str:
    """The path in the repository of what a page shows."""
    return next((path for path, target in _pages.items() if target == page), f"docs/{page}")


def _linked_sources(texts: dict[str, str]) -> set[str]:
    """Files of the repository that pages link to and that have no page yet."""
    found = set()
    for page, text in texts.items():
        if page.startswith("reference/"):
            continue
        for _, target, _ in LINK.findall(CODE.sub("", text)):
            path = _repository_path(target, page)
            if path and path not in _pages and (ROOT / path).is_file():
                found.add(path)
    return found


def _repository_path(target: str, page: str) -> str | None:
    """Where a link leads, as a path from the root of the repository; None for addresses and places on the page."""
    if re.match(r"[a-z]+:|#", target):
        return None
    folder = posixpath.dirname(origin_of(page))
    return posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))


def _changed(link: re.Match[str], page: str) -> str:
    before, target, after = link.groups()
    path = _repository_path(target, page)
    if path is None or path not in _pages:
        return link[0]  # MkDocs complains of what leads nowhere
    place = target.partition("#")[2]
    address = posixpath.relpath(_pages[path], posixpath.dirname(page))
    return before + address + (f"#{place}" if place else "") + after


def _outside_code(text: str, change: Any) -> str:
    """`change` of everything that is not code."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    note = ""
    if len(text) > LIMIT:
        text = text[: text.rindex("\n", 0, LIMIT)]
        note = f"\n\nThe first {LIMIT} characters; the rest is in the file.\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * (1 + max((len(run) for run in re.findall("`{3,}", text)), default=2))
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [navigation]\n---\n\n# `{path}`\n\n"
    return f'{head}{fence}{language} linenums="1"\n{text}\n{fence}\n{note}'
