"""Trained models of the demo on their test sets."""

import contextlib
import io
import logging
import warnings

import torch
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from mdeq_mm.analysis.saved_bytes import saved_bytes_per_image
from mdeq_mm.checkpoints import allow_runner_checkpoints


class Trained:
    """A model as its training left it, in evaluation mode.

    Args:
        training (Training): What was trained.

    Attributes:
        model (nn.Module): The model.
        loader (DataLoader): Batches of the test set.
        evaluator (Evaluator): The metrics of the test.
        layer (EquilibriumLayer | None): The equilibrium of an MDEQ.
    """

    def __init__(self, training):
        self.cfg = cfg = Config.fromfile(training.config)
        cfg.work_dir = str(training.work_dir / 'evaluation')
        cfg.test_dataloader.dataset.data_root = str(training.data_root)
        cfg.load_from = find_latest_checkpoint(str(training.work_dir))
        cfg.log_level = logging.ERROR
        # The original mmengine does not load them otherwise.
        allow_runner_checkpoints()
        # mmengine prints where it loads from whatever the log level is, and the
        # toolboxes warn of hooks that draw nothing and of a second runner.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            runner = Runner.from_cfg(cfg)
            runner.load_or_resume()
            self.loader = runner.test_dataloader
            self.evaluator = runner.build_evaluator(cfg.test_evaluator)
        self.evaluator.dataset_meta = self.loader.dataset.metainfo
        self.model = runner.model.eval()
        self.layer = getattr(self.model.backbone, 'equilibrium', None)

    @property
    def parameters(self):
        """int: Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def predict(self):
        """Predict the test set.

        Yields:
            tuple[dict, list]: A batch, and its samples with predictions.
        """
        for batch in self.loader:
            with torch.no_grad():
                yield batch, self.model.test_step(batch)

    def kept_bytes(self, side):
        """Bytes an image that training keeps for the backward pass.

        Batch norms take in what passes through them here: call it last.

        Args:
            side (int): Of an image, in pixels.
        """
        size = (self.cfg.model.backbone.in_channels, side, side)
        device = next(self.model.parameters()).device
        self.model.train()
        return saved_bytes_per_image(
            lambda n: self.model(torch.rand(n, *size, device=device), mode='tensor')
        )
