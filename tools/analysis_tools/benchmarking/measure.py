"""Times, counts and kept bytes of one model."""

import statistics
import time

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mdeq_mm.analysis.saved_bytes import saved_bytes_per_image

PARTS = ('forward', 'backward', 'step', 'inference')
#: Batch sizes whose difference gives the bytes kept an image.
BATCHES = (2, 3)


def clock(settings):
    """Seconds, once everything that was asked of a GPU is done."""
    if settings.on_gpu:
        torch.cuda.synchronize(settings.device)
    return time.perf_counter()


class Subject:
    """A model that is measured.

    Args:
        case (Case): What to build.
        settings (Settings): Of the run.
    """

    def __init__(self, case, settings):
        self.case, self.settings = case, settings
        model = case.build(settings)
        self.model = model.to(settings.device, memory_format=settings.memory_format)
        # A rate of zero does the work of a step and leaves f contractive.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.images = settings.images(settings.batch)
        self.labels = torch.arange(settings.batch, device=settings.device)
        self.seconds = {part: [] for part in PARTS}

    @property
    def layer(self):
        """EquilibriumLayer | None: Of an MDEQ, also where torchdeq drives it."""
        layer = getattr(self.model.backbone, 'equilibrium', None)
        return getattr(layer, 'layer', layer)

    def logits(self, images):
        """Run the model as it is set, (N, classes)."""
        with self.settings.autocast():
            return self.model(images, mode='tensor')

    def loss(self):
        return F.cross_entropy(self.logits(self.images).float(), self.labels)

    def step(self):
        """One training step.

        Returns:
            dict[str, float]: Seconds of ``forward``, ``backward``, and the ``step``
            with them.
        """
        self.model.train()
        begin = clock(self.settings)
        loss = self.loss()
        middle = clock(self.settings)
        loss.backward()
        end = clock(self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        last = clock(self.settings)
        return dict(forward=middle - begin, backward=end - middle, step=last - begin)

    @torch.no_grad()
    def infer(self):
        """One inference; returns seconds."""
        self.model.eval()
        begin = clock(self.settings)
        self.logits(self.images)
        return clock(self.settings) - begin

    def time_once(self):
        """Add one measurement of everything."""
        found = self.step() | dict(inference=self.infer())
        for part, seconds in found.items():
            self.seconds[part].append(seconds)

    def medians(self):
        """dict[str, float]: Median seconds of each part."""
        return {p: statistics.median(s) for p, s in self.seconds.items()}

    def counts(self):
        """What does not depend on the machine.

        Returns:
            dict: ``parameters``; ``kept``, bytes an image; ``flops`` of inference an
            image; for an MDEQ, calls of f in a training step (``forward``,
            ``again`` in the backward pass), ``products`` with the Jacobian there,
            calls in inference (``evaluations``) and the relative ``residual`` after
            them, the largest of the batch.
        """
        found = dict(
            parameters=sum(p.numel() for p in self.model.parameters()),
            kept=self._kept(),
            forward=None,
            again=None,
            products=None,
            evaluations=None,
            residual=None,
        )
        if self.layer is not None:
            found |= self._evaluations()
        self.model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.logits(self.images)
        found['flops'] = counter.get_total_flops() / self.settings.batch
        return found

    def _kept(self):
        self.model.train()
        images = self.settings.images(max(BATCHES))
        return saved_bytes_per_image(lambda n: self.logits(images[:n]), BATCHES)

    def _evaluations(self):
        count = _Count()
        layer = self.layer
        original = layer.equation

        def counted(*args, **kwargs):
            equation = original(*args, **kwargs)
            equation.function = count.wrap(equation.function)
            return equation

        layer.equation = counted
        try:
            self.model.train()
            loss = self.loss()
            found = dict(forward=count.calls)
            count.calls = 0
            loss.backward()
            found |= dict(again=count.calls, products=count.products)
            self.optimizer.zero_grad()
            count.calls = 0
            self.model.eval()
            with torch.no_grad():
                self.logits(self.images)
        finally:
            del layer.equation
        solution = self.model.backbone.last_solution
        return found | dict(
            evaluations=count.calls, residual=float(solution.residual.max())
        )


class _Count:
    """Counts calls of f, and backward passes through it."""

    def __init__(self):
        self.calls = self.products = 0

    def wrap(self, function):
        def counted(z, tensors):
            self.calls += 1
            out = function(z, tensors)
            if out.requires_grad:
                out.register_hook(self._passed)
            return out

        return counted

    def _passed(self, grad):
        self.products += 1
