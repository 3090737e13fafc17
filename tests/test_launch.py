from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_work

from mu import launch, ranks
from mu.errors import MuError, Terminated
from mu.launch import on_ranks
from mu.ranks import RankError, started_local_rank, started_rank, started_world_size
from mu.verbosity import verbosity
from tests.forked_commands import Commands


@pytest.fixture(autouse=True)
def not_ignoring_ctrl_c():
    """As tests that run in the background would."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("forked_ranks")
def test_two_processes_exchange_what_they_have_and_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = on_ranks(rank_work.exchanges, None, "cpu,cpu")
    assert found["sums"] == [[[3.0, 3.0]] * 3, [0.0, 6.0], [3, 3]]
    assert found["gathered"] == [(0, 0, 2), (1, 1, 2)]
    assert found["from_main"] == 1
    assert found["on_main"] == found["pids"][0] != found["pids"][1]
    assert os.getpid() not in found["pids"]
    assert found["shares"] == [[0, 2, 4], [1, 3]]
    assert found["devices"] == ["cpu", "cpu"]
    assert found["threads"] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


SCRIPT = """
import os, sys
from beside import large
from mu.launch import on_ranks

print("the script runs")
before = dict(os.environ)
for _ in range(TURNS):
    print(len(on_ranks(large, 1_000_000, "cpu,cpu")), "bytes")
assert os.environ == before
assert "torch" not in sys.modules
"""
BESIDE = """
import os
if os.environ.get("RANK") == "0":
    import pytorch_lightning  # as a run may; in process 0 it has a word to say of the processes

def large(size):
    return bytes(size)
"""


@pytest.mark.parametrize("how", ["script", "prompt"])
def test_a_script_without_a_guard_and_a_python_prompt_start_processes(tmp_path, how):
    """The caller's code is run once, its environment is what it was, and torch (and so CUDA) is left to the others."""
    path = tmp_path / "script.py"
    turns = 2 if how == "script" else 1  # also after another one
    path.write_text(SCRIPT.replace("TURNS", str(turns)))
    (tmp_path / "beside.py").write_text(BESIDE)
    arguments, typed = (
        ([str(path)], "") if how == "script" else (["-i"], f"exec(open({str(path)!r}).read())\n")
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, *arguments], env=environ, input=typed, capture_output=True, text=True, timeout=300
    )
    # torch 2.8 says there how gloo has connected
    printed = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert printed == ["the script runs", *["1000000 bytes"] * turns], done.stderr
    assert "Error" not in done.stderr
    assert "distributed" not in done.stderr, "Lightning's announcements"


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("loudness", [{}, {"quiet": True}, {"json": True}], ids=["plain", "quiet", "json"])
def test_what_libraries_print_is_not_among_json_or_paths(loudness, capfd):
    with verbosity(**loudness):
        on_ranks(rank_work.prints, None, "cpu,cpu")
    out, error = capfd.readouterr()
    assert (error if loudness else out).count("[Gloo] connected") == 2
    assert out == "" or not loudness


def test_one_device_is_this_process_alone():
    found = on_ranks(rank_work.exchanges, None, "cpu")
    assert found["sums"] == [[[1.0, 1.0]] * 3, [0.0, 2.0], [1, 1]]
    assert found["pids"] == [os.getpid()]
    assert found["shares"] == [[0, 1, 2, 3, 4]]


@pytest.mark.usefixtures("forked_ranks")
def test_an_error_of_the_main_process_is_raised_in_all():
    with pytest.raises(MuError) as caught:
        on_ranks(rank_work.main_fails, None, "cpu,cpu")
    assert str(caught.value).count("lr: too large") == 2


@pytest.mark.usefixtures("forked_ranks")
def test_an_error_of_another_process_comes_back_as_it_was(tmp_path):
    with pytest.raises(MuError, match="rank 1 cannot read its image"):
        on_ranks(rank_work.one_fails, str(tmp_path / "other"), "cpu,cpu")
    assert (tmp_path / "other").read_text() == "done"
    with pytest.raises(MuError, match="only rank 1 knows"):
        on_ranks(rank_work.one_fails_alone, None, "cpu,cpu")


@pytest.mark.usefixtures("forked_ranks")
def test_a_crash_comes_back_with_its_traceback():
    with pytest.raises(RankError, match="KeyError: 'surprise'"):
        on_ranks(rank_work.one_crashes, None, "cpu,cpu")


@pytest.mark.usefixtures("forked_ranks")
def test_a_killed_process_is_named_and_the_other_does_not_stay():
    with pytest.raises(RankError, match="process 1 of the run was ended by SIGKILL"):
        on_ranks(rank_work.one_is_killed, None, "cpu,cpu")


@pytest.mark.usefixtures("forked_ranks")
def test_a_process_that_waits_for_a_failed_one_is_ended_and_not_blamed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    path = tmp_path / "waiting"
    with pytest.raises(RankError, match="KeyError: 'surprise'"):
        on_ranks(rank_work.one_hangs, str(path), "cpu,cpu")
    assert time.time() - path.stat().st_mtime < 60  # the one that waits does so for 120 s
    assert not _alive(int(path.read_text()))


def torchrun_on_one_node(rank, port):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in (places | meeting).items()}


def srun_on_two_nodes(rank, port):
    step = {
        "JOB_ID": 12,
        "STEP_ID": 0,
        "STEP_NUM_TASKS": 2,
        "STEP_TASKS_PER_NODE": "1(x2)",
        "PROCID": rank,
        "LOCALID": 0,
    }
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {f"SLURM_{name}": str(value) for name, value in step.items()} | meeting


@pytest.mark.parametrize(
    ("start", "devices", "local_ranks"),
    [(torchrun_on_one_node, "cpu,cpu", (0, 1)), (srun_on_two_nodes, "cpu", (0, 0))],
)
def test_where_others_start_the_processes_one_run_comes_after_the_other(
    start, devices, local_ranks, commands, tmp_path
):
    port = _free_port()
    tasks = [(devices, start(rank, port)) for rank in (0, 1)]
    found = _at_once(commands, tmp_path, "again_and_again", tasks)
    assert found == [[[[10 * turn + rank, local_ranks[rank]] for rank in (0, 1)] for turn in range(10)]] * 2


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_before_the_processes_have_begun_is_no_failure(tmp_path, number, raised, capfd, monkeypatch):
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    started, started_once = subprocess.Popen, []

    def start(*args, **kwargs):
        if not started_once:
            timer.start()
        started_once.append(1)
        return started(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(raised):
        on_ranks(rank_work.wait_for_signal, str(tmp_path / "ready"), "cpu,cpu")
    assert "Traceback" not in capfd.readouterr().err


def test_nobody_else_is_given_the_port_where_the_processes_meet(monkeypatch, commands):
    started = commands.rank

    def start(*args, env, **kwargs):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(env["MASTER_PORT"])))
        return started(*args, env=env, **kwargs)

    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    assert on_ranks(rank_work.exchanges, None, "cpu,cpu")["from_main"] == 1


def test_two_steps_of_a_slurm_job_meet_at_two_ports(commands, tmp_path):
    steps = [{"SLURM_STEP_ID": step} for step in ("0", "1")]
    step = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "first,second"}
    found = _at_once(commands, tmp_path, "meeting_of_a_step", [step | each for each in steps])
    assert [place["inside"][:2] for place in found] == [["first", "1"]] * 2
    assert found[0]["inside"][2] != found[1]["inside"][2]
    assert [place["after"] for place in found] == [[], []], "the environment is what it was"


def test_in_a_group_of_the_callers_the_run_is_one_of_it(commands, tmp_path):
    port = _free_port()
    places = [(rank, port) for rank in (0, 1)]
    assert _at_once(commands, tmp_path, "in_the_callers_group", places) == [[0, 1], [0, 1]]


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_is_handed_on_and_raised_when_all_have_ended(tmp_path, number, raised):
    path = tmp_path / "ready"
    pids = []

    def send():
        pids.extend(_ready(path))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(raised):
        on_ranks(rank_work.wait_for_signal, str(path), "cpu,cpu")
    thread.join()
    assert len(pids) == 2
    assert not any(_alive(pid) for pid in pids)


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path, commands):
    path = tmp_path / "ready"
    parent = commands.call("starts_two", str(path), tmp_path / "parent")
    pids = _ready(path)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlived the one that started it"
        time.sleep(0.1)


def test_a_rank_is_read_from_the_environment_of_torchrun_and_slurm():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert (started_rank(torchrun), started_world_size(torchrun)) == (0, 1)
    torchrun["TORCHELASTIC_RUN_ID"] = "none"
    assert (started_rank(torchrun), started_world_size(torchrun)) == (3, 4)
    assert started_local_rank(torchrun) == 1
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert (started_rank(slurm), started_world_size(slurm)) == (5, 8)
    assert started_local_rank(slurm) == 1
    uneven = {**slurm, "SLURM_STEP_TASKS_PER_NODE": "5,3"}
    assert (started_rank(uneven), started_local_rank(uneven), started_world_size(uneven)) == (5, 0, 8)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "unlearn"}
    assert (started_rank(batch_script), started_world_size(batch_script)) == (0, 1)
    srun_in_salloc = {**slurm, "SLURM_JOB_NAME": "interactive"}
    assert (started_rank(srun_in_salloc), started_world_size(srun_in_salloc)) == (5, 8)
    prompt = {**slurm, "SLURM_STEP_ID": "4294967290"}
    assert (started_rank(prompt), started_world_size(prompt)) == (0, 1)
    assert (started_rank({}), started_world_size({})) == (0, 1)


def test_alone_every_exchange_gives_back_what_went_in():
    assert ranks.gathered("a") == ["a"]
    assert ranks.from_main("a") == ranks.on_main(lambda: "a") == "a"
    with pytest.raises(MuError, match="mine"), ranks.in_step():
        raise MuError("mine")


def _at_once(commands: Commands, folder: Path, function: str, arguments: Sequence[object]) -> list[object]:
    """What a function of `rank_work` returns in several processes, one for each argument."""
    results = [folder / f"{number}.json" for number in range(len(arguments))]
    started = [commands.call(function, *each) for each in zip(arguments, results, strict=True)]
    for command in started:
        assert command.wait() == 0, command.output()
    return [json.loads(result.read_text()) for result in results]


def _ready(path: Path) -> list[int]:
    """The numbers of both processes, when they have come to where they wait."""
    files = [Path(f"{path}-{rank}") for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/status").read_text().split("State:")[1][:4]
