"""Settings: flags over variables over defaults, and nothing unknown passes."""

import dataclasses

import pytest

from quire.config import ServiceConfig, describe, load, setting
from quire.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class DemoConfig(ServiceConfig):
    """A service for tests."""

    port: int = setting(7, "Port.", minimum=0, maximum=65535)
    store: str = setting("memory://", "Store.")
    ratio: float = setting(0.5, "Ratio.", minimum=0.1, maximum=1)
    size: int | None = setting(None, "Size, or none.", minimum=1)
    caching: bool = setting(True, "Whether to cache.")
    mode: str = setting("fast", "Mode.", choices=("fast", "safe"))


def load_demo(*argv: str, **environ: str) -> tuple[DemoConfig, dict[str, str]]:
    """Loads the configuration of service "demo"."""
    return load(DemoConfig, "demo", argv, environ)


def test_defaults_hold_when_nothing_is_said() -> None:
    """A service started bare must come up as documented."""
    config, sources = load_demo()
    assert (config.port, config.store, config.ratio, config.size, config.caching) == (7, "memory://", 0.5, None, True)
    assert set(sources.values()) == {"default"}


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    """Otherwise a container's environment could not be overridden at the command line."""
    config, sources = load_demo("--ratio", "0.9", QUIRE_DEMO_RATIO="0.2", QUIRE_DEMO_SIZE="12")
    assert (config.ratio, config.size) == (0.9, 12)
    assert (sources["ratio"], sources["size"], sources["port"]) == ("flag", "environment", "default")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("0", False), ("YES", True), ("off", False)])
def test_a_boolean_variable_understands_common_words(text: str, value: bool) -> None:
    """Compose files and shells write booleans in all these ways."""
    assert load_demo(QUIRE_DEMO_CACHING=text)[0].caching is value


def test_a_boolean_flag_has_a_no_form() -> None:
    """What is on by default must have an off switch."""
    assert load_demo("--no-caching", QUIRE_DEMO_CACHING="true")[0].caching is False


def test_an_optional_setting_can_be_unset_again() -> None:
    """An inherited variable must be removable without editing its source."""
    assert load_demo("--size", "none", QUIRE_DEMO_SIZE="4")[0].size is None


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("QUIRE_DEMO_PORTS", "1", "no such setting; known are "),
        ("QUIRE_DEMO_PORT", "70000", "out of range, allowed is 0 .. 65535"),
        ("QUIRE_DEMO_PORT", "x", "is not a whole number"),
        ("QUIRE_DEMO_RATIO", "nan", "out of range"),
        ("QUIRE_DEMO_RATIO", "0", "out of range"),
        ("QUIRE_DEMO_SIZE", "0", "at least 1"),
        ("QUIRE_DEMO_CACHING", "maybe", "is not true or false"),
        ("QUIRE_DEMO_MODE", "slow", "is not one of fast, safe"),
    ],
)
def test_a_bad_variable_is_refused_by_name(variable: str, value: str, expected: str) -> None:
    """A typo that is ignored runs the service with settings nobody chose."""
    with pytest.raises(ConfigError, match=variable) as caught:
        load_demo(**{variable: value})
    assert expected in caught.value.message


def test_a_bad_flag_is_refused_by_name() -> None:
    """The message must say which of many flags is wrong."""
    with pytest.raises(ConfigError, match="--ratio"):
        load_demo("--ratio", "2")


@pytest.mark.parametrize("argv", [["--prot", "1"], ["--mode", "slow"], ["--por", "1"]])
def test_an_unknown_flag_ends_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts tell a wrong command line from a failure by the status; abbreviations would break with a new flag."""
    with pytest.raises(SystemExit) as caught:
        load_demo(*argv)
    assert caught.value.code == 2
    assert "quire demo: error:" in capsys.readouterr().err


def test_variables_of_other_services_do_not_concern_this_one() -> None:
    """All services of a machine often share one environment."""
    load_demo(QUIRE_OTHER_PORT="1", QUIRE_ADDRESS="x:1", HOME="/")


def test_a_password_in_a_url_is_never_shown() -> None:
    """`config_loaded` goes to the log."""
    config, sources = load_demo("--store", "redis://app:secret@cache:6379/0")
    shown = describe(config, sources)
    assert "secret" not in str(shown)
    assert shown["store"] == "redis://app:***@cache:6379/0 (flag)"
    assert shown["port"] == "7 (default)"
