"""The room of settings: what can be set (schema), how it is written (units), where it comes from (loader).

Holds: frozen dataclasses, the reading of YAML files and ASH_* variables into them, the checks of their sense, and the
generator of the commented files in conf/. Never holds: what anyone does with a setting.
Runs in every process, once, at its start: read once, validated once, passed down as the smallest part needed.
Ends with a frozen configuration or with one ConfigError that lists everything wrong. Nothing is imported here, so that
client commands may use data_dir without paying for YAML.
"""
