"""Two minutes of training hold no more at their end than at their start. They go on beside the other tests, from the first one on.

Two hours: `python watched_run.py 7200 60 FOLDER`, in this folder.
"""

from dataclasses import replace

import pytest
from watched_run import Sample, assert_steady, samples_in


def test_two_minutes_of_training_take_no_more_memory_files_or_threads(watched_run):
    assert_steady(samples_in(watched_run), warm_up=30, megabytes=20)


STEADY = [Sample(wall=10.0 * i, cpu=9.0 * i, steps=100 * i, memory=700, files=11, threads=7) for i in range(1, 8)]


def test_growth_is_seen():
    assert_steady(STEADY, warm_up=30, megabytes=20)
    for change in ({"memory": 721.0}, {"files": 12}, {"threads": 8}, {"steps": 0}):
        with pytest.raises(AssertionError):
            assert_steady([*STEADY[:-1], replace(STEADY[-1], **change)], warm_up=30, megabytes=20)
