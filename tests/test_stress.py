"""Reports of ``scripts/stress.py``; its experiments are run by ``stress.py quick``."""

import os
import random
import shutil
import subprocess
import sys

import pytest
from processes import assert_each_refused

from benchmarks.measure import resident_bytes
from benchmarks.stress import damage
from benchmarks.stress.damage import damage_file
from benchmarks.stress.experiment import Case, Experiment, check_packages, run_experiment, table
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.errors import UserError


def test_failures_are_reported(tmp_path, capsys):
    cases = [Case("one", None, "a"), Case("two", "is lost", "b"), Case("three", None, "a")]
    experiment = Experiment("nothing is lost", lambda *_: iter(cases), 3, 1)
    summary = run_experiment("losing", experiment, tmp_path / "losing", 3, 7)
    assert summary.failures == cases[1:2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "losing: two: is lost"
    assert lines[1].startswith("losing: 3 cases, 1 failed (2 a, 1 b); ")
    text = table([summary], {"losing": experiment}, 7)
    assert "| `losing` | nothing is lost | 3 | 1 | 2 a, 1 b | 0 |" in text
    nothing = Experiment("it runs", lambda *_: iter([]), 1, 1)
    assert run_experiment("nothing", nothing, tmp_path / "nothing", 1, 0).failures


def test_an_exception_of_an_experiment_is_its_last_failure(tmp_path, capsys):
    def run(*_):
        yield Case("one", None)
        raise RuntimeError("no compiler")

    summary = run_experiment("raising", Experiment("it runs", run, 3, 1), tmp_path / "a", 3, 7)
    assert (summary.cases, len(summary.failures)) == (1, 1)
    assert "RuntimeError: no compiler" in capsys.readouterr().out


@pytest.mark.oldest_python
def test_damage_that_nothing_detects_is_found(tmp_path, monkeypatch):
    """Without checksums, parameters that were overwritten are loaded, or Orbax fails in its way."""

    def zero_parameters(path, folder, draw):
        for file in folder.rglob("state/**/d/*"):
            damage._zero(file, folder, draw)

    def problems(name):
        return [case.problem for case in damage.workdir(new(tmp_path / name), 4, 1)]

    assert problems("checked") == [None] * 4
    monkeypatch.setattr(CheckpointFolder, "find_corruption", lambda *_: None)
    monkeypatch.setattr(damage, "_DAMAGES", {"zero the end of all": zero_parameters})
    assert None not in problems("unchecked")


def new(folder):
    folder.mkdir()
    return folder


@pytest.mark.oldest_python
def test_damage_stays_in_its_folder(tmp_path):
    """A link of one case would otherwise be followed when the next one copies the whole run."""
    for name in ("whole", "damaged"):
        (tmp_path / name / "a" / "b").mkdir(parents=True)
        (tmp_path / name / "f").mkdir()
        for path in ("c", "a/d", "a/b/e", "f/g"):
            (tmp_path / name / path).write_text(path)
    inode = (tmp_path / "whole").stat().st_ino
    what = set()
    for seed in range(300):
        shutil.rmtree(tmp_path / "damaged")
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        what.add(damage_file(tmp_path / "damaged", random.Random(seed)))
        assert (tmp_path / "whole").stat().st_ino == inode
    assert {"swap the folder of a/d", "swap the folder of f/g"} <= what
    assert "swap the folder of c" not in what  # which changes nothing in the folder


def test_a_missing_package_is_named_before_anything_runs():
    experiments = {
        "first": Experiment("it runs", lambda *_: iter([]), 1, 1, package="json"),
        "second": Experiment("it runs", lambda *_: iter([]), 1, 1, package="no_such_package"),
    }
    with pytest.raises(UserError, match=r"^second needs no_such_package; run: pip install"):
        check_packages(experiments)


def test_memory_of_a_process_that_has_just_ended():
    """It is in /proc until it is waited for, without its memory."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError, match="it has ended"):
            resident_bytes(process.pid)


def test_says_what_it_can_do():
    names = "there are kill, signals, hosts, resume"
    cases = [(words, names) for words in ([], ["kill", "all"], ["unknown"])]
    assert_each_refused("scripts/stress.py", *cases)
