"""Command-line options that several tools take."""

import argparse
import math

from mmengine.config import DictAction


def add_config_options(
    parser: argparse.ArgumentParser, help: str = 'override settings of the config'
) -> None:
    """Add --cfg-options."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help=help,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --cfg-options."""
    parser.add_argument(
        '--device', help='such as cpu or cuda:0 (default: a GPU where there is one)'
    )
    add_config_options(parser)


def add_solver_options(parser: argparse.ArgumentParser) -> None:
    """Add --max-steps and --tol."""
    parser.add_argument(
        '--max-steps',
        type=int,
        help="evaluations of f at most (default: the config's evaluation solver)",
    )
    parser.add_argument(
        '--tol', type=float, help="residual to stop at (default: the config's)"
    )


def add_opacity(parser: argparse.ArgumentParser) -> None:
    """Add --opacity."""
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.6,
        help='of the labels of a segmentation (default: %(default)s)',
    )


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    least: dict | None = None,
    needs_tol: str | None = None,
) -> None:
    """Refuse values out of range of the options here, where a tool has them.

    Args:
        parser: Which ends the tool with a sentence.
        args: What it found.
        least: Least value of further integers, by name.
        needs_tol: Why a tolerance of 0, which takes all evaluations, will not do.
    """
    for name, smallest in dict(max_steps=1, **(least or {})).items():
        value = getattr(args, name, None)
        if value is not None and value < smallest:
            option = '--' + name.replace('_', '-')
            parser.error(f'{option} is {value}; it has to be at least {smallest}')
    tol = getattr(args, 'tol', None)
    if tol is not None and needs_tol and not 0 < tol < math.inf:
        parser.error(f'--tol is {tol}; it has to be above 0: {needs_tol}')
    if tol is not None and not 0 <= tol < math.inf:
        parser.error(f'--tol is {tol}; it has to be 0 or more')
    opacity = getattr(args, 'opacity', None)
    if opacity is not None and not 0 < opacity <= 1:
        parser.error(f'--opacity is {opacity}; it has to be above 0, at most 1')
