"""What the demos of images and of videos share: arguments, model, predictions."""

import argparse
import os.path as osp
import sys

import torch
from mmengine.config import Config
from torch import nn

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))
from common import check_checkpoint_path, fail, find_weights, read_config
from options import add_model_options, add_opacity, add_solver_options, check_options

from mdeq_mm.apis.inference import load_model
from mdeq_mm.apis.solver_settings import set_solver
from mdeq_mm.implicit.layer import equilibrium_layers, recorded
from mdeq_mm.models.implicit_models.equilibrium_report import annotate
from mdeq_mm.registry import name_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what both demos take after their inputs."""
    parser.add_argument(
        'config', help='config file with a test pipeline, or the name of a model'
    )
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file (default: the published weights of a named model; random '
        'ones where there are none)',
    )
    add_solver_options(parser)
    add_opacity(parser)
    add_model_options(parser)


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what no model could work with."""
    check_options(parser, args)
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            parser.error(f'--device {args.device!r} cannot be used: {reason}')
    if args.checkpoint is not None:
        check_checkpoint_path(args.checkpoint)


def read_model_config(args: argparse.Namespace) -> Config:
    """The config that the command line names, with its options.

    Nothing is built; what the demos cannot use ends the program with a sentence.
    """
    cfg = read_config(args.config, args.cfg_options)
    if cfg.get('default_scope') not in ('mmpretrain', 'mmseg'):
        fail(
            f'{args.config!r} is of neither toolbox: it needs default_scope='
            "'mmpretrain' or 'mmseg'."
        )
    if not cfg.get('test_dataloader'):
        fail(f'{args.config!r} has no test_dataloader, whose pipeline the images take.')
    if name_of(cfg.test_dataloader.dataset.type) == 'MultiTaskDataset':
        fail(
            f'{args.config!r} is of joint training: give the config of one of its '
            'tasks, which the joint checkpoint fits too.'
        )
    return cfg


def build_model(args: argparse.Namespace, cfg: Config) -> nn.Module:
    """The model of the command line, in evaluation, with its solver set.

    Raises:
        ImportError | OSError | RuntimeError | ValueError: If the checkpoint cannot be
            used, or --max-steps or --tol is given and the model has no equilibrium.
    """
    checkpoint = find_weights(args.config, args.checkpoint)
    model = load_model(cfg, checkpoint, args.device)
    if checkpoint is None:
        print('No checkpoint is given: the weights are random.', file=sys.stderr)
    if args.max_steps is not None or args.tol is not None:
        set_solver(model, args.max_steps, args.tol)
    return model


@torch.no_grad()
def predict(model: nn.Module, batch: dict) -> list:
    """Predict a batch, and note on the predictions how equilibria were found."""
    with recorded(equilibrium_layers(model)) as solutions:
        samples = model.test_step(batch)
    return annotate(samples, solutions)


def describe(sample) -> str:
    """How the equilibrium of a prediction was found; empty where there is none."""
    if getattr(sample, 'equilibrium_status', None) is None:
        return ''
    return (
        f'residual {sample.equilibrium_residual:.1e}, '
        f'{sample.equilibrium_steps} evaluations, '
        f'{sample.equilibrium_status.replace("_", " ")}'
    )
