"""Tables of measured results, kept in the README between markers so that they are made, not written."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def replace_section(name: str, text: str, readme: Path = README) -> None:
    """Puts `text` between `<!-- name -->` and `<!-- /name -->` in the README.

    Raises:
        ValueError: the README does not have exactly one such section.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    document = readme.read_text(encoding="utf-8")
    if document.count(opening) != 1 or document.count(closing) != 1:
        raise ValueError(f"{readme.name} must have one section {opening} … {closing}")
    before, rest = document.split(opening)
    after = rest.split(closing)[1]
    readme.write_text(f"{before}{opening}\n{text}\n{closing}{after}", encoding="utf-8")
