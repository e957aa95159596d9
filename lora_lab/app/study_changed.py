"""Whether a study that was registered is still what its file says."""

from __future__ import annotations

from lora_lab.app.locations import sweep_folders
from lora_lab.errors import InputError
from lora_lab.plan.shown_study import file_name
from lora_lab.plan.study_file import find_study
from lora_lab.plan.study_file import read_study as read_file
from lora_lab.record.registration import check_unchanged, read_registration
from lora_lab.record.study_folder import StudyRecord


def refuse_changed(asked: StudyRecord) -> None:
    """Nothing, where the study was not registered or no file of sweeps/ bears its name any more.

    Raises:
        InputError: a criterion, grid or seed differs from what was registered, in the study's file or in the copy that
            lies with its runs. DataError: the registration is damaged.
    """
    known = read_registration(asked.folder)
    if known is None:
        return
    try:
        path = find_study(file_name(asked.name, known.scale), sweep_folders())
    except InputError:
        path = None
    if path is not None:
        check_unchanged(known, read_file(path))
    if asked.study is not None:
        check_unchanged(known, asked.study)
