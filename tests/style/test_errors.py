"""The tree of errors: each has a name for programs, a status for callers and a place in the documentation."""

import re

import grpc
import pytest

from quire import errors


def below(cls: type[errors.QuireError]) -> list[type[errors.QuireError]]:
    """Returns the classes below `cls`."""
    return [found for child in cls.__subclasses__() for found in (child, *below(child))]


CLASSES = [cls for cls in below(errors.QuireError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_has_a_reason_and_a_status(cls: type[errors.QuireError]) -> None:
    """A caller that gets UNKNOWN, or a reason it cannot spell, can only guess what to do."""
    assert re.fullmatch(r"[A-Z][A-Z0-9_]+[A-Z0-9]", cls.default_reason)
    assert len(cls.default_reason) <= 63
    assert cls.code not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK}
    assert cls.__doc__


def test_no_two_errors_share_a_reason() -> None:
    """The client tells errors apart by their reason."""
    reasons = [cls.default_reason for cls in CLASSES]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_tree_in_the_documentation_is_the_real_one(cls: type[errors.QuireError]) -> None:
    """The tree is what a user reads; a missing or wrong line there is a wrong promise."""
    assert errors.__doc__ is not None
    assert re.search(rf"\+-- {cls.__name__} +{cls.code.name} +{cls.default_reason}\b", errors.__doc__)


def test_the_tree_names_nothing_else() -> None:
    """A class that is gone must go from the documentation too."""
    assert errors.__doc__ is not None
    assert set(re.findall(r"\+-- (\w+)", errors.__doc__)) == {cls.__name__ for cls in CLASSES}
