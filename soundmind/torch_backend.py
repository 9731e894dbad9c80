"""Where an older version's entry point sends `import torch`; handed on, so that a check can name it.

PyTorch would otherwise end every process that imports it, with a traceback that says nothing of the
mend; `soundmind.plugin.environment.stale_installation` says it.
"""

from soundmind.plugin.torch_entry import load_backend as load

__all__ = ["load"]
