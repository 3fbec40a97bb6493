"""The package's description on PyPI: README.md, whose links and pictures of this repository lead nowhere there.

All else about the package stands in ``pyproject.toml``.
"""

import re
from pathlib import Path

from setuptools import setup

SOURCE = None  # where files of this repository are read, such as "https://host/owner/dithooks/blob/main"
FENCE = re.compile(r"^( *)```.*?^\1``` *$\n?", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"^!\[[^\]]*\]\((?!\w+:)[^)\s]+\)\n\n?", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<file>[^)\s]+)\)")


def described(readme: str, source: "str | None" = SOURCE) -> str:
    """Turn the links to files of this repository into absolute ones, and leave its pictures out.

    Args:
        readme: the text of README.md.
        source: the address that a file's path is added to; without one a link becomes its text, and the file's name.
    """

    def elsewhere(link: "re.Match[str]") -> str:
        return f"[{link['text']}]({source}/{link['file']})" if source else f"{link['text']} (`{link['file']}`)"

    parts, end = [], 0
    for code in [*FENCE.finditer(readme), None]:
        prose = readme[end : code.start() if code else None]
        parts += [LINK.sub(elsewhere, PICTURE.sub("", prose)), code.group() if code else ""]
        end = code.end() if code else end
    return "".join(parts)


if __name__ == "__main__":
    readme = Path(__file__).parent.joinpath("README.md").read_text(encoding="utf-8")
    setup(long_description=described(readme), long_description_content_type="text/markdown")
