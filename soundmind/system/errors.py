"""What a person at the terminal can mend, and how a command says so.

A `UserError` names the file, the key or the row and the next step. `command` wraps the `main` of every
door: such an error, and one of the file system that names a file, ends in `error: ...` on standard
error and exit status 2, without a traceback; ctrl-C ends in one line and status 130. Anything else is
a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence

INTERRUPTED = 130
_HINTS = {
    errno.EACCES: "look at owner and mode: ls -ld",
    errno.EPERM: "look at owner and mode: ls -ld",
    errno.ENOENT: "look for it, or name another",
    errno.EEXIST: "remove it, or name another",
    errno.EISDIR: "name a file; this is a folder",
    errno.ENOTDIR: "name a folder; a part of this path is a file",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOSPC: "free some disk space, then run the same command",
    errno.EDQUOT: "free some of the quota, then run the same command",
    errno.EROFS: "name a folder on a disk that is not read-only",
    errno.ENOLCK: "name a folder on a disk with locks (an NFS server needs lockd)",
}


class UserError(Exception):
    """Something that the person at the terminal can mend; `status` is the command's exit status."""

    status = 2


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a door's `main(argv) -> exit status`; see the module."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except BrokenPipeError:
            raise  # whoever reads our output has gone: nobody is left to tell
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {explain(error)}", file=sys.stderr)
            return UserError.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return wrapped


def explain(error: OSError) -> str:
    """Two lines for an error of the file system: the file and what is wrong, where and what to do."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
    ours = [frame for frame in frames if "soundmind" in frame.filename]
    place = f" ({os.path.basename(ours[-1].filename)}:{ours[-1].lineno})" if ours else ""
    hint = _HINTS.get(error.errno or 0, "look at this path")
    return f"{os.fsdecode(error.filename)}: {error.strerror}\n  {hint}{place}"
