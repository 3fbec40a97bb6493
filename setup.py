"""What ``pyproject.toml`` cannot say of the package: its description on PyPI, which is README.md without dead links.

Links to files of this repository, and its pictures, lead nowhere there.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

SOURCE: str | None = (
    None  # the address of this folder, such as "https://host/owner/dithooks/blob/main", once it has one
)
FENCED = re.compile(r"^( *)```.*?^\1``` *$", re.M | re.S)
HERE = r"(?!\w+:|#|/)"  # at the beginning of an address: it is a file of this repository
PICTURE = re.compile(rf'!\[[^\]]*\]\({HERE}[^)\s]+\)|<img [^>]*src="{HERE}[^>]*>|<source [^>]*srcset="{HERE}[^>]*>')
LINK = re.compile(rf"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*)\]\((?P<file>{HERE}[^)\s]+)\)")


def published(readme: str, source: str | None = SOURCE) -> str:
    """Return README.md as PyPI is to show it: pictures of this repository are left out, links to its files absolute.

    Args:
        readme: the text of README.md.
        source: the address of this repository's files. Without one a link becomes its text, and the file's name.
    """

    def absolute(link: re.Match[str]) -> str:
        text, file = link["text"].strip(), link["file"]
        if source is not None and text:
            return f"[{text}]({source}/{file})"
        return f"{text} (`{file}`)" if text not in ("", file) else text

    def changed(prose: str) -> str:
        return re.sub(r"\n{3,}", "\n\n", LINK.sub(absolute, PICTURE.sub("", prose)))

    parts, end = [], 0
    for code in FENCED.finditer(readme):
        parts += [changed(readme[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, changed(readme[end:])])


if __name__ == "__main__":  # so it is for builds, too
    text = Path(__file__).parent.joinpath("README.md").read_text(encoding="utf-8")
    setup(long_description=published(text), long_description_content_type="text/markdown")
