"""The files of conf/ are what the schema says, and can be used as they are."""

from pathlib import Path

import pytest

from ashd.config import sample
from ashd.config.loader import load_coordinator, load_runner, load_standalone
from ashd.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("name", sample.FILES)
def test_a_file_is_what_the_schema_says(name: str) -> None:
    assert (CONF / name).read_text(encoding="utf-8") == sample.render(*sample.FILES[name]), "run `make conf`"


def test_the_files_set_nothing_but_defaults() -> None:
    environ = {"ASH_DATABASE_URL": "postgresql://ashd@db.example/ashd"}
    assert load_coordinator(CONF / "coord.yaml", environ).config == load_coordinator(None, environ).config
    assert load_runner(CONF / "runner.yaml", {}).config == load_runner(None, {}).config
    assert load_standalone(CONF / "standalone.yaml", {}).config == load_standalone(None, {}).config


def test_a_coordinator_without_a_database_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="ASH_DATABASE_URL") as caught:
        load_coordinator(CONF / "coord.yaml", {})
    assert len(caught.value.problems) == 1
