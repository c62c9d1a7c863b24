"""`ashd doctor`: what it prints of a self-test, when it is satisfied, and what it sees of a host."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from ashd.cli import main
from ashd.commands import host
from ashd.commands.exits import Exit
from ashd.config.schema import RunnerConfig
from ashd.domain.isolation import reaches
from ashd.runner import selftest
from sandbox.selftest import Finding

MOUNT = Finding("mount a file system", "standard", True, "EPERM", "")
PTRACE = Finding("trace another's process", "strict", False, "it was traced", "a kernel with user namespaces")


def a_report(monkeypatch: pytest.MonkeyPatch, level: str, *tried: Finding) -> list[RunnerConfig]:
    """Lets the self-test find this; the configurations it is given."""
    seen: list[RunnerConfig] = []

    def examine(config: RunnerConfig) -> selftest.Report:
        seen.append(config)
        denied, missed = [one for one in tried if one.denied], [one for one in tried if not one.denied]
        return selftest.Report(config.isolation, level, denied, missed, enforced=["seccomp"])

    monkeypatch.setattr(selftest, "examine", examine)
    return seen


@pytest.mark.parametrize(
    ("level", "demanded", "enough"),
    [
        ("strict", "strict", True),
        ("standard", "strict", False),
        ("standard", "auto", True),
        ("none", "auto", False),
        ("none", "none", True),
        ("", "none", False),
    ],
)
def test_a_level_is_enough_for_itself_and_those_below(level: str, demanded: str, enough: bool) -> None:
    assert reaches(level, demanded) is enough


def test_a_host_that_denies_all_satisfies_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_report(monkeypatch, "strict", MOUNT)
    assert main(["doctor"]) == Exit.OK
    printed = capsys.readouterr().out
    assert "This host reaches strict; configured is auto, which is enough." in printed
    assert ["mount", "a", "file", "system", "standard", "yes", "EPERM"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "this host lacks" not in printed


def test_a_host_below_the_configured_level_fails_with_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = a_report(monkeypatch, "standard", MOUNT, PTRACE)
    (tmp_path / "runner.yaml").write_text("isolation: strict\n")
    (tmp_path / "up.yaml").write_text("runner:\n  isolation: strict\n")
    for name in ("runner.yaml", "up.yaml"):
        assert main(["doctor", "-c", str(tmp_path / name)]) == Exit.FAILED
        printed = capsys.readouterr().out
        assert "This host reaches standard; configured is strict, which is NOT enough" in printed
        assert "this host lacks:\n  trace another's process: it was traced\n" in printed
        assert "  trace another's process: a kernel with user namespaces\n" in printed
        assert seen[-1].isolation == "auto"  # what it can, not what is asked of it


def test_all_of_it_can_be_had_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ASH_ISOLATION", "strict")
    a_report(monkeypatch, "standard", MOUNT, PTRACE)
    assert main(["doctor", "--json"]) == Exit.FAILED
    told = json.loads(capsys.readouterr().out)
    assert (told["level"], told["configured"], told["suffices"]) == ("standard", "strict", False)
    assert (told["enforced"], told["lacking"]) == (["seccomp"], ["trace another's process: it was traced"])
    assert told["findings"] == [vars(MOUNT)]
    names = ["user", "cgroups", "disk quota", "memory pressure", "swap", "open files", "postgres"]
    assert [fact["name"] for fact in told["host"]] == names


# What it sees of a host


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_delegated_group_of_version_2_is_all_a_runner_needs(tmp_path: Path) -> None:
    own = "sys/fs/cgroup/user.slice/ashd.service"
    files = {
        "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
        "proc/self/cgroup": "1:name=systemd:/x\n0::/user.slice/ashd.service\n",
        f"{own}/cgroup.controllers": "cpu memory pids\n",
        f"{own}/cgroup.subtree_control": "",
    }
    fact = host.cgroups(written(tmp_path, files))
    assert fact == host.Fact("cgroups", "version 2: memory, pids, cpu here, delegated")


@pytest.mark.parametrize("controllers", ["cpu memory pids\n", "cpu\n"])
def test_a_group_that_is_not_delegated_or_lacks_a_controller_names_the_setting_of_systemd(
    tmp_path: Path, controllers: str
) -> None:
    files = {"sys/fs/cgroup/cgroup.controllers": controllers, "proc/self/cgroup": "0::/\n"}
    if controllers == "cpu\n":
        files["sys/fs/cgroup/cgroup.subtree_control"] = ""
    assert "Delegate=yes" in host.cgroups(written(tmp_path, files)).advice


def test_hierarchies_of_version_1_are_named_one_by_one(tmp_path: Path) -> None:
    assert host.cgroups(tmp_path).value == "none mounted"
    files = {f"sys/fs/cgroup/{name}/tasks": "" for name in ("memory", "pids")}
    fact = host.cgroups(written(tmp_path, files))
    assert fact.value == "version 1: memory, pids writable"
    assert fact.advice.startswith("cpu, freezer: ")


def test_the_file_system_under_the_workspaces_is_looked_at(tmp_path: Path) -> None:
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 8:2 / /srv/big\\040disk rw,noatime shared:2 - xfs /dev/sdb1 rw,attr2,prjquota\n"
    )
    root = written(tmp_path, {"proc/self/mountinfo": mounts})
    assert host.disk_quota(root, Path("/srv/big disk/ashd")).value == "xfs at /srv/big disk: mounted with quotas"
    plain = host.disk_quota(root, Path("/srv/big"))
    assert plain.value == "ext4 at /: no quotas: workspaces are watched"
    assert plain.advice == "mount / (ext4, xfs) with prjquota"


def test_pressure_and_swap_are_what_the_kernel_tells(tmp_path: Path) -> None:
    assert host.pressure(tmp_path).advice and host.swap(tmp_path).value == "none"
    files = {"proc/pressure/memory": "some avg10=0.00\n", "proc/meminfo": "MemTotal: 9 kB\nSwapTotal: 2097152 kB\n"}
    root = written(tmp_path, files)
    assert not host.pressure(root).advice
    assert (host.swap(root).value, bool(host.swap(root).advice)) == ("2048 MiB", True)


def test_more_sandboxes_than_descriptors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert host.descriptors(960) == host.Fact("open files", "hard limit 4096")
    assert "LimitNOFILE=4260" in host.descriptors(1001).advice
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert host.descriptors(1001) == host.Fact("open files", "hard limit none")
