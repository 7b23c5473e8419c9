"""The worker's own look at what a unit is about to read, right before it does.

Between submission and measurement a directory can become a link to somewhere else. The ranks read
within moments of this; a link swapped just then is beyond what a check by name can see, so roots
should be directories that strangers cannot write to.
"""

from probe.errors import ProbeError
from probe.result import Plan, Unit
from probe.spec_load import parse_spec
from server.confinement import Confinement
from server.settings import Settings
from server.worker.gang import UnitFailedError


def refuse_what_is_out_of_reach(plan: Plan, unit: Unit, settings: Settings) -> None:
    """Check every path and repository of the job, and the unit's checkpoint.

    Raises:
        UnitFailedError: `path_not_allowed` or `repo_not_allowed`; trying again cannot help.
    """
    confinement = Confinement.of(settings)
    if not (confinement.roots or confinement.hub_repos):
        return
    try:
        confinement.check_spec(parse_spec(plan.spec))
        if unit.checkpoint is not None:
            confinement.check_found([unit.checkpoint])
    except ProbeError as error:
        raise UnitFailedError(error.code, str(error), retryable=False) from error
