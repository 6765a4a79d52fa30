"""What a sandbox begins on, where that is not the host as it is: a kept layer, which any number of them may share.

It lies between the host's trees and what the sandbox writes, and is only read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from corral.errors import CorralError, RequestError
from corral.sandbox import paths
from corral.sandbox.layer import KeptLayer, open_layer, opened, reap_partials


@dataclass(slots=True)
class Base:
    """A kept layer that is in use: it is not removed until it is closed."""

    layer: KeptLayer
    directory: int
    """Its own, locked."""
    parts: Mapping[str, str]
    """Where its parts lie on the host, by their paths inside."""
    _place: str
    _held: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Nothing reads it any more. May be called again."""
        if self.directory >= 0:
            self.directory = -1
            self._held.close()
            with suppress(CorralError, OSError):
                if not os.path.exists(self._place):  # it was discarded meanwhile
                    reap_partials()


def open_base(identifier: str, workspace: str) -> Base:
    """A layer to begin on. Raises RequestError where there is none, or it is of another workspace."""
    with ExitStack() as stack:
        directory = stack.enter_context(opened(identifier))
        layer = open_layer(identifier)
        if layer.workspace != workspace:
            raise RequestError(f"the layer {identifier} is of the workspace {layer.workspace}, not of {workspace}")
        place = os.path.join(paths.state_directory(), "layers", identifier)
        parts = {part.path: os.path.join(place, "parts", part.name) for part in layer.parts}
        return Base(layer, directory, parts, place, stack.pop_all())
