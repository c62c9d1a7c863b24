"""What `ashd up` prepares before anything runs: its lock, its secret, and the files of its children."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ashd.config.loader import load_coordinator, load_runner, load_standalone
from ashd.config.schema import StandaloneConfig
from ashd.errors import AshdError, ConfigError
from ashd.standalone.up import locked, prepare


def test_a_second_one_on_the_same_data_dir_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with locked(tmp_path / "data"), pytest.raises(AshdError, match=rf"already runs .* \(process {os.getpid()}\)"):
        locked(tmp_path / "data").__enter__()
    with locked(tmp_path / "data"):
        pass


def test_a_data_dir_that_cannot_be_made_is_a_problem_of_configuration() -> None:
    with pytest.raises(ConfigError, match="--data-dir"), locked(Path("/proc/ashd")):
        pytest.fail("made a folder in /proc")


def test_the_files_of_its_children_load_as_what_was_prepared(tmp_path: Path) -> None:
    config = load_standalone(None, {"ASH_PORT": "4300", "ASH_HOST": "0.0.0.0", "ASH_IDLE_TIMEOUT_MS": "1500"}).config
    prepared = prepare(config, tmp_path)
    assert load_coordinator(tmp_path / "run" / "coord.yaml", {}).config == prepared.coordinator
    assert load_runner(tmp_path / "run" / "runner.yaml", {}).config == prepared.runner
    assert prepared.coordinator.internal_secret == prepared.runner.internal_secret != ""
    assert prepared.server_url == "http://127.0.0.1:4300"
    assert prepared.coordinator.idle_timeout == 1.5


def test_the_secret_is_minted_once_and_readable_to_its_owner_only(tmp_path: Path) -> None:
    first, second = prepare(StandaloneConfig(), tmp_path), prepare(StandaloneConfig(), tmp_path)
    assert first.coordinator.internal_secret == second.coordinator.internal_secret
    for name in ("internal-secret", "run/coord.yaml", "run/runner.yaml"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_database_elsewhere_takes_the_place_of_the_embedded_one(tmp_path: Path) -> None:
    config = StandaloneConfig()
    elsewhere = replace(config, coordinator=replace(config.coordinator, database_url="postgresql://db.example/ashd"))
    prepared = prepare(elsewhere, tmp_path)
    assert prepared.database is None
    assert prepared.coordinator.database_url == "postgresql://db.example/ashd"
