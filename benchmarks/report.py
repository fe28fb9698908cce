"""Tables of measured results, kept in the documents between markers so that they are made, not written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENTS = tuple(ROOT / name for name in ("README.md", "docs/measurements.md", "docs/scale.md"))


def replace_section(name: str, text: str, documents: Sequence[Path] = DOCUMENTS) -> None:
    """Puts `text` between `<!-- name -->` and `<!-- /name -->` in the document that has this section.

    Raises:
        ValueError: not exactly one of them has exactly one such section.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    written = {path: path.read_text(encoding="utf-8") for path in documents}
    having = [path for path, document in written.items() if opening in document or closing in document]
    if len(having) != 1 or any(written[having[0]].count(marker) != 1 for marker in (opening, closing)):
        raise ValueError(f"one of {', '.join(p.name for p in documents)} must have one section {opening} … {closing}")
    before, rest = written[having[0]].split(opening)
    after = rest.split(closing)[1]
    having[0].write_text(f"{before}{opening}\n{text}\n{closing}{after}", encoding="utf-8")
