"""A small package in the layout of @iconify/json, of drawings whose pixels can be counted out by hand."""

import json
from pathlib import Path
from typing import Any

LEFT_HALF = '<path fill="currentColor" d="M0 0h8v16H0z"/>'
"""In a frame of 16 by 16."""
TOP_LEFT = '<path d="M0 0h8v8H0z"/>'


def write_package(folder: Path, icon_sets: dict[str, dict[str, Any]], contents: dict[str, Any] | None = None) -> Path:
    """Write the unpacked package with these sets by prefix and, where given, its table of contents; returns the folder."""
    (folder / "json").mkdir(parents=True)
    for prefix, body in icon_sets.items():
        (folder / "json" / f"{prefix}.json").write_text(json.dumps({"prefix": prefix, **body}))
    if contents is not None:
        (folder / "collections.json").write_text(json.dumps(contents))
    return folder
