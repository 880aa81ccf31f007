"""Several real processes on this machine: which rows each reads, what they agree on, and that they train as one does."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import evaluate
import jax
import numpy as np
import pytest
from workshop import STEPS, Team, Workshop, assert_close_losses, last_step, saved_steps

import mom_jax
from mom_jax.checkpoint import Checkpoints
from mom_jax.generation import generate
from mom_jax.processes import MARGIN, DistributedConfig, PeerLost, raising
from mom_jax.sampling import Sampling


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"))


# The settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "here:1234"}, "num_processes = None .* coordinator, num_processes, process_id go together"),
        ({"num_processes": 2, "process_id": 0}, "DistributedConfig.coordinator = None .* go together"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "coordinator = 'here' .* must be HOST:PORT"),
        ({"coordinator": "here:70000", "num_processes": 2, "process_id": 0}, "'here:70000' .* must be HOST:PORT"),
        ({"coordinator": "here:1", "num_processes": 0, "process_id": 0}, "num_processes = 0 .* must be > 0"),
        ({"coordinator": "here:1", "num_processes": 2, "process_id": 2}, r"process_id = 2 .* must be in \[0, 2\)"),
        ({"auto": True, "process_id": 0}, "process_id = 0 .* auto finds it"),
        ({"peer_timeout": 0}, "peer_timeout = 0 .* must be > 0"),
        ({"join_timeout": -1}, "join_timeout = -1 .* must be > 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_without_a_cluster_auto_is_refused(workshop, tmp_path):
    stderr = workshop.run(workshop.train("windows", tmp_path / "run", "--distributed.auto"), status=1).stderr
    assert "error: --distributed.auto = True is not allowed: JAX recognises no cluster here" in stderr
    assert not (tmp_path / "run").exists()


# What they agree on

PROGRAM = """if True:
    import json, signal, sys, tempfile
    from pathlib import Path
    from mom_jax import processes
    from mom_jax.config import MeshConfig
    from mom_jax.processes import DistributedConfig, join, on_first, require_same, require_shared, row_share
    from mom_jax.sharding import make_mesh
    from mom_jax.stopping import StopSignal, Vote
    import jax

    join(DistributedConfig(**json.loads(sys.argv[1]), join_timeout=120))
    me, found = jax.process_index(), {}
    for sizes in json.loads(sys.argv[2]):
        try:
            found[json.dumps(sizes)] = row_share(make_mesh(MeshConfig(**sizes)))
        except ValueError as error:
            found[json.dumps(sizes)] = str(error)
    found["on_first"] = on_first(lambda: {"said by": me, "text": "x" * 100})
    try:
        on_first(lambda: {}["of process %d" % me])
    except KeyError as error:
        found["error"] = str(error)
    processes.SEEN = 0.5
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as other:
        for name, check in {
            "same": lambda: require_same({"data": {"seed": 0}}),
            "settings": lambda: require_same({"data": {"seed": me, "rows": 4}}),
            "shared": lambda: require_shared(Path(on_first(lambda: own)) / "run"),
            "directories": lambda: require_shared(Path(other)),
        }.items():
            try:
                found[name] = check()
            except ValueError as error:
                found[name] = str(error)
        on_first(lambda: None)  # before the directory of process 0 goes
    with StopSignal() as stop:
        vote = Vote(stop, make_mesh(MeshConfig(data=jax.device_count())))
        before = vote.outcome(vote.cast())
        if me == jax.process_count() - 1:
            signal.raise_signal(signal.SIGTERM)
        found["votes"] = [before, vote.outcome(None), vote.outcome(vote.cast())]
    print("found " + json.dumps(found), flush=True)
"""


MESHES = (
    {"data": 4}, {"fsdp": 4}, {"data": 2, "memory": 2}, {"memory": 4}, {"sequence": 4}, {"data": 2, "fsdp": 2}, {"data": 2},
)  # fmt: skip


def run_program(settings: list[dict], environments: list[dict], devices: int, meshes=MESHES) -> list[dict]:
    """What each process of PROGRAM found, of ``devices`` devices each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(own), json.dumps(meshes)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | extra,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own, extra in zip(settings, environments, strict=True)
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [json.loads(re.search("^found (.*)$", stdout, re.MULTILINE)[1]) for stdout, _ in outputs]


def slurm(index: int, port: int) -> dict[str, str]:
    """The environment of a task as Slurm sets it."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_two_processes_of_a_slurm_job_agree(port):
    """Of two devices each; nothing is given but --distributed.auto."""
    found = run_program([{"auto": True}] * 2, [slurm(index, port) for index in range(2)], devices=2)
    for index, own in enumerate(found):
        assert own['{"data": 4}'] == own['{"fsdp": 4}'] == own['{"data": 2, "fsdp": 2}'] == [index, 2]
        assert own['{"data": 2, "memory": 2}'] == [index, 2]
        assert own['{"memory": 4}'] == own['{"sequence": 4}'] == [0, 1]
        assert "all 4 devices of all processes must take part" in own['{"data": 2}']
        assert own["on_first"] == {"said by": 0, "text": "x" * 100}
        assert own["error"] == "'of process 0'"
        assert own["votes"] == [None, None, "SIGTERM"]
        assert own["same"] is None and own["shared"] is None
    assert found[0]["settings"] == "process 1 has other settings than process 0: see its log"
    assert found[1]["settings"] == "process 1 has data.seed = 1, process 0 0: start all with the same but for their ids"
    assert re.fullmatch("process 1 has an --output .* of its own: see its log", found[0]["directories"])
    assert re.match("process 1 does not see what process 0 writes into .*: all must share", found[1]["directories"])


def test_four_processes_agree(port):
    """Of one device each; two that split the memories read the same rows."""
    settings = [{"coordinator": f"localhost:{port}", "num_processes": 4, "process_id": index} for index in range(4)]
    for index, own in enumerate(run_program(settings, [{}] * 4, devices=1)):
        assert own['{"data": 4}'] == [index, 4]
        assert own['{"data": 2, "memory": 2}'] == [index // 2, 2]
        assert own["on_first"]["said by"] == 0
        assert own["votes"] == [None, None, "SIGTERM"]


def test_processes_that_share_some_rows_but_not_all_are_refused(port):
    """Two processes of three devices; the second pair of devices of a row lies with both."""
    settings = [{"coordinator": f"localhost:{port}", "num_processes": 2, "process_id": index} for index in range(2)]
    for own in run_program(settings, [{}] * 2, devices=3, meshes=[{"data": 3, "memory": 2}]):
        message = own['{"data": 3, "memory": 2}']
        assert message.startswith("the mesh = {'data': 3, 'fsdp': 1, 'memory': 2,")
        assert "is not allowed: the rows of a process must be those of another or all different" in message
        assert message.endswith("divide the 3 devices of a process, or be a multiple of them")


def test_a_coordinator_that_cannot_listen_is_named(workshop, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        flags = ["--distributed.coordinator", address, "--distributed.num-processes", "2", "--distributed.process-id=0"]
        stderr = workshop.run(workshop.train("windows", tmp_path / "run", *flags), status=1).stderr
    assert f"error: process 0 cannot listen at {address}: Address already in use" in stderr


def test_a_failed_collective_is_a_lost_peer_and_its_save_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(PeerLost, match=r"^process 0 of 2: working with .* failed: Connection closed; .*; the checkpoint"):
        with raising(lambda: "the checkpoint of step 3 is kept"):
            raise jax.errors.JaxRuntimeError("Connection closed\nby peer")
    with pytest.raises(ValueError, match="^mesh.data = 3"), raising():
        raise ValueError("mesh.data = 3 is not allowed")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), raising():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    monkeypatch.undo()

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints, "wait", lambda: pytest.fail("it waits"))
    monkeypatch.setattr(checkpoints._manager, "close", lambda: pytest.fail("it waits"))
    with pytest.raises(PeerLost), checkpoints:
        raise PeerLost
    monkeypatch.undo()
    checkpoints.close()


@pytest.mark.parametrize(
    ("host", "index", "why"), [("localhost", 0, "; see"), ("no.invalid", 1, ": the host no.invalid is not found")]
)
def test_a_process_whose_peers_do_not_come_ends(workshop, tmp_path, port, host, index, why):
    flags = ["--distributed.num-processes", "2", "--distributed.process-id", str(index), "--distributed.join-timeout", "1"]
    command = workshop.train("windows", tmp_path / "run", "--distributed.coordinator", f"{host}:{port}", *flags)
    stderr = workshop.run(command, status=1).stderr
    assert f"process {index} of 2 at {host}:{port}: not all processes came together within 1 s{why}" in stderr


# Training


STUCK = """if True:
    import os, runpy, sys, threading
    from pathlib import Path
    from mom_jax import checkpoint, processes, token_files

    (where, experiment), sys.argv = sys.argv[1:3], sys.argv[2:]
    processes.SLOW = 4
    match where, sys.argv[-1]:
        case "in the start", "1":
            token_files.TokenFile.verify = lambda _: threading.Event().wait()
        case "in the restoring", "0":
            checkpoint._newest_whole = lambda *_: threading.Event().wait()
        case "dead", "1":
            token_files.TokenFile.verify = lambda _: os._exit(1)
    sys.path[0] = str(Path(experiment).parent)
    runpy.run_path(experiment, run_name="__main__")
"""
"""train_lm.py, one process of which stands still somewhere, though it is alive, or dies."""
LATE = "another process has died, or is late (--distributed.peer-timeout); see its log"
KEPT = "the checkpoint of step 18 is kept; the same command continues from there"


@pytest.mark.parametrize(
    ("where", "who", "message"),
    [
        ("in the start", 1, f"the start has not ended within 12 s: {LATE}\n"),
        ("in the restoring", 0, f"restoring the checkpoint has not ended within 10 s: {LATE}; {KEPT}\n"),
        ("dead", 1, "working with the others failed: "),
    ],
)
def test_who_waits_for_a_process_that_is_stuck_or_dead_ends_with_a_message(workshop, tmp_path, where, who, message):
    output = shutil.copytree(workshop.uninterrupted("windows"), tmp_path / "run")
    command = workshop.train("windows", output, "--mesh.data", "2", "--distributed.peer-timeout", "6")
    command[1:1] = ["-c", STUCK, where]
    with Team(command, 2, workshop.environment, tmp_path) as team:
        assert team.processes[1 - who].wait(timeout=100) == 1
        assert f"process {1 - who} of 2: {message}" in team.log(1 - who)


def test_two_processes_train_as_one_and_one_goes_on_when_a_peer_is_killed(workshop, tmp_path):
    """SIGKILL of one of two; the other ends within the bound and says why (in a save JAX does), and one goes on."""
    output, expected = tmp_path / "run", workshop.uninterrupted("windows")
    with workshop.start_team(2, "windows", output, "--mesh.data", "2", "--distributed.peer-timeout", "8") as team:
        team.wait_until(lambda: 7 <= last_step(output) < STEPS)
        team.processes[1].kill()
        start = time.monotonic()
        assert team.processes[0].wait() in (1, -signal.SIGABRT)
        waited, log = time.monotonic() - start, team.log(0)
        assert "loss" not in team.log(1)
    assert waited < 8 + MARGIN + 10
    assert "another task died" in log or f"the checkpoint of step {saved_steps(output)[-1]} is kept; the same command" in log
    assert saved_steps(output)[-1] >= 3
    workshop.run(workshop.train("windows", output))
    assert_close_losses(output, expected)


def test_a_signal_to_one_process_stops_both_after_the_same_step(workshop, tmp_path):
    """Of a mesh that splits rows, each process having read them whole; a single process ends the run."""
    output = tmp_path / "run"
    flags = ["--train.checkpoint-every", "100", "--train.preemption-deadline", "100"]
    with workshop.start_team(2, "windows", output, "--mesh.sequence", "2", *flags) as team:
        team.wait_until(lambda: last_step(output) >= 2)
        team.processes[1].terminate()
        assert team.wait() == [128 + signal.SIGTERM] * 2
        (step,) = re.findall(r"^SIGTERM: saved step (\d+); the same command", team.log(0), re.MULTILINE)
        assert "saved step" not in team.log(1)
    assert saved_steps(output) == [int(step)] and last_step(output) == int(step) < STEPS
    workshop.run(workshop.train("windows", output, *flags))
    assert_close_losses(output, workshop.uninterrupted("windows"))


# A trained model


def test_two_processes_sample_evaluate_and_generate_as_one(workshop, tmp_path):
    """At the end of a run and afterwards, the model's parameters split over both; the first alone prints and writes."""
    run = shutil.copytree(workshop.uninterrupted("windows"), tmp_path / "run")
    prompts, batch_file = ["ab", "", "cde"], tmp_path / "prompts.txt"
    batch_file.write_text("\n".join(prompts) + "\n")
    flags = ["--model", str(run), "--mesh.fsdp", "2", "--output"]
    drawn = ["--sampling.temperature", "0.8", "--sampling.top-k", "40", "--no-stop-at-eos", "--max-new-tokens", "5"]
    commands = {
        "held out: loss": workshop.train(
            "windows", run, "--mesh.fsdp", "2", "--sample-tokens", "5", "--sample-prompts", *prompts
        ),
        "bits per byte": workshop.command("evaluate.py", *flags, str(tmp_path / "figures.json")),
        "3/3": workshop.command(
            "generate.py", *flags, str(tmp_path / "continued.jsonl"), *drawn, "--batch-file", str(batch_file),
            "--batch-size", "3",
        ),
    }  # fmt: skip
    for number, (said, command) in enumerate(commands.items()):
        with workshop.team(2, command, tmp_path / str(number)) as team:
            assert team.wait() == [0, 0], team.log(0) + team.log(1)
            assert said in team.log(0) and said not in team.log(1)

    model, tokenizer = mom_jax.load(run)
    rows = generate(model, prompts, max_new_tokens=5, sampling=Sampling(0.8, top_k=40), tokenizer=tokenizer)
    _, *texts, _ = (run / "sample.txt").read_text().split("-" * 80)
    assert texts == [f"\n{prompt}{row.text}\n" for prompt, row in zip(prompts, rows, strict=True)]
    records = [json.loads(line) for line in (tmp_path / "continued.jsonl").read_text().splitlines()]
    assert {record["index"]: record["ids"] for record in records} == dict(enumerate(row.ids for row in rows))
    expected, found = evaluate.main(evaluate.Evaluate(str(run))), json.loads((tmp_path / "figures.json").read_text())
    assert found["tokens"] == expected["tokens"]
    perplexities = [[group["perplexity"] for group in figures["by_position"]] for figures in (found, expected)]
    np.testing.assert_allclose(*perplexities, rtol=1e-5)
