"""A strategy as a type: for type checkers Lightning's, and nothing to import."""

from running import ROOT, child


def test_the_cache_of_teachers_is_read_without_lightning():
    script = "import sys, adamerge; adamerge.TeacherFiles; print('lightning' in sys.modules)"
    assert child(["-c", script], ROOT).stdout.split() == ["False"]
