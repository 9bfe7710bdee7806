"""Draw what the project says of itself in pyproject.toml; writes docs/_static/badges.svg.

Run: python docs/figures/badges.py
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# The width of a character, about; each text is stretched to what is planned for it, whatever font there is.
CHARACTER, GAP, HEIGHT = 6.5, 12, 20


def facts() -> dict[str, str]:
    """Return what the badges say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = [found[1] for each in project["classifiers"] if (found := re.search(r":: Python :: (3\.\d+)$", each))]
    said = {"licence": project["license"], "Python": " | ".join(versions)}
    if "Typing :: Typed" in project["classifiers"]:
        said["types"] = "checked, strict"
    return said


def drawn() -> str:
    """Return the picture, as SVG."""
    parts, x = [], 0.0
    for name, value in facts().items():
        for text, colour in ((name, "#555"), (value, "#1f6f8b")):
            width = CHARACTER * len(text) + GAP
            parts.append(f'<rect x="{x}" width="{width}" height="{HEIGHT}" fill="{colour}"/>')
            parts.append(f'<text x="{x + GAP / 2}" y="14" textLength="{width - GAP}">{text}</text>')
            x += width
        x += GAP
    size = f'width="{x - GAP}" height="{HEIGHT}"'
    style = 'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" fill="#fff"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<g {style}>\n{body}\n</g>\n</svg>\n'


if __name__ == "__main__":
    (ROOT / "docs" / "_static" / "badges.svg").write_text(drawn(), "utf-8")
