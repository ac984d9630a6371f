import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cl_runner.lock import FolderInUseError, Lock

HOLD = """
import sys, time
from pathlib import Path
from cl_runner.lock import Lock
Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""

ASK = """
import sys
from pathlib import Path
from cl_runner.lock import Lock
sys.exit(Lock(Path(sys.argv[1])).holder is None)
"""


@pytest.fixture
def another(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_a_living_process_holds_is_not_had_and_says_whose_it_is(tmp_path, another):
    with pytest.raises(FolderInUseError, match=f"is being run by process {another.pid} on {socket.gethostname()}"):
        Lock(tmp_path).acquire()
    assert Lock(tmp_path).holder == {"pid": another.pid, "host": socket.gethostname()}


def test_a_dead_holders_lock_is_taken_over_at_once(tmp_path, another):
    another.kill()
    another.wait()
    assert (tmp_path / "lock").exists()
    assert Lock(tmp_path).holder is None
    start = time.monotonic()
    Lock(tmp_path).acquire()
    assert time.monotonic() - start < 0.2
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_two_of_one_process_keep_each_other_out(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
        Lock(tmp_path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    lock.release()


def test_asking_who_holds_a_lock_does_not_lose_it(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    assert Lock(tmp_path).holder == {"pid": os.getpid(), "host": socket.gethostname()}
    assert held_in_the_eyes_of_another(tmp_path)


def test_a_child_does_not_hold_what_its_parent_holds(tmp_path):
    """Workers of a data loader, say, may outlive a run by a moment."""
    Lock(tmp_path).acquire()
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            mine = Lock(tmp_path).holder
            os.write(tell, b"y" if mine == {"pid": os.getppid(), "host": socket.gethostname()} else b"n")
        finally:
            os._exit(0)
    assert os.read(ready, 1) == b"y"
    os.waitpid(child, 0)
    assert held_in_the_eyes_of_another(tmp_path)  # the child's end has released nothing


def test_a_lock_is_released_though_a_child_lives_on(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    child = os.fork()
    if not child:
        signal.pause()
    lock.release()
    assert not held_in_the_eyes_of_another(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def held_in_the_eyes_of_another(folder):
    return subprocess.run([sys.executable, "-c", ASK, folder], check=False).returncode == 0


def test_releasing_leaves_the_lock_of_whoever_has_a_folder_of_that_name_by_then(tmp_path):
    old = tmp_path / "run"
    old.mkdir()
    lock = Lock(old)
    lock.acquire()
    old.rename(tmp_path / "run.1")
    old.mkdir()
    (old / "lock").touch()
    lock.release()
    assert (old / "lock").exists()
