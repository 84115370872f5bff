"""Settings in YAML files."""

from __future__ import annotations

import re
from typing import Any

import yaml

from cifar_dist.errors import UserError
from cifar_dist.storage import AnyPath, at


def read_settings(file: str | AnyPath, given_by: str = "--config") -> dict[str, Any]:
    """Read the settings in a YAML file; values are checked when a config is made of them.

    Args:
        file: the YAML file.
        given_by: the flag that names it, for messages.

    Raises:
        UserError: the file is missing, is not YAML, or holds anything but settings by name.
    """
    try:
        # UTF-8 whatever the locale: the file may come from another machine.
        text = at(file).read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given_by} {file}: cannot be read ({_reason(error)})") from None
    except _Twice as error:
        raise UserError(f"{given_by} {file}: {error}; keep one of them") from None
    except yaml.YAMLError as error:
        raise UserError(f"{given_by} {file}: is not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{given_by} {file}: must hold settings by name, e.g. lr: 0.001")
    return settings


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _Twice(Exception):
    """A mapping holds a key twice."""


# Safe: YAML can name Python objects to construct, and a file from elsewhere must run no code.
class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where ``1e-3`` is text and ``1:4`` is 64 (base 60); this one
    reads numbers as YAML 1.2 does, which is what people mean. It also refuses a key that comes
    twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            # Not `<<`, which merges a mapping whose values these override.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if (same := (key.tag, key.value)) in lines:
                    raise _Twice(f"{key.value} is there twice, in lines {lines[same]} and {line}")
                lines[same] = line
        return super().construct_mapping(node, deep)


_Loader.add_constructor(
    # PyYAML's own reads 010 as 8, and raises on 08.
    "tag:yaml.org,2002:int",
    lambda loader, node: int(str(node.value)),
)
# New lists: those of `SafeLoader` are shared by all that use PyYAML in this process.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)
