"""The config's own metrics."""

import logging
from contextlib import contextmanager
from copy import deepcopy

from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import EVALUATOR

from mdeq_mm.engine.metrics import EquilibriumMetric


def build_evaluator(cfg, meta):
    """The config's test evaluator, without what is said of equilibria here anyway.

    Args:
        cfg (Config): With ``test_evaluator``.
        meta (dict): Of the data set.
    """
    wanted = deepcopy(cfg.test_evaluator)
    if isinstance(wanted, dict) and 'metrics' in wanted:
        evaluator = EVALUATOR.build(dict(type='Evaluator') | wanted)
    else:
        evaluator = Evaluator(wanted)
    evaluator.metrics = [
        m for m in evaluator.metrics if not isinstance(m, EquilibriumMetric)
    ]
    evaluator.dataset_meta = meta
    return evaluator


def shown(metrics):
    """Names of the metrics that tables and pictures show: top-1 or mIoU, or one."""
    found = [k for k in metrics if k.split('/')[-1] in ('top1', 'mIoU')]
    return found or list(metrics)[:1]


@contextmanager
def quiet():
    """Keep metrics from logging, as some do a table each."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
