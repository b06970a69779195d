"""Stored teachers: a teacher's probabilities of a dataset's targets, in a folder."""

from pyloss.distillation.stored.teacher import StoredTeacher
from pyloss.distillation.stored.writer import write_teacher

__all__ = ["StoredTeacher", "write_teacher"]
