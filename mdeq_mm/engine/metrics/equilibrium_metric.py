"""How the solves of an evaluation ended."""

import numpy as np
from mmengine.evaluator import BaseMetric

from ...registry import METRICS

FIELDS = ('equilibrium_residual', 'equilibrium_status', 'equilibrium_steps')


@METRICS.register_module()
class EquilibriumMetric(BaseMetric):
    """Residuals, evaluations and converged share, beside accuracy or mIoU.

    Results: ``equilibrium/residual`` (median over the images),
    ``equilibrium/residual_p95``, ``equilibrium/evaluations`` (mean evaluations of f an
    image) and ``equilibrium/converged`` (share of the images, in percent). The model
    has to be of type ImplicitImageClassifier, ImplicitEncoderDecoder or MultiTaskMDEQ.

    Args:
        collect_device (str): ``'cpu'`` or ``'gpu'``.
        prefix (str, optional): In place of ``'equilibrium'``.

    Raises:
        TypeError: If ``prefix`` is no text.
        ValueError: If ``collect_device`` is unknown, or predictions do not tell of
            their equilibrium.
    """

    default_prefix = 'equilibrium'

    def __init__(self, collect_device='cpu', prefix=None):
        if collect_device not in ('cpu', 'gpu'):
            raise ValueError(
                f"collect_device={collect_device!r} is unknown: use 'cpu' or 'gpu'"
            )
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f'prefix must be a text or None, got {prefix!r}')
        super().__init__(collect_device, prefix)

    def process(self, data_batch, data_samples):
        """Take in the predictions of one batch.

        Args:
            data_batch (dict): The batch.
            data_samples (Sequence[dict]): Predictions.
        """
        for sample in data_samples:
            if any(field not in sample for field in FIELDS):
                raise ValueError(
                    f'EquilibriumMetric needs predictions with {FIELDS[0]}, and these '
                    'have none: use a model of type ImplicitImageClassifier, '
                    'ImplicitEncoderDecoder or MultiTaskMDEQ with an MDEQ backbone, '
                    'and tta_model.type ImplicitClsTTAModel or ImplicitSegTTAModel'
                )
            self.results.append(tuple(sample[field] for field in FIELDS))

    def compute_metrics(self, results):
        """Compute the figures.

        Args:
            results (list[tuple]): Residual, status and evaluations of each image.

        Returns:
            dict[str, float]: See above.
        """
        residuals, statuses, steps = zip(*results, strict=True)
        # Not interpolated: a residual may be infinite.
        p95 = np.quantile(residuals, 0.95, method='higher')
        return dict(
            residual=float(np.median(residuals)),
            residual_p95=float(p95),
            evaluations=float(np.mean(steps)),
            converged=100 * statuses.count('converged') / len(statuses),
        )
