"""Runs that are killed: a script for `test_resume.py`, which starts it in a process of its own.

    python crash_driver.py PLAN.json

The plan is a list of jobs ``{"recipe": TOML file, "out": run directory, "kill": fraction or null}``. Each is carried
out in a forked child: it runs the recipe, or resumes it if the directory is there. An *event* is a client's training
coming to its end, or a change to the disk (fsync, rename, removal); a child that is to be killed sends itself SIGKILL
instead of the event that lies at this fraction of those of the recipe's last job that was not killed. Nothing is
flushed, no handler runs. One JSON line a job is printed: how the child ended, and how many events it saw or which one
it did not live to see.

Forking spares importing PyTorch for every kill; `test_resume.py` sees to it that libraries start no threads, so that a
fork is safe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from folklora.federation.member import Member
from folklora.federation.run import resume, run
from folklora.federation.setup import prepare
from folklora.recipe import Recipe


def count_events(kill: int | None, pipe: int) -> Callable[[], int]:
    """Patch what makes events; returns how many there were."""
    seen = 0

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if seen == kill:
                os.write(pipe, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return original(*args, **kwargs)

        setattr(owner, name, replacement)

    for owner, name in ((Member, "finish"), (os, "sync"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
        watch(owner, name)
    return lambda: seen


def child(job: dict[str, Any], kill: int | None, pipe: int) -> None:
    events = count_events(kill, pipe)
    out = Path(job["out"])
    if (out / "recipe.toml").exists():
        resume(out)
    else:
        run(Recipe.read(job["recipe"]), out)
    os.write(pipe, str(events()).encode())


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for path in {job["recipe"] for job in jobs}:
        prepare(Recipe.read(path))  # loads the backbone once, for all children
    events: dict[str, int] = {}
    for job in jobs:
        kill = None if job["kill"] is None else int(job["kill"] * events[job["recipe"]])
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(job, kill, writing)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        said = b""
        while part := os.read(reading, 1000):
            said += part
        os.close(reading)
        _, status = os.waitpid(pid, 0)
        ended = "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else str(status)
        if ended == "0" and kill is None:
            events[job["recipe"]] = int(said)
        print(json.dumps({"ended": ended, "said": said.decode()}), flush=True)


if __name__ == "__main__":
    main()
