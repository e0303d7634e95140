"""The contracts of all that plugins bring, written once and run by everyone: ours and each plugin's.

    def test_my_sampler():
        check_scheduler(MINE)

Plain functions that raise AssertionError and say which promise is broken; they need no pytest and no
checkpoint.
"""

from batchsd.testing.schedulers import check_scheduler, consistency, posterior_mean
from batchsd.testing.scores import check_filter, check_score, example_pictures
from batchsd.testing.sinks import check_sink, example_records, example_schema
from batchsd.testing.tasks import TinyModel, check_task, example_request

__all__ = [
    "TinyModel",
    "check_filter",
    "check_scheduler",
    "check_score",
    "check_sink",
    "check_task",
    "consistency",
    "example_pictures",
    "example_records",
    "example_request",
    "example_schema",
    "posterior_mean",
]
