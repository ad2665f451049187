"""What mkdocs does not do by itself for the documentation site (mkdocs.yml names this file).

Pages in docs/ link to files elsewhere in the checkout, which makes them right in an editor and on a
code host. In the site, pages of the project (CONTRIBUTING.md and others) become pages, and every
other file that is linked is put beside them, so that the site needs no code host.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "readme.md": "README.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
    "project/security.md": "SECURITY.md",
    "examples.md": "examples/README.md",
}
"""Page of the site -> the file of the checkout that it is made of."""

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the project's pages, and the files that any page links to."""
    for page, source in PAGES.items():
        text = _relinked((ROOT / source).read_text(), source, page)
        files.append(File.generated(config, page, content=text))
    for file in list(files.documentation_pages()):
        source = PAGES.get(file.src_uri, f"docs/{file.src_uri}")
        for target in _links(source):
            place = _place(target)
            if place.startswith("files/") and files.get_file_from_path(place) is None:
                content = (ROOT / target).read_bytes()
                files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    if page.file.src_uri in PAGES:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _links(source: str) -> list[str]:
    """The files of the checkout, folders left out, that its page ``source`` links to."""
    found = (_target(source, match[1]) for match in _LINK.finditer((ROOT / source).read_text()))
    return [each for each in found if (ROOT / each).is_file()]


def _target(source: str, link: str) -> str:
    """The file that a link in the checkout's file ``source`` means; of a folder, its README."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def _place(target: str) -> str:
    """Where the site has a file of the checkout."""
    for page, source in PAGES.items():
        if target == source:
            return page
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"


def _relinked(text: str, source: str, page: str) -> str:
    """``text`` of the checkout's file ``source`` with links as the site's ``page`` needs them."""

    def link(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        if not (ROOT / target).is_file():
            return match[0]
        to = posixpath.relpath(_place(target), posixpath.dirname(page) or ".")
        return f"]({to}{match[2] or ''})"

    return _LINK.sub(link, text)
