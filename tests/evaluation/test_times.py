"""How long a run took, from its stages."""

from vce_ray.evaluation.times import span, working_seconds


def test_stages_that_overlap_count_once_and_pauses_do_not():
    together = [{"started": 100.0, "seconds": 30.0}, {"started": 100.0, "seconds": 20.0}]
    inside, after = {"started": 110.0, "seconds": 5.0}, {"started": 200.0, "seconds": 50.0}
    running = {"started": 260.0}
    stages = [after, running, *together, inside]
    assert span(stages) == (100.0, 260.0)
    assert working_seconds(stages) == 80.0


def test_a_run_without_stages_took_no_time():
    assert span([]) is None and working_seconds([]) == 0
