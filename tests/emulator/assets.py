"""Versioned assets as Azure ML keeps them: names, versions, what may change and what may not."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from .answers import ServiceError, bad, missing, now, system_data
from .world import PROVIDER

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


class Assets:
    """All assets of one kind in one workspace or registry.

    Args:
        parent: the resource id of the workspace or registry.
        kind: the plural in its paths, such as `models`.
        fixed: the properties that a version keeps once it is made.
        numbered: whether a version must be a positive whole number.
        defaults: what an answer has where the request said nothing.
    """

    def __init__(
        self,
        parent: str,
        kind: str,
        fixed: tuple[str, ...],
        numbered: bool = False,
        **defaults: Any,
    ) -> None:
        self.parent, self.kind, self.fixed, self.defaults = parent, kind, fixed, defaults
        self.numbered = numbered
        self.versions: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)

    def _resource(self, path: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
        scope, owner = self.parent.split("/")[-2:]
        kind = f"{self.kind}/versions" if "/versions/" in path else self.kind
        start = f"azureml://registries/{owner}" if scope == "registries" else self.parent
        return {
            "id": f"{start}/{self.kind}/{path}",
            "name": path.rpartition("/")[2],
            "type": f"{PROVIDER}/{scope}/{kind}",
            "properties": properties,
            **more,
        }

    def _absent(self, what: str) -> ServiceError:
        owner = " ".join(reversed(self.parent.split("/")[-2:]))
        return missing(f"{what} was not found in {owner}.")

    def find(self, name: str, version: str) -> dict[str, Any]:
        """One version.

        Raises:
            ServiceError: 404.
        """
        if version not in self.versions.get(name, {}):
            raise self._absent(f"{self.kind.rstrip('s').title()} {name}:{version}")
        return self.versions[name][version]

    def container(self, name: str) -> dict[str, Any]:
        """What all versions share, with the latest and the next version.

        Raises:
            ServiceError: 404.
        """
        made = self.versions.get(name)
        if not made:
            raise self._absent(f"{self.kind.rstrip('s').title()} container {name}")
        first = next(iter(made.values()))
        latest = max(made.values(), key=lambda one: one["systemData"]["createdAt"])
        numbers = [int(version) for version in made if version.isdigit()]
        properties = {
            "description": None,
            "tags": {},
            "properties": {},
            "isArchived": False,
            "latestVersion": latest["name"],
            "nextVersion": str(max(numbers, default=0) + 1),
        }
        return self._resource(name, properties, systemData=first["systemData"])

    def listed(self, name: str, query: dict[str, str]) -> list[dict[str, Any]]:
        """The versions of `name` in the order that the query asks for.

        Raises:
            ServiceError: 404 in a workspace; in a registry the list is empty then.
        """
        if "/workspaces/" in self.parent:
            self.container(name)
        found = [one for one in self.versions.get(name, {}).values() if _shown(one, query)]
        found.sort(
            key=lambda one: str(one["systemData"]["createdAt"]),
            reverse=query.get("$orderBy", "createdtime desc").endswith("desc"),
        )
        return found

    def put(self, name: str, version: str, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Make a version, or change what may be changed; also says whether it is new.

        Raises:
            ServiceError: 400 for a name, a property, or a change of what is fixed.
        """
        for text in (name, version):
            if not NAME.fullmatch(text):
                raise bad(f"Invalid asset name or version: {text}")
        if self.numbered and not re.fullmatch(r"[1-9]\d{0,9}", version):
            raise bad(f"The version of a model must be a positive integer, but is {version}.")
        for key in ("tags", "properties"):
            pairs = given.get(key) or {}
            if any(isinstance(v, dict | list) for v in pairs.values()):
                raise bad(f"The values of {key} must be strings.")
        old = self.versions.get(name, {}).get(version)
        new = {**self.defaults, **{k: v for k, v in given.items() if v is not None}}
        if old and any(_plain(old["properties"].get(k)) != _plain(new.get(k)) for k in self.fixed):
            raise bad(
                f"A {self.kind.rstrip('s')} with this name and version already exists. If you are "
                "trying to create a new one, use a different name or version. If you are trying "
                "to update an existing one, the existing asset's data uri and properties cannot be "
                "changed. Only tags, description, and isArchived can be updated.",
            )
        created = old["systemData"]["createdAt"] if old else now()
        self.versions[name][version] = self._resource(
            f"{name}/versions/{version}",
            {**new, "provisioningState": "Succeeded"},
            systemData=system_data(created, now()),
        )
        return self.versions[name][version], old is None


def _plain(value: Any) -> Any:
    """No value and an empty one are the same."""
    return value or None


def _shown(asset: dict[str, Any], query: dict[str, str]) -> bool:
    view = query.get("listViewType", "ActiveOnly")
    archived = bool(asset["properties"].get("isArchived"))
    return view == "All" or archived == (view == "ArchivedOnly")
