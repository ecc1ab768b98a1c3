"""Change params.yaml by dotted keys, comments and order kept, and only when the result is valid."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages import params
from stages.errors import UserError
from stages.reading import YAML_BYTES, content, yaml_value
from stages.stage import replacing


def parse(assignments: list[str]) -> dict[str, Any]:
    """`["quantize.bits=8"]` to `{"quantize.bits": 8}`; values are read as YAML."""
    values = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"-S {text}: write it as key=value, for instance quantize.bits=8")
        values[key.strip()] = _scalar(value, f"-S {text if len(text) < 200 else key}")
    return values


def _scalar(text: str, where: str) -> Any:
    value = yaml_value(text, where)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _null(representer: Any, _: None) -> Any:
    """As a person writes it; ruamel.yaml would leave the place empty."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def apply(root: Path, overrides: Mapping[str, Any]) -> list[str]:
    """Write the overrides into params.yaml.

    Returns:
        What changed, for instance `["quantize.bits 4 → 8"]`.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range; nothing is written.
    """
    path = root / "params.yaml"
    params.load(path)
    if not overrides:
        return []
    from ruamel.yaml import YAML

    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 4096
    editor.representer.add_representer(type(None), _null)
    values = editor.load(content(path, YAML_BYTES))
    changes = [change for key, new in overrides.items() if (change := _set(values, key, new))]
    out = io.StringIO()
    editor.dump(values, out)
    text = out.getvalue()
    params.check(yaml_value(text, path.name))
    if changes:
        with replacing(path) as temporary:
            temporary.write_text(text, "utf-8")
    return changes


def preview(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> params.Params:
    """The parameters as `apply` would leave those of `values`, the content of a params.yaml.

    Raises:
        UserError: as `apply`.
    """
    changed = copy.deepcopy(dict(values))
    for key, value in overrides.items():
        _set(changed, key, value)
    return params.check(changed)


def _set(values: Any, key: str, value: Any) -> str | None:
    """Set a dotted key; what changed, in words."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values, dict):
            break
        values = values.setdefault(parent, {})
    if not isinstance(values, dict):
        raise UserError(f"params.yaml: {key}: unknown parameter")
    before = values.get(last)
    if last in values and before == value:
        return None
    values[last] = value
    return f"{key} {before} → {value}"
