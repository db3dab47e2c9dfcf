"""Processes on this machine that train together, few and small: each start takes seconds."""

import os
import re
import signal
import subprocess

import numpy as np
import pytest
from processes import free_address, start_python
from small_runs import newest_checkpoint, small_config, write_corpus

from simplernn_jax.config import by_field
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Start Python processes; none outlives the test."""
    started = []

    def start(*command, **options):
        started.append(start_python(*command, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    for number in running(tmp_path).values():
        os.kill(number, signal.SIGKILL)
    for process in started:
        process.communicate()


@pytest.fixture
def launch(start):
    """Start two processes with scripts/launch_local.py."""

    def launch(config, workdir, devices=1):
        """`config` and `workdir` are those of `train`."""
        flags = {f"config.{name}": value for name, value in by_field(config).items() if value != {}}
        return start(
            *("scripts/launch_local.py", 2, "--config=configs/tiny.py", f"--workdir={workdir}"),
            *(f"--{name}={value}" for name, value in flags.items()),
            DEVICES_PER_PROCESS=str(devices),
        )

    return launch


def running(workdir):
    """Ids by --process_id of the processes that train in or below `workdir`, but not of their
    supervisors."""
    lines = subprocess.check_output(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], text=True
    ).splitlines()
    pattern = rf" *(\d+) +(\d+) .*--workdir={re.escape(str(workdir))}[/ ].* --process_id=(\d+)"
    found = [match for match in (re.match(pattern, line) for line in lines) if match]
    every = {match[1] for match in found}
    return {int(match[3]): int(match[1]) for match in found if match[2] in every}


def finish(process, code=0):
    """Wait for the end; return the output and the errors of all."""
    output, errors = process.communicate(timeout=200)
    assert process.returncode == code, output + errors
    return output, errors


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def check_close(found, expected):
    """Compare checkpoints of one step, each array to 1e-5 of its largest value: devices sum their
    gradients in another order when they belong to several processes."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, tuple):
            assert found[name] == value, name
            continue
        dtype, shape, content = value
        assert found[name][:2] == (dtype, shape), name
        wanted = np.frombuffer(content, dtype)
        limit = 1e-5 * np.abs(wanted).max(initial=0)
        np.testing.assert_allclose(
            np.frombuffer(found[name][2], dtype), wanted, rtol=0, atol=limit, err_msg=name
        )


def test_two_processes_equal_one_and_each_resumes_the_others_checkpoint(tmp_path, launch):
    sources = [write_corpus(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    config = small_config(
        source=f"{sources[0]}:0.75,{sources[1]}:0.25",
        mode="stream",
        batch_size=4,
        steps=20,
        log_every=1,
        sample_every=10,
        sample_tokens=3,
        vocab_size=260,
        num_heads=2,
        **{"data": 2, "fsdp": 2, "tensor": 2},  # each process holds and writes shards of everything
    )
    two = launch(config, tmp_path / "two", devices=4)
    train(config, str(tmp_path / "one"))
    output, errors = finish(two)
    assert "Gloo" not in output
    assert errors.count("probability 0.25") == 1, errors  # process 0 alone reports
    check_close(newest_checkpoint(tmp_path / "two"), newest_checkpoint(tmp_path / "one"))
    losses = [
        [row["loss"] for row in read_metrics(str(tmp_path / name)) if row["kind"] == "train"]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(losses[0]) == 20

    config.train.steps = 24
    one_then_two = launch(config, tmp_path / "one", devices=4)
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
    train(config, str(tmp_path / "two"))
    assert "at step 20 of 24" in finish(one_then_two)[0]
    expected = newest_checkpoint(tmp_path / "two")
    assert expected["number of steps"] == 24
    check_close(newest_checkpoint(tmp_path / "one"), expected)


@pytest.mark.oldest_python
def test_a_signal_to_one_stops_all_and_a_death_ends_all(tmp_path, launch):
    source = write_corpus(tmp_path / "text")
    config = small_config(source=source, mode="stream", steps=10**6, log_every=0, name="muon")
    config.mesh.data = 2
    workdir = tmp_path / "run"
    processes = launch(config, workdir)
    read_until(processes, "step 1/")
    os.kill(running(workdir)[1], signal.SIGTERM)
    output, _ = finish(processes, 75)
    (step,) = map(int, re.findall(r"SIGTERM: saved at step (\d+)", output))
    stopped = newest_checkpoint(workdir)
    assert stopped["number of steps"] == step
    assert stopped["position in the data"]["batches"]["next_index"] == step

    processes = launch(config, workdir)
    read_until(processes, f"at step {step} of")
    read_until(processes, f"step {step + 1}/")
    ids = running(workdir)
    os.kill(ids[0], signal.SIGKILL)  # JAX aborts the other
    _, errors = finish(processes, 128 + signal.SIGKILL)
    (error,) = (line for line in errors.splitlines() if line.startswith("error"))
    assert error.startswith("error: a peer process failed")
    assert error.endswith("and the run resumes from its last checkpoint")
    assert newest_checkpoint(workdir) == stopped
    assert not running(workdir)


TRY_EACH = """
import sys
from small_runs import small_config
from simplernn_jax.parallel import distributed
from simplernn_jax.errors import UserError
from simplernn_jax.training import loop

address, shared, number = sys.argv[1:]
with distributed.joined(address, 2, int(number), 100):
    for source, workdir, seed in (
        ("same", "run", 0), ("text", shared, int(number)), ("text", shared, 0)
    ):
        try:
            loop.train(small_config(source=source, seed=seed, data=2), workdir)
        except UserError as error:
            print(error, flush=True)
"""


@pytest.mark.oldest_python
def test_processes_that_differ_or_that_nobody_joins_are_refused_with_one_line(tmp_path, start):
    address, single = free_address(), [free_address(), free_address()]
    flags = ["--config=configs/tiny.py", "--distributed", "--num_processes=2", "--join_timeout=1"]
    flags += [f"--workdir={tmp_path / 'run'}"]
    differing, alone = [], []
    for number in (0, 1):
        write_corpus(tmp_path / str(number) / "text", number)
        write_corpus(tmp_path / str(number) / "same")
        program = ("-c", TRY_EACH, address, tmp_path / "run", number)
        differing.append(start(*program, cwd=tmp_path / str(number), JAX_NUM_CPU_DEVICES="1"))
        place = (f"--coordinator={single[number]}", f"--process_id={number}")
        alone.append(start("scripts/train.py", *flags, *place))
    for number in (0, 1):
        lines = finish(differing[number])[0].splitlines()
        assert [line.partition(";")[0] for line in lines] == [
            f"a process does not see {tmp_path}/{number}/run/checkpoints of process 0",
            "a process has a different configuration from process 0",
            "a process reads different text from process 0",
        ]
        output, errors = finish(alone[number], 2)
        assert output == ""
        expected = f"error: not all processes have joined {single[number]} within 1 s: check that"
        assert errors.splitlines()[-1].startswith(expected)
