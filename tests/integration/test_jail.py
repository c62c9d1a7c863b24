"""What a jail gives and takes, by level. That attacks fail is shown in tests/hostile."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ashd.config.schema import RunnerConfig
from ashd.errors import ConfigError
from ashd.runner.selftest import examine
from tests.integration.sandboxes import Host, Sandbox, Zygote, text_of

SHELL = """
import subprocess
async def turn(message, session):
    done = subprocess.run(["/bin/sh", "-c", message.text], capture_output=True, text=True)
    yield f"{done.returncode}|{done.stdout}|{done.stderr}"
"""


@pytest.fixture(scope="module")
def standard() -> Iterator[Zygote]:
    with Zygote("standard") as zygote:
        if zygote.level != "standard":
            pytest.skip(f"this host can't give standard isolation: {zygote.shown['missed']}")
        yield zygote


def shell(sandbox: Sandbox, command: str) -> tuple[int, str]:
    """The exit code and output of a command inside; its complaints count as output."""
    code, out, err = text_of(sandbox.turn(command)).split("|", 2)
    return int(code), out + err


def connect(port: int, host: str = "127.0.0.1") -> str:
    """A command that reaches for a port."""
    return f"python3 -c 'import socket; socket.create_connection((\"{host}\", {port}), 2)'"


def strict(host: Host, **fields: object) -> Sandbox:
    if host.zygote.level != "strict":
        pytest.skip(f"this host can't give strict isolation: {host.zygote.shown['missed']}")
    sandbox = host.sandbox()
    assert "ready" in sandbox.claim({"agent.py": SHELL}, **fields)
    return sandbox


TOOLS = {
    "python3": "python3 -c 'import ssl, sqlite3, ctypes; print(6 * 7)'",
    "git": "git init -q g && cd g && git -c user.name=a -c user.email=b commit -q --allow-empty -m 42 && git log",
    "node": "node -e 'console.log(6 * 7)'",
    "gcc": "printf 'int main(){return 42;}' > a.c && gcc a.c -o a; ./a; echo $?",
    "make": "printf 'x:\\n\\t@echo 42\\n' > Makefile && make",
    "perl": "perl -e 'print 6 * 7'",
    "tar": "echo 42 > f && tar czf f.tgz f && tar xzOf f.tgz",
    "script": "script -qec 'echo 42' /dev/null",
    "whoami": "whoami && echo 42",
    "find": "find /usr -maxdepth 1 > /dev/null && echo 42",
    "bash": "bash -c 'cat <(echo 42)'",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_usual_tools_of_the_host_work_inside(host: Host, tool: str) -> None:
    sandbox = strict(host)
    if shutil.which(tool, path="/usr/local/bin:/usr/bin:/bin") is None:
        pytest.skip(f"this host has no {tool}")
    code, said = shell(sandbox, TOOLS[tool])
    assert (code, said.split()[-1]) == (0, "42"), said


def test_python_keeps_its_threads_processes_and_shared_memory(host: Host) -> None:
    sandbox = strict(host)
    code = (
        "import multiprocessing as m, threading as t, asyncio\n"
        "t.Thread(target=print).start()\n"
        "with m.Pool(2) as pool: print(sum(pool.map(abs, [-20, -20])) + m.Value('i', 2).value)\n"
    )
    Path(sandbox.workspace, "p.py").write_text(code)
    Path(sandbox.workspace, "p.py").chmod(0o644)
    status, said = shell(sandbox, "python3 p.py")
    assert (status, said.split()[-1]) == (0, "42"), said


def test_the_root_holds_programs_and_next_to_nothing_of_the_host(host: Host) -> None:
    sandbox = strict(host)
    assert shell(sandbox, "ls /workspace") == (0, "agent.py\n")
    assert shell(sandbox, "ls -A /home /run /sys | grep -v : | grep .") == (1, "")
    for path in ("/etc/shadow", "/etc/ssh", "/var/log", str(host.folder), "/proc/1/root/etc/shadow"):
        assert shell(sandbox, f"cat {path}")[0] != 0, path
    assert shell(sandbox, "id -un")[1] == "sandbox\n"
    assert shell(sandbox, "hostname")[1] == "sandbox\n"


def test_only_workspace_and_tmp_can_be_written(host: Host) -> None:
    sandbox = strict(host)
    for path in ("/workspace/x", "/tmp/x", "/var/tmp/x", "/dev/shm/x", "/dev/null"):
        assert shell(sandbox, f"echo x > {path}") == (0, ""), path
    for path in ("/x", "/usr/x", "/etc/x", "/etc/passwd", "/dev/x", "/run/x", "/home/x", "/proc/sys/kernel/hostname"):
        assert shell(sandbox, f"echo x > {path}")[0] != 0, path
    assert (sandbox.workspace / "x").read_text() == "x\n"


def test_tmp_is_bounded_in_bytes_and_files(host: Host) -> None:
    sandbox = strict(host)
    assert "No space left" in shell(sandbox, "for n in 1 2; do head -c 40M /dev/zero > /tmp/$n; done; rm /tmp/?")[1]
    many = """
import os
made = 0
try:
    while made < 20_000: open(f"/tmp/{made}", "x").close(); made += 1
except OSError as error: print(error.strerror, made)
"""
    (sandbox.workspace / "many.py").write_text(many)
    (sandbox.workspace / "many.py").chmod(0o644)
    code, said = shell(sandbox, "python3 many.py")
    assert (code, said[:14]) == (0, "No space left ")
    assert 16_000 < int(said.split()[-1]) < 17_000


def test_a_network_of_its_own_has_a_loopback_and_nothing_else(host: Host) -> None:
    sandbox = strict(host)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "refused" in shell(sandbox, connect(server.getsockname()[1]))[1]
    alone = 'import socket as s; one = s.create_server(("", 0)); s.create_connection(one.getsockname()); print(42)'
    assert shell(sandbox, f"python3 -c '{alone}'") == (0, "42\n")
    assert "unreachable" in shell(sandbox, connect(80, "192.0.2.1"))[1]


def test_an_agent_that_is_given_the_hosts_network_reaches_it(host: Host) -> None:
    sandbox = strict(host, network="host")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert shell(sandbox, connect(server.getsockname()[1])) == (0, "")


def test_standard_keeps_sandboxes_apart_without_namespaces(standard: Zygote) -> None:
    with Host(standard) as host:
        one, other = host.sandbox(), host.sandbox()
        assert "ready" in one.claim({"agent.py": SHELL})
        assert "ready" in other.claim({"agent.py": SHELL})
        assert shell(one, "echo mine > x && cat x && echo y > $TMPDIR/y && cat $TMPDIR/y") == (0, "mine\ny\n")
        (pid,) = other.processes()
        for attack in (
            f"cat {other.workspace}/agent.py",
            f"echo x > {other.workspace}/x",
            f"cat {one.folder}/session.json",
            f"kill -0 {pid}",
            f"cat /proc/{pid}/environ",
            "python3 -c 'import socket; socket.socket()'",
            "unshare -U true",
        ):
            assert shell(one, attack)[0] != 0, attack
        assert shell(other, "cat x")[0] != 0


def test_what_a_host_cannot_give_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner without CAP_SYS_ADMIN, as in most containers."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can give up its capabilities")
    fewer = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ASH_STATE_DIR": folder, "ASH_ISOLATION": "strict", "ASH_LOG_FORMAT": "console"}
        refused = subprocess.run(
            [*fewer, sys.executable, "-m", "ashd", "runner"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert refused.returncode == 1
    assert "does not give sandboxes the isolation that is configured (strict)" in refused.stderr
    assert "CAP_SYS_ADMIN" in refused.stderr
    assert "ashd doctor" in refused.stderr


def test_a_report_names_every_attempt_and_demands_the_level() -> None:
    report = examine(RunnerConfig())
    if report.level == "none":
        with pytest.raises(ConfigError, match="isolation that is configured"):
            report.demand()
        return
    report.demand()
    assert len(report.findings) >= 20
    assert all(finding.denied for finding in report.findings)
    assert examine(RunnerConfig(isolation="none")).level == "none"


def test_state_in_a_visible_folder_stays_unseen() -> None:
    visible = Path("/opt")
    if not os.access(visible, os.W_OK):
        pytest.skip("/opt, which sandboxes may read, can't be written here")
    with Zygote(within=visible) as zygote, Host(zygote) as host:
        (zygote.folder / "internal-secret").write_text("secret")
        sandbox = strict(host)
        assert shell(sandbox, "ls /opt")[0] == 0
        assert "denied" in shell(sandbox, f"ls {zygote.folder}")[1]
        assert shell(sandbox, f"cat {zygote.folder}/internal-secret")[0] != 0


def test_sandboxes_of_one_zygote_do_not_share_random_numbers(host: Host) -> None:
    draw = "import random, uuid\nasync def turn(message, session):\n    yield f'{random.random()} {uuid.uuid4()}'\n"
    drawn = [text_of(host.agent(draw).turn("?")) for _ in range(3)]
    assert len({number for text in drawn for number in text.split()}) == 6
