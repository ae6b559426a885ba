"""The contract of teachers: what both kinds answer, and which one a method takes where none is given."""

import pytest

from adamerge import LayerWise, Merging, TeacherCache, TeacherFiles, TeachersAhead
from adamerge.errors import ConfigError
from adamerge.objectives import Unchanged
from adamerge.training.teachers import Teachers


def merging(**arguments):
    return Merging(backbone=1, task_vectors=2, parametrization=LayerWise, **arguments)


def test_samples_that_change_have_teachers_that_run_ahead_where_none_are_given():
    assert type(merging().teaching()) is TeacherCache and not TeacherCache.changing
    assert type(merging(views=Unchanged()).teaching()) is TeachersAhead and TeachersAhead.changing
    given = TeacherFiles()
    assert merging(teachers=given).teaching() is given


@pytest.mark.parametrize("kind", [TeacherCache, TeacherFiles, TeachersAhead])
def test_what_leaves_no_files_behind_has_the_same_settings(kind):
    teachers = kind(top=3, dtype="float16")
    other = teachers.in_memory()
    assert isinstance(teachers, Teachers) and other is not teachers and not isinstance(other, TeacherFiles)
    assert (other.top, other.dtype, other.changing) == (3, "float16", kind.changing)
    assert other.told() == "" and other.state_dict() == {} and "forwards" in other.report()


@pytest.mark.parametrize("arguments", [{"top": 1}, {"dtype": "float3"}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="TeacherCache"):
        TeacherCache(**arguments)
