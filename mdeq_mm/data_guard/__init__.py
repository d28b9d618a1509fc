"""Checks of data sets before hours are spent on them, and stand-ins for the bad."""

from .classes import check_class_order
from .data_guard_hook import DataGuardHook
from .datasets import check_dataset, examine, leaves
from .findings import Findings, Problem
from .heads import check_outputs, check_windows, expected_labels
from .images import check_image
from .processes import check_processes_agree
from .replacement import guard_samples, replace_samples, replaced_in
from .samples import SampleCheck

__all__ = [
    'DataGuardHook',
    'Findings',
    'Problem',
    'SampleCheck',
    'check_class_order',
    'check_dataset',
    'check_image',
    'check_outputs',
    'check_processes_agree',
    'check_windows',
    'examine',
    'expected_labels',
    'guard_samples',
    'leaves',
    'replace_samples',
    'replaced_in',
]
