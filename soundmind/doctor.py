"""What is installed, what this machine has, what is missing for which command, and what mends it.

    python -m soundmind.doctor          # exit status 1 when a command cannot run

Each check is one line: what was looked at and what was found; below it, where something is missing,
the command that mends it. Nothing is installed or changed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from soundmind.run.config import config_names
from soundmind.run.doctor import CHECKS
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m soundmind.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        print(f"{'ok' if finding.ok else '--'}  {finding.what}: {finding.found}")
        if finding.mend:
            print(f"      mend it with: {finding.mend}   (without it: no {finding.blocks})")
    print(f"configurations: {', '.join(config_names(stage='all'))}")
    broken = [finding for finding in findings if not finding.ok]
    print("everything is in place" if not broken else f"{len(broken)} things to mend, see above")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
