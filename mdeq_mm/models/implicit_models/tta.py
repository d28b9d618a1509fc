"""Test-time augmentation that tells of the equilibria of all versions of an image."""

from ...implicit import Status
from ...registry import MODELS
from .lazy import LazySubclass


class _WorstOfAll:
    def merge_preds(self, data_samples_list):
        """Merge the predictions for the versions of each image.

        Args:
            data_samples_list (list[list[BaseDataElement]]): Of each image, those of
                its versions.

        Returns:
            list[BaseDataElement]: With the worst residual and status of the
            versions, and the sum of their evaluations.
        """
        found = [_worst(samples) for samples in data_samples_list]
        merged = super().merge_preds(data_samples_list)
        for sample, fields in zip(merged, found, strict=True):
            for name, value in fields.items():
                sample.set_field(value, name)
        return merged


def _worst(samples):
    if any('equilibrium_status' not in sample for sample in samples):
        return {}
    status = max(Status[s.equilibrium_status.upper()] for s in samples)
    return dict(
        equilibrium_residual=max(s.equilibrium_residual for s in samples),
        equilibrium_status=status.name.lower(),
        equilibrium_steps=sum(s.equilibrium_steps for s in samples),
    )


@MODELS.register_module()
class ImplicitClsTTAModel(_WorstOfAll, LazySubclass):
    """mmpretrain's ``AverageClsScoreTTA`` whose predictions tell the worst residual."""

    _parent = 'mmpretrain.models.AverageClsScoreTTA'


@MODELS.register_module()
class ImplicitSegTTAModel(_WorstOfAll, LazySubclass):
    """mmseg's ``SegTTAModel`` whose predictions tell the worst residual."""

    _parent = 'mmseg.models.SegTTAModel'
