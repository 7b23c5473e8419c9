"""A crossing made of rounding errors must not be reported as sharpness."""

import pytest

from probe.engine import Session
from probe.plan import expand_units
from probe.spec_load import parse_spec


@pytest.mark.parametrize("search", ["interpolate", "bisect"])
@pytest.mark.parametrize("eta_init", [1e-12, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_guess_far_too_small_finds_the_same_crossing(series, dtype, eta_init, search):
    def measure(guess, budget):
        options = {"loss_batch": "both", "eta_init": guess, "search": search}
        options["max_forward_passes"] = budget
        job = parse_spec(series.spec(model={"dtype": dtype}, measurement=options))
        return Session(job).measure(expand_units(job)[1]).measurements

    for near, far in zip(measure(0.1, 40), measure(eta_init, 60), strict=True):
        assert far.lambda_c == pytest.approx(near.lambda_c, rel=0.15)
        assert all(-far.slope * eta >= far.loss_resolution * 0.999 for eta, _ in far.trials)
