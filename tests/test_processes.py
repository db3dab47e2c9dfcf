"""How a process finds out which of how many it is; tests/test_many_processes.py has the rest."""

import pytest

from simplernn_jax.errors import UserError
from simplernn_jax.parallel import processes
from simplernn_jax.parallel.rendezvous import Place

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[007-009,012]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "40960.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
FIRST_PORT = 2**16 - 2**12


class Met(Exception):
    """Says where a process wanted to meet the others."""


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    def meet(place, timeout):
        raise Met(place, timeout)

    monkeypatch.setattr(processes, "meet", meet)
    for name in (*SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)


def place_of(*place):
    with pytest.raises(Met) as caught, processes.joined(*place, timeout=7):
        pass
    assert caught.value.args[1] == 7
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SLURM, Place(f"node007:{FIRST_PORT}", 5, 8)),
        (OPEN_MPI, Place(f"10.96.0.1:{FIRST_PORT + 10}", 3, 4)),
    ],
)
def test_what_the_cluster_says(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of(None, None, None) == expected


def test_what_is_said_wins(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = place_of("[::1]:1234", 3, 2)
    assert place == Place("[::1]:1234", 2, 3)
    assert (place.host, place.port) == ("::1", 1234)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((None, None, None), "neither SLURM nor Kubernetes nor Open MPI has started this process"),
        (
            ("node1:1234", 2, None),
            "--coordinator, --num_processes and --process_id belong together",
        ),
        (("node1", 2, 0), "--coordinator=node1: not HOST:PORT"),
        (("node1:http", 2, 0), "--coordinator=node1:http: not HOST:PORT"),
        (("node1:99999", 2, 0), "--coordinator=node1:99999: not HOST:PORT"),
        (
            ("node1:1234", 2, 2),
            "--process_id=2 is none of --num_processes=2: number them from 0 to 1",
        ),
    ],
)
def test_what_does_not_say_enough(place, message):
    with pytest.raises(UserError, match=message), processes.joined(*place, timeout=7):
        pass
