"""The process of one group of checks: `python -m verification.worker GROUP DEVICE QUICK FOLDER`; see `groups.py`.

It writes a line of JSON before each check, `{"running": name}`, and one after it, `{"verdict": {...}}`.
"""

import importlib
import json
import os
import sys

from runtime.process import configure_runtime, exit_now
from verification.verdicts import Settings, judge


def main(group, device, quick, folder):
    configure_runtime()
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever Paddle and the product print is no verdict

    def tell(**what):
        told.write(json.dumps(what) + "\n")
        told.flush()

    settings = Settings(device, quick == "1", folder)
    for check in importlib.import_module(f"verification.{group}").checks(settings):
        tell(running=check.name)
        tell(verdict=judge(group, check).as_json())
    exit_now(0)  # without destructors, which may wait for other processes


if __name__ == "__main__":
    main(*sys.argv[1:])
