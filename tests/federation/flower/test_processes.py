"""Flower's processes as children: what they are told, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from folklora.errors import FederationError
from folklora.federation.flower.credentials import init
from folklora.federation.flower.daemon import LONGEST, SHORTEST, Pause
from folklora.federation.flower.processes import Daemon, environment, is_loopback, superlink


def test_a_child_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    """Killed, so that it can tell nobody: the child's standard input closes."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from folklora.federation.flower.credentials import init\n"
        "from folklora.federation.flower.processes import superlink\n"
        "home = Path(sys.argv[1])\n"
        "made = init(home / 'fed', ['a'])\n"
        "(home / 'secret').write_bytes(b'x' * 32)\n"
        "with superlink(home, home / 'secret', made.server_certificate, made.server_key, made.ca) as daemon:\n"
        "    print(daemon.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240)
    assert ended.returncode == -9, ended.stderr
    pid, waited = int(ended.stdout), subprocess.Popen(["tail", f"--pid={ended.stdout.strip()}", "-f", os.devnull])
    assert waited.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_was_killed_says_so(tmp_path: Path) -> None:
    made = init(tmp_path / "fed", ["a"])
    (tmp_path / "secret").write_bytes(b"x" * 32)
    with superlink(tmp_path, tmp_path / "secret", made.server_certificate, made.server_key, made.ca) as daemon:
        assert daemon.alive
        assert not daemon.ends(0)
        assert daemon.pid is not None
        os.kill(daemon.pid, signal.SIGKILL)
        assert daemon.ends(60)
        assert daemon.reason() == "killed by signal 9"


def test_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    daemon = Daemon("superlink", ["--ssl-certfile", "nowhere"], tmp_path)
    with pytest.raises(FederationError, match=r"superlink does not start: .*ssl-certfile.*superlink\.log"):
        daemon.start()
    assert not daemon.alive


def test_without_flower_one_line_says_what_is_missing(tmp_path: Path) -> None:
    absent = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'flwr' else f(n, *a); "
    )
    status = f"import sys; sys.argv = ['folklora', 'status', '--federation', {str(tmp_path)!r}]; "
    script = absent + status + "from folklora.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert ended.stderr == "error: a federation needs Flower: pip install 'folklora[flower]'\n"


def test_nothing_but_this_package_imports_flower() -> None:
    parts = "run, network, remote, resident, parties, faults"
    script = f"import sys, folklora.cli; from folklora.federation import {parts}; print('flwr' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert ended.stdout == "False\n", ended.stderr


def test_nothing_of_flower_reaches_out_or_touches_the_users_home(tmp_path: Path) -> None:
    told = environment(tmp_path)
    assert (told["FLWR_TELEMETRY_ENABLED"], told["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert told["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert told["FLWR_HOME"] == str(tmp_path)


def test_a_supernode_asks_often_after_work_and_seldom_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("folklora.federation.flower.daemon.time.sleep", slept.append)
    pause = Pause()
    for _ in range(30):
        pause(3)
    assert slept[0] == SHORTEST
    assert slept == sorted(slept)
    assert slept[-1] == LONGEST
    pause(0.5)  # it waits for an answer: there is work
    pause(3)
    assert slept[-1] == SHORTEST
    assert max(slept) <= 3


@pytest.mark.parametrize(
    ("host", "answer"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.org", False)]
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) == answer
