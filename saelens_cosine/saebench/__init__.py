"""SAEBench on any SAELens SAE: `prepare` puts it into the units that SAEBench assumes, `run` scores it and checks that it did.

SAEBench itself is optional and imported when an eval runs.
"""

from saelens_cosine.saebench.evals import EVALS, Judge
from saelens_cosine.saebench.preflight import (
    check_data,
    check_environment,
    check_saes,
    data_contents,
    versions,
)
from saelens_cosine.saebench.prepare import PreparedSAE, prepare
from saelens_cosine.saebench.results import (
    EvalFailure,
    EvalResult,
    SAEBenchError,
    SAEBenchReport,
    VarianceExplained,
)
from saelens_cosine.saebench.run_evals import run

__all__ = [
    "EVALS",
    "EvalFailure",
    "EvalResult",
    "Judge",
    "PreparedSAE",
    "SAEBenchError",
    "SAEBenchReport",
    "VarianceExplained",
    "check_data",
    "check_environment",
    "check_saes",
    "data_contents",
    "prepare",
    "run",
    "versions",
]
