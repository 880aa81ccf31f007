"""Runs that are killed, stopped, out of disk space, damaged, lied to about the time; they all go on as if undisturbed.

    python -m pytest tests/test_faults.py                                     one trial of the short ones
    python -m pytest -m "faults or not faults" tests/test_faults.py --trials 10 --fault-report FILE       make test-faults

Exactly: every loss in metrics.jsonl is, to the bit, that of a run which nobody disturbed; on other devices within 1e-5.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import Tally, can_mount, damages_of, flip_a_bit, same_files
from workshop import (
    EXPERIMENTS,
    STEPS,
    Workshop,
    assert_close_losses,
    assert_same_losses,
    last_step,
    saved_steps,
    wait_until,
)

from mom_jax.checkpoint import Checkpoints, find_step
from mom_jax.token_files import TokenFile


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def tally(request):
    tally = Tally()
    yield tally
    if request.config.option.fault_report:
        tally.write(Path(request.config.option.fault_report))


@pytest.fixture(scope="session")
def trials(request):
    return request.config.option.trials


def progress(directory: Path) -> tuple[int, int]:
    return last_step(directory), max(saved_steps(directory), default=0)


# SIGKILL


@pytest.mark.parametrize("name", ["windows", "packed"])
def test_a_killed_run_resumes_to_the_same_bits(workshop, tmp_path, name, tally, trials):
    """SIGKILL at random moments, whatever the run does then, again and again until it gets through."""
    expected, kills, runs = workshop.uninterrupted(name), 0, 0
    while kills < trials:
        output, runs = tmp_path / str(runs), runs + 1
        command, is_over = workshop.train(name, output), False
        while not is_over:
            process = workshop.start(command)
            before, goal = progress(output), (last_step(output) or 3) + random.randint(0, 5)
            while process.poll() is None and kills < trials and last_step(output) < min(goal, STEPS - 1):
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.2))
            if kills == trials or process.poll() is not None:
                _, stderr = process.communicate()
                assert process.returncode == 0, stderr
                is_over = True
                continue
            process.kill()
            process.communicate()
            if process.returncode == 0:
                is_over = True
                continue
            kills += 1
            with tally.trial(f"SIGKILL in training, {name}"):
                assert progress(output)[1] >= before[1], "a checkpoint has gone"
        with tally.trial(f"run of {name} killed on its way, losses to the bit"):
            assert_same_losses(output, expected)


ENDLESS_SAVES = """
import sys, jax
from mom_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=2)
for step in range(1, 10_000):
    checkpoints.save(step, {"x": jax.random.normal(jax.random.key(step), (1 << 20,))}, config={})
    if step == 3:
        print("under way", flush=True)
"""


def test_a_run_killed_in_a_save_leaves_a_whole_checkpoint(tmp_path, tally, trials):
    """SIGKILL at random moments of back-to-back asynchronous saves; the newest is exact and the next can be saved."""
    command = [sys.executable, "-c", ENDLESS_SAVES]
    for number in range(trials + 2):
        directory = tmp_path / str(number)
        run = subprocess.Popen([*command, directory], stdout=subprocess.PIPE, text=True)
        assert run.stdout.readline() == "under way\n"
        time.sleep(random.uniform(0, 0.3))
        run.kill()
        assert run.wait() == -signal.SIGKILL
        run.stdout.close()
        with (
            tally.trial("SIGKILL in an asynchronous save"),
            warnings.catch_warnings(action="ignore"),
            Checkpoints(directory) as checkpoints,
        ):
            wanted = {"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
            step, state = checkpoints.restore(wanted, config={})
            expected = jax.random.normal(jax.random.key(step), (1 << 20,))
            assert step >= 2
            np.testing.assert_array_equal(state["x"], expected)
            checkpoints.save(step + 1, {"x": expected}, config={})
            assert checkpoints.restore(wanted, config={})[0] == step + 1
        shutil.rmtree(directory)


def test_a_killed_preparation_leaves_nothing_or_all(tmp_path, tally, trials):
    """SIGKILL at a random moment of prepare_text.py's writing; the same command again gives the same files."""
    generator = random.Random(0)
    text = "".join(generator.choices("abcde \n", k=2_000_000))
    (tmp_path / "text.txt").write_text(text)

    def command(output: Path) -> list[str]:
        flags = ["--inputs", str(tmp_path / "text.txt"), "--tokenizer", "bytes", "--output", str(output)]
        return [sys.executable, str(EXPERIMENTS / "prepare_text.py"), *flags]

    expected = tmp_path / "expected"
    process = subprocess.Popen(command(expected), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: list(tmp_path.glob(".expected.partial-*")), process)
    start = time.monotonic()
    assert process.wait() == 0
    longest = time.monotonic() - start
    process.stderr.close()
    for number in range(trials):
        output = tmp_path / f"out_{number}"
        process = subprocess.Popen(command(output), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        wait_until(lambda name=output.name: list(tmp_path.glob(f".{name}.partial-*")), process)
        time.sleep(random.uniform(0, longest))
        process.kill()
        process.communicate()
        with tally.trial("SIGKILL in data preparation"):
            if not output.exists():
                subprocess.run(command(output), check=True, capture_output=True)
            assert same_files(output, expected)


# A full disk


def test_a_full_disk_in_a_save_keeps_the_checkpoint_before(workshop, tmp_path, tally, trials):
    """A limit on the size of files, set while the run goes, stands for a full disk."""
    expected = workshop.uninterrupted("windows")
    for number in range(trials):
        output = tmp_path / str(number)
        process = workshop.start(workshop.train("windows", output))
        goal = random.choice((3, 6, 9))
        wait_until((output / "checkpoints" / str(goal)).exists, process)
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024, hard))
        _, stderr = process.communicate()
        with tally.trial("disk full in a save (size of files limited)"):
            assert process.returncode == 1 and "train_lm.py: error: " in stderr, stderr  # after Orbax's own tracebacks
            assert saved_steps(output)[-1] >= goal
            workshop.run(workshop.train("windows", output))
            assert_same_losses(output, expected)


FULL_DISK = """
mount -t tmpfs -o size=$1k tmpfs "$2" && cd /
"${@:3}" 2> "$2.stderr"; echo "status $?"
mount -o remount,size=1g "$2"
"${@:3}" || exit
cp -r "$2" "$2.copy"
"""


@pytest.mark.faults
@pytest.mark.skipif(not can_mount(), reason="needs Linux user namespaces, to mount a small file system: make test-faults")
def test_a_file_system_without_room_keeps_the_checkpoint_before(workshop, tmp_path, tally, trials):
    """A tmpfs that has room for two or three checkpoints; then it grows, and the same command goes on."""
    expected = workshop.uninterrupted("windows")
    size = sum(path.stat().st_size for path in (expected / "checkpoints").rglob("*")) // len(saved_steps(expected)) // 1024
    for number in range(trials):
        output = tmp_path / str(number)
        output.mkdir()
        room = random.randint(round(1.2 * size), round(2.5 * size))
        script = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", str(room), str(output)]
        environment = workshop.environment | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        train = workshop.train("windows", output)
        result = subprocess.run([*script, *train], env=environment, capture_output=True, text=True)
        stderr = Path(f"{output}.stderr").read_text()
        with tally.trial("disk full in a save (tmpfs)"):
            assert result.returncode == 0 and result.stdout.startswith("status 1\n"), result.stderr
            assert re.search("train_lm.py: error: .*No space left on device", stderr), stderr  # after Orbax's own tracebacks
            assert_same_losses(Path(f"{output}.copy"), expected)


# Damaged files


def test_damage_to_any_file_of_a_checkpoint_is_noticed_and_the_one_before_is_used(workshop, tmp_path, tally):
    """What Orbax writes beside the checksums, at the top of a checkpoint, is not needed, and its damage harmless."""
    run = shutil.copytree(workshop.uninterrupted("windows"), tmp_path / "run")
    checkpoints, kinds = run / "checkpoints", set()
    before, newest = saved_steps(run)[-2:]
    for damage, file in damages_of(checkpoints / str(newest)):
        kind = file.relative_to(checkpoints / str(newest)).parts[0]
        kinds.add(kind)
        with tally.trial(f"checkpoint file {damage}"):
            if kind in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                assert find_step(checkpoints) == newest
            else:
                with pytest.warns(UserWarning, match=f"skipping the damaged checkpoint .*/{newest}: "):
                    assert find_step(checkpoints) == before
    assert kinds >= {"state", "run", "data_iterator", "checksums.json"}


def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_goes_on_exactly(workshop, tmp_path, tally, trials):
    expected = workshop.uninterrupted("windows")
    stopped = tmp_path / "stopped"
    workshop.run(workshop.train("windows", stopped, "--train.stop-after", "9", "--train.eval-every", "6"))
    for number in range(trials):
        output = shutil.copytree(stopped, tmp_path / str(number))
        file = random.choice([path for path in (output / "checkpoints" / "9").glob("*/**/*") if path.is_file()])
        flip_a_bit(file)
        with tally.trial("run continued past a damaged checkpoint"):
            stderr = workshop.run(workshop.train("windows", output)).stderr
            assert f"skipping the damaged checkpoint {output / 'checkpoints' / '9'}: missing, added or changed" in stderr
            assert (output / "checkpoints" / "9.damaged").exists()
            assert_same_losses(output, expected)


def test_a_corrupted_token_file_is_refused(workshop, tmp_path, tally, trials):
    data = shutil.copytree(workshop.data, tmp_path / "data")
    for _ in range(20 * trials):
        file = data / random.choice(("train.tokens", "valid.tokens", "train.documents", "valid.documents"))
        whole = file.read_bytes()
        position = random.randrange(len(whole))
        flipped = whole[:position] + bytes([whole[position] ^ 1 << random.randrange(8)]) + whole[position + 1 :]
        for damage, content in (("bit flipped", flipped), ("truncated", whole[:position]), ("lengthened", whole + b"\0")):
            file.write_bytes(content)
            with tally.trial(f"token file {damage}"), pytest.raises(ValueError, match=file.name):
                TokenFile(file.with_suffix(".tokens")).verify()
        file.write_bytes(whole)
    flip_a_bit(data / "train.tokens")
    with tally.trial("training on a corrupted token file"):
        command = workshop.train("windows", tmp_path / "run", "--data.path", str(data))
        stderr = workshop.run(command, status=1).stderr
        assert re.search("error: .*train.tokens: (sha256|token) ", stderr) and "Traceback" not in stderr
        assert not (tmp_path / "run").exists()


# Signals with a deadline


def test_sigterm_saves_and_the_run_goes_on_exactly(workshop, tmp_path, tally, trials):
    expected = workshop.uninterrupted("windows")
    for number in range(trials):
        output = tmp_path / str(number)
        flags = ["--train.checkpoint-every", "100", "--train.preemption-deadline", "100"]
        process = workshop.start(workshop.train("windows", output, *flags))
        goal = random.randint(2, 8)
        wait_until(lambda output=output, goal=goal: last_step(output) >= goal, process)
        process.terminate()
        _, stderr = process.communicate()
        with tally.trial("SIGTERM"):
            assert process.returncode == 128 + signal.SIGTERM
            (step,) = re.findall(
                r"^SIGTERM: saved step (\d+); the same command continues from there$", stderr, re.MULTILINE
            )
            assert goal <= int(step) < STEPS
            assert saved_steps(output) == [int(step)]
            workshop.run(workshop.train("windows", output))
            assert_same_losses(output, expected)


def test_a_deadline_that_the_save_cannot_keep_ends_the_run_with_the_checkpoint_before(workshop, tmp_path, tally, trials):
    expected = workshop.uninterrupted("windows")
    for number in range(trials):
        output = tmp_path / str(number)
        process = workshop.start(workshop.train("windows", output, "--train.preemption-deadline", "0.001"))
        wait_until((output / "checkpoints" / "3").exists, process)
        wait_until(lambda output=output: last_step(output) >= 3, process)
        process.terminate()
        _, stderr = process.communicate()
        with tally.trial("SIGTERM with a deadline too short"):
            assert process.returncode == 128 + signal.SIGTERM
            assert "SIGTERM: the run has not saved within 0.001 s and ends; the checkpoint of step" in stderr
            assert saved_steps(output)[-1] >= 3
            workshop.run(workshop.train("windows", output))
            assert_same_losses(output, expected)


STUCK = """
import ctypes
from mom_jax.stopping import StopSignal
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with StopSignal(0.2, lambda: "the checkpoint of step 3 is kept"):
    print("under way", flush=True)
    lock(mutex)
    lock(mutex)  # for ever, and Python delivers no signal
"""


def test_the_deadline_holds_while_the_program_is_stuck(tally):
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "under way\n"
    process.terminate()
    with tally.trial("SIGTERM to a stuck program"):
        _, stderr = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert "SIGTERM: the run has not saved within 0.2 s and ends; the checkpoint of step 3 is kept" in stderr


# The clock

CLOCKS = {
    "frozen": "lambda: 1e9",
    "running backwards": "lambda: 2e9 - 60 * next(calls)",
    "jumping": "lambda: real() + (-1) ** next(calls) * 1e6",
}


def with_clock(clock: str, directory: Path) -> dict[str, str]:
    """The environment in which Python's time.time is wrong, but for process 1 of several."""
    program = f"""
import itertools, sys, time
calls, real = itertools.count(), time.time
if sys.orig_argv[-2:] != ["--distributed.process-id", "1"]:
    time.time = {CLOCKS[clock]}
    time.time_ns = lambda: int(1e9 * time.time())
"""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}


@pytest.mark.parametrize(
    "clock", [pytest.param(clock, marks=[] if clock == "jumping" else pytest.mark.faults) for clock in CLOCKS]
)
def test_a_wrong_clock_changes_nothing(workshop, tmp_path, clock, tally):
    """Of Python's time.time, which all of Python's part of a run sees; stopped in between, so that it also restores."""
    output, environment = tmp_path / "run", with_clock(clock, tmp_path / "lies")
    with tally.trial(f"clock {clock}"):
        for flags in (["--train.stop-after", "9", "--train.eval-every", "9"], []):
            workshop.run(workshop.train("windows", output, *flags), **environment)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["split"] == "train"] == list(range(1, STEPS + 1))
        assert_close_losses(output, workshop.uninterrupted("windows"), limit=0)


# Several devices and processes


@pytest.mark.faults
def test_several_devices_resume_to_the_same_bits(workshop, tmp_path, tally, trials):
    flags, environment = ["--mesh.fsdp", "2", "--mesh.memory", "2"], {"JAX_NUM_CPU_DEVICES": "4"}
    expected = tmp_path / "expected"
    workshop.run(workshop.train("windows", expected, *flags), **environment)
    for number in range(trials):
        output = tmp_path / str(number)
        for stop in (random.choice((6, 12)), STEPS):
            workshop.run(workshop.train("windows", output, *flags, "--train.stop-after", str(stop)), **environment)
        with tally.trial("resumed on the same four devices, losses to the bit"):
            assert_same_losses(output, expected)


@pytest.mark.faults
def test_two_processes_resume_to_the_same_bits_whatever_the_clock_of_one(workshop, tmp_path, tally):
    """Time jumps in process 0, which judges and renames checkpoints, and not in process 1."""
    expected, output = tmp_path / "expected", tmp_path / "run"
    lies = with_clock("jumping", tmp_path / "lies")
    for directory, stop, environment in ((expected, STEPS, {}), (output, 6, lies), (output, STEPS, lies)):
        flags = ["--mesh.fsdp", "2", "--train.stop-after", str(stop)]
        with workshop.start_team(2, "windows", directory, *flags, **environment) as team:
            assert team.wait() == [0, 0], team.log(0)
    with tally.trial("resumed on the same two processes, the clock of one jumping, losses to the bit"):
        assert_same_losses(output, expected)


@pytest.mark.faults
def test_other_meshes_go_on(workshop, tmp_path, tally):
    output, stops = tmp_path / "run", (
        (1, 4, []), (4, 8, ["--mesh.data", "2", "--mesh.memory", "2"]), (2, 12, ["--mesh.tensor", "2"]),
        (2, 15, ["--mesh.sequence", "2"]), (2, STEPS, ["--mesh.fsdp", "2"]),
    )  # fmt: skip
    for devices, stop, flags in stops:
        command = workshop.train("windows", output, "--train.stop-after", str(stop), *flags)
        workshop.run(command, JAX_NUM_CPU_DEVICES=str(devices))
    with tally.trial("resumed on other devices and meshes"):
        assert_close_losses(output, workshop.uninterrupted("windows"))


@pytest.mark.faults
def test_two_then_one_then_four_processes_train_as_one(workshop, tmp_path, tally):
    output, expected = tmp_path / "run", workshop.uninterrupted("windows")
    teams = [
        (2, 2, 6, ["--mesh.data", "2", "--mesh.memory", "2"]),
        (1, 1, 12, []),
        (4, 1, STEPS, ["--mesh.fsdp", "2", "--mesh.memory", "2"]),
    ]
    for count, devices, stop, flags in teams:
        flags += ["--train.stop-after", str(stop)]
        with workshop.start_team(count, "windows", output, *flags, JAX_NUM_CPU_DEVICES=str(devices)) as team:
            assert team.wait() == [0] * count, team.log(0)
    with tally.trial("resumed on another number of processes"):
        assert_close_losses(output, expected)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["SIGKILL of process 1", "SIGKILL of process 0", "SIGSTOP of process 1"])
def test_processes_that_lose_one_end_and_others_go_on(workshop, tmp_path, fault, tally, trials):
    """At a random moment; the rest end within the bound and say why, and a random number of processes goes on."""
    expected, bound = workshop.uninterrupted("windows"), 8
    victim, signal_name = int(fault[-1]), fault.split()[0]
    for number in range(trials):
        output = tmp_path / str(number)
        flags = ["--mesh.data", "2", "--distributed.peer-timeout", str(bound)]
        with workshop.start_team(2, "windows", output, *flags) as team:
            goal = random.randint(3, STEPS - 6)
            team.wait_until(lambda output=output, goal=goal: last_step(output) >= goal)
            time.sleep(random.uniform(0, 0.1))
            if any(process.poll() is not None for process in team.processes):
                continue  # it was faster
            team.processes[victim].send_signal(getattr(signal, signal_name))
            start = time.monotonic()
            with tally.trial(f"{fault} of two"):
                status = team.processes[1 - victim].wait()
                waited, log = time.monotonic() - start, team.log(1 - victim)
                assert status != 0 and waited < bound + 30
                assert "another process has died" in log or "another task died" in log or "working with the others" in log
        with tally.trial("run continued after the loss of a process"):
            if random.random() < 0.5:
                workshop.run(workshop.train("windows", output))
            else:
                with workshop.start_team(2, "windows", output, "--mesh.data", "2") as team:
                    assert team.wait() == [0, 0], team.log(0)
            assert_close_losses(output, expected)
            assert find_step(output / "checkpoints") == STEPS
