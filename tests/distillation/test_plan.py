"""What a teacher adds to the plan of a run: its files, its hidden states, its working memory."""

import pytest
import tiny_data

from pyloss.distillation.hidden import HiddenStates
from pyloss.distillation.loss import DistillationLoss
from pyloss.distillation.on_policy import OnPolicyLoss
from pyloss.distillation.stored import StoredTeacher, write_teacher
from pyloss.tuner.run.plan import BatchShape, estimate_memory, forward_bytes, stored_bytes


@pytest.fixture
def models(tmp_path):
    return tiny_data.models(tmp_path, num_hidden_layers=4, hidden_size=16, head_dim=4)


def test_parts_of_the_estimate(models):
    student, teacher = models
    alone = estimate_memory(student, 4, 64)
    needs = DistillationLoss(teacher).beside(student, BatchShape.of(4, 64))
    assert needs.stored == stored_bytes(teacher) and needs.columns == 29
    assert needs.first == forward_bytes(teacher, 256)
    found = estimate_memory(student, 4, 64, loss=DistillationLoss(teacher))
    head = 4 * 29 * 256
    assert found == alone + needs.stored + needs.kept + head
    mixed = estimate_memory(student, 4, 64, loss=DistillationLoss(teacher, alpha=0.5))
    assert mixed == found + head


def test_a_teacher_whose_layers_are_larger_than_the_students_passes(models):
    student, teacher = models
    loss = DistillationLoss(teacher)
    small = estimate_memory(student, 4, 64, loss=loss)
    teacher.config.intermediate_size = 64_000
    assert estimate_memory(student, 4, 64, loss=loss) > small + 4 * 256 * 100_000


def test_projections_are_trained_too(models):
    student, teacher = models
    loss = DistillationLoss(teacher, hidden=HiddenStates(student, teacher, "mse", "1:0,2:2"))
    plain = estimate_memory(student, 1, 64, loss=DistillationLoss(teacher))
    slots = [estimate_memory(student, 1, 64, optimizer_slots=n, loss=loss) for n in (1, 2)]
    own = sum(array.size for array in student.trainable_parameters().values())
    assert slots[1] - slots[0] == 4 * (own + 2 * 16 * 32)
    assert slots[1] > plain + 4 * (2 * 16 * 32) * 5


def test_answers_of_the_student_take_their_cache(models):
    student, teacher = models
    short, long = (
        OnPolicyLoss(DistillationLoss(teacher), None, 0.5, most).beside(
            student, BatchShape.of(4, 64)
        )
        for most in (8, 4096)
    )
    assert long.first >= student.cache_bytes([64 + 4096] * 4) > short.first


def test_a_stored_teacher_takes_its_shards(models, tmp_path):
    student, teacher = models
    data = tiny_data.data()
    write_teacher(teacher, data, tmp_path / "stored", top_k=4)
    stored = StoredTeacher(tmp_path / "stored")
    files = sum(p.stat().st_size for p in (tmp_path / "stored").glob("*.safetensors"))
    loss = DistillationLoss(stored)
    assert loss.beside(student, BatchShape.of(1, 12)).stored == files
    assert estimate_memory(student, 1, 12, loss=loss) == (
        estimate_memory(student, 1, 12) + files + 32 * 12 * 4
    )


def test_layers_below_the_trained_ones_are_noted(models):
    student, teacher = models
    for module in student.layers[:2]:
        module.freeze()
    loss = DistillationLoss(teacher, hidden=HiddenStates(student, teacher, "mse", "0:0,1:1,2:2"))
    assert loss.plan_notes(student) == [
        "hidden states of the student's layers 0, 1 are below the first trained layer: "
        "their distance changes nothing"
    ]
    loss = DistillationLoss(teacher, hidden=HiddenStates(student, teacher, "mse", "2:2"))
    assert loss.plan_notes(student) == [] == DistillationLoss(teacher).plan_notes(student)
