"""Configuration: default < file < variable, and every problem told at once with where it stands."""

from pathlib import Path

import pytest

from ashd.config.loader import load_coordinator, load_runner, load_standalone, variables
from ashd.errors import ConfigError

DATABASE = {"ASH_DATABASE_URL": "postgresql://ashd@db.example/ashd"}


def file(folder: Path, text: str) -> Path:
    path = folder / "ashd.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, environ: dict[str, str]) -> list[str]:
    """Of a coordinator's configuration, without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load_coordinator(path, environ)
    return [problem.replace(f"{path.parent}/" if path else "", "") for problem in caught.value.problems]


def test_a_variable_is_stronger_than_the_file_and_the_file_than_the_default(tmp_path: Path) -> None:
    path = file(tmp_path, "port: 4300\nworkers: 3\n")
    loaded = load_coordinator(path, DATABASE | {"ASH_PORT": "4400"})
    assert (loaded.config.port, loaded.config.workers, loaded.config.registry_port) == (4400, 3, 4101)
    assert loaded.origins["port"] == "ASH_PORT"
    assert loaded.origins["workers"] == f"{path}:2"
    assert loaded.origins["registry_port"] == "default"


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    assert load_coordinator(file(tmp_path, "port: 4300\n"), DATABASE | {"ASH_PORT": ""}).config.port == 4300


def test_an_empty_file_and_empty_sections_leave_every_default(tmp_path: Path) -> None:
    defaults = load_runner(None, {}).config
    assert load_runner(file(tmp_path, "# nothing\n"), {}).config == defaults
    assert load_runner(file(tmp_path, "log:\nport:\nlimits: {}\n"), {}).config == defaults


def test_each_type_is_written_as_people_write_it(tmp_path: Path) -> None:
    text = """
        max_upload: 1GiB
        turn_timeout: 5m
        debug_timing: true
        data_dir: /srv/ashd
        agent_roots: [/a, /b]
        log: {level: debug}
    """
    config = load_coordinator(file(tmp_path, text), DATABASE).config
    assert (config.max_upload, config.turn_timeout, config.debug_timing) == (1024**3, 300.0, True)
    assert (config.data_dir, config.agent_roots, config.log.level) == (Path("/srv/ashd"), ("/a", "/b"), "debug")


def test_a_list_in_a_variable_is_separated_by_commas() -> None:
    config = load_coordinator(None, DATABASE | {"ALLOWED_ORIGINS": "https://a.example, https://b.example"}).config
    assert config.allowed_origins == ("https://a.example", "https://b.example")


def test_a_variable_named_in_milliseconds_is_in_milliseconds() -> None:
    assert load_coordinator(None, DATABASE | {"ASH_IDLE_TIMEOUT_MS": "1500"}).config.idle_timeout == 1.5


def test_all_problems_are_told_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = """\
prot: 1
workers: many
backlog: 0
idle_timeout: 10 parsecs
log:
  level: loud
  levle: info
host: 0.0.0.0
"""
    path = file(tmp_path, text)
    found = problems(path, {"ASH_PORT": "80000", "ASH_DEBUG_TIMING": "perhaps"})
    expected = [
        "ashd.yaml:1: prot is not a setting; did you mean port?",
        'ashd.yaml:2: workers: "many" is not a whole number',
        'ashd.yaml:3: backlog: "0" must be more than 0',
        'ashd.yaml:4: idle_timeout: "10 parsecs" is not a length of time',
        'ashd.yaml:6: log.level: "loud" is none of: debug, info, warning, error',
        "ashd.yaml:7: log.levle is not a setting; did you mean log.level?",
        "ashd.yaml:8: host 0.0.0.0 can be reached from other machines, but internal_secret is empty",
        'ASH_PORT: port: "80000" must be 65535 or less',
        'ASH_DEBUG_TIMING: debug_timing: "perhaps" is neither true (1) nor false (0)',
        "database_url is required",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("port: [1, 2]", "ashd.yaml:1: port: *** is a list"),
        ("port: {a: 1}", "ashd.yaml:1: port: *** is a group"),
        ("log: loud", "ashd.yaml:1: log must hold `key: value` lines"),
        ("- port", "ashd.yaml:1: the file must hold `key: value` lines"),
        ("port: 1\nport: 2", "ashd.yaml:2: port is set twice"),
        ("? [a]\n: 1", "ashd.yaml:1: a key must be a plain word"),
        ("port: 'x", "ashd.yaml:1: is not YAML"),
        ("port: 1\n---\nport: 2", "ashd.yaml:2: is not YAML"),
    ],
)
def test_yaml_of_another_shape_is_refused_with_its_line(tmp_path: Path, text: str, start: str) -> None:
    assert any(problem.startswith(start) for problem in problems(file(tmp_path, text), DATABASE))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "absent.yaml", DATABASE) == ["absent.yaml: can't be read: No such file or directory"]
    (tmp_path / "latin.yaml").write_bytes(b"host: caf\xe9\n")
    assert problems(tmp_path / "latin.yaml", DATABASE)[0].startswith("latin.yaml: is not UTF-8 text")


def test_a_file_nested_without_end_is_not_yaml(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("[" * 5000)
    with pytest.raises(ConfigError) as caught:
        load_coordinator(file, {})
    assert "is not YAML" in caught.value.problems[0]


def test_a_secret_is_never_in_a_problem(tmp_path: Path) -> None:
    found = problems(file(tmp_path, "internal_secret: [hunter2]\napi_key: {hunter2: 1}\n"), DATABASE)
    assert len(found) == 2
    assert "hunter2" not in "".join(found)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "coordinator.example"])
def test_listening_beyond_loopback_without_a_secret_is_refused(host: str) -> None:
    for load, variable in ((load_coordinator, "ASH_HOST"), (load_runner, "ASH_RUNNER_HOST")):
        with pytest.raises(ConfigError, match="ASH_INTERNAL_SECRET"):
            load(None, DATABASE | {variable: host})
        load(None, DATABASE | {variable: host, "ASH_INTERNAL_SECRET": "s"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_secret(host: str) -> None:
    load_coordinator(None, DATABASE | {"ASH_HOST": host})


def test_a_registry_beyond_loopback_needs_a_secret_too(tmp_path: Path) -> None:
    assert "registry_host" in problems(file(tmp_path, "registry_host: 0.0.0.0\n"), DATABASE)[0]


def test_ashd_up_mints_its_secret_and_brings_its_database() -> None:
    load_standalone(None, {"ASH_HOST": "0.0.0.0"})
    with pytest.raises(ConfigError, match="database_url is required"):
        load_standalone(None, {"ASH_MODE": "coordinator"})


@pytest.mark.parametrize("uids", ["0-100", "500-2000", "20000-10000", "1000", "a-b", "1000-4294967295"])
def test_uids_of_sandboxes_stay_clear_of_the_hosts_own(tmp_path: Path, uids: str) -> None:
    with pytest.raises(ConfigError, match="uid_range"):
        load_runner(file(tmp_path, f"uid_range: {uids}\n"), {})


@pytest.mark.parametrize(
    "text", ["host: 'a b'", "server_url: ftp://x", "server_url: localhost:4100", "warm_sandboxes: 2000"]
)
def test_what_makes_no_sense_together_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_runner(file(tmp_path, text), {})


def test_a_variable_that_only_looks_like_ours_is_mentioned_not_refused() -> None:
    loaded = load_coordinator(None, DATABASE | {"ASH_PROT": "1"})
    assert loaded.notes == ("ASH_PROT is not a setting; did you mean ASH_PORT? (environment variable, ignored)",)


def test_every_variable_of_the_public_table_is_known() -> None:
    documented = """ASH_MODE ASH_DATABASE_URL ASH_PORT ASH_INTERNAL_SECRET ASH_RUNNER_ID ASH_RUNNER_PORT ASH_SERVER_URL
        ASH_RUNNER_ADVERTISE_HOST ASH_MAX_SANDBOXES ASH_DATA_DIR ASH_IDLE_TIMEOUT_MS ASH_DEBUG_TIMING ASH_API_KEY"""
    assert set(documented.split()) <= variables()
