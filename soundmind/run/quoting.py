"""Overrides whose values Hydra's grammar takes for its own: how to write them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def quoting_hint(overrides: Sequence[str]) -> str | None:
    """How to write the first override whose value Hydra's grammar does not take as it stands."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            # `a,b` is a sweep over two values.
            if not OverridesParser.create().parse_override(override).is_sweep_override():
                continue
        except HydraException:
            pass
        if equals and value[:1] not in ("'", '"', "[", "{"):
            escaped = value.replace("'", "\\'")
            quoted = f"{key}='{escaped}'"
            plain = not set('"$`\\!') & set(quoted)
            quoted = f'"{quoted}"' if plain else shlex.quote(quoted)
            return (
                f"override {override!r}: Hydra reads some of these characters as its own; quote the "
                f"value, and the whole for the shell: {quoted}"
            )
    return None
