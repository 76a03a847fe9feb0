"""Look up plug-ins by name: scorer kinds, advantage estimators, weight carriers, environment adapters, stages.

Every plug-in point of the program is one `Registry`. The run file names a registered plug-in, or a user's own by a
dotted path. To add a plug-in, register it in its own file and import that file, or register its dotted path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from cluster import user_code
from cluster.errors import InputError

T = TypeVar("T")
Registered = TypeVar("Registered")


class Registry(Generic[T]):
    """Plug-ins of one kind by name. `kind` is the noun in error messages, such as "weight carrier".

    CARRIERS: Registry[Callable[[], Carrier]] = Registry("weight carrier")
    CARRIERS.register_path("object_store", "cluster.weights.object_store:ObjectStore")
    carrier = CARRIERS.find("object_store", key="rollout_actors.weights")()
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._plugins: dict[str, T | _Path] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers what it decorates under `name`. Raises ValueError if the name is taken."""

        def add(plugin: Registered) -> Registered:
            self._add(name, cast(T, plugin))
            return plugin

        return add

    def register_path(self, name: str, path: str) -> None:
        """Register a plug-in by its dotted path: `find` imports it, so heavy modules load only if they are used."""
        self._add(name, _Path(path))

    def names(self) -> list[str]:
        """Return the registered names, in the order of their registration."""
        return list(self._plugins)

    def __contains__(self, name: object) -> bool:
        return name in self._plugins

    def __iter__(self) -> Iterator[str]:
        return iter(self._plugins)

    def find(self, name: str, *, key: str) -> T:
        """Return the plug-in of this name, or the object at a dotted path such as `my_task.carriers:mine`.

        Raises InputError naming the run file's `key`, with the registered names, if there is none.
        """
        if name in self._plugins:
            plugin = self._plugins[name]
            return cast(T, user_code.load(plugin, key)) if isinstance(plugin, _Path) else plugin
        if ":" in name:
            return cast(T, user_code.load(name, key))
        names = ", ".join(self._plugins) or "none"
        raise InputError(key, f"no {self.kind} {name!r} (registered: {names}; or a dotted path package.module:name)")

    def _add(self, name: str, plugin: T | _Path) -> None:
        if ":" in name:
            raise ValueError(f"{self.kind} {name!r}: a name must not contain ':', which marks a dotted path")
        if name in self._plugins:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._plugins[name] = plugin


class _Path(str):
    """Dotted path of a plug-in, imported on first use."""
