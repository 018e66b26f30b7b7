"""One style of docstrings: Google's, which the API pages render."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHER_STYLE = re.compile(r"^\s*:(param|returns?|raises|rtype|type)\b.*:", re.MULTILINE)
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("models", "guides", "pyro_sparse")
    for path in (ROOT / folder).rglob("*.py")
)


def test_the_other_style_is_found():
    assert OTHER_STYLE.search("A sum.\n\n    :param x: a number.\n")
    assert not OTHER_STYLE.search("A sum.\n\n    Args:\n        x: see :class:`Sum`.\n")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_fields_are_sections(path):
    found = OTHER_STYLE.search((ROOT / path).read_text())
    assert found is None, f"{path}: {found[0].strip()}"
