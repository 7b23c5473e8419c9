"""What `server.confinement` refuses, as the problem that names the field."""

from collections.abc import Iterator
from contextlib import contextmanager

from server.api.problems import invalid
from server.confinement import NotAllowedError
from server.wire import FieldProblem


@contextmanager
def refusals_as_problems() -> Iterator[None]:
    """Turn refusals within the block into answers.

    Raises:
        ProblemError: 422 `path_not_allowed` or `repo_not_allowed`.
    """
    try:
        yield
    except NotAllowedError as error:
        problem = FieldProblem(field=error.field, message=error.reason)
        raise invalid([problem], error.code) from error
