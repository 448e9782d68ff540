import os
import subprocess
import sys

import pytest

from adq_train.cli.threads import cpu_quota, defaults


@pytest.mark.parametrize(
    ("environment", "cpus", "quota", "expected"),
    [
        ({}, 8, None, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 8, None, {}),
        ({"GOMP_SPINCOUNT": "5"}, 8, 8.0, {}),
        ({"KMP_BLOCKTIME": "0"}, 8, 2.0, {"OMP_NUM_THREADS": "2"}),
        ({"KMP_BLOCKTIME": "0"}, 8, 1.5, {"OMP_NUM_THREADS": "2"}),
        ({"KMP_BLOCKTIME": "0"}, 8, 0.2, {"OMP_NUM_THREADS": "1"}),
        ({"KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": "7"}, 8, 2.0, {}),
    ],
)
def test_what_is_added_to_the_environment(environment, cpus, quota, expected):
    assert defaults(environment, cpus, quota) == expected


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    ],
)
def test_the_share_of_a_container(files, quota, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux")
@pytest.mark.parametrize(
    ("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")]
)
def test_openmp_is_told_before_torch_loads_it(own, policy, tmp_path):
    (tmp_path / "acting.py").write_text("def main():\n    import torch\n")
    code = (
        "from adq_train.cli import program; program.PROGRAMS['adq-x'] = 'acting:main';"
        "program.run('adq-x')"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "OMP_DISPLAY_ENV": "true", **own}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert f"OMP_WAIT_POLICY = '{policy}'" in told
