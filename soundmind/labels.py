"""The documented place of `LabelSet`, handed on; labels live in `soundmind.task.labels`."""

from soundmind.task.labels import LabelSet

__all__ = ["LabelSet"]
