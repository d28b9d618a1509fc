"""What all models of one run have in common."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """Options of a run; numbers and texts only, to be handed to other processes.

    Attributes:
        size (str): Arch of the MDEQ.
        batch (int): Images a batch.
        image (int): Side of the images, in pixels.
        device (str): Such as ``'cpu'`` or ``'cuda:0'``.
        dtype (str): ``'fp32'``, or ``'bf16'`` for autocast.
        threads (int): Threads of PyTorch.
        tol (float): Tolerance of the solvers in training; 0 makes all evaluations.
        eval_tol (float): The same in inference.
        channels_last (bool): Memory format of weights and images.
        compile (bool): Whether f and the peers' backbones are compiled.
        weights (str): Checkpoint with a contractive MDEQ.
    """

    size: str = 'small'
    batch: int = 2
    image: int = 224
    device: str = 'cpu'
    dtype: str = 'fp32'
    threads: int = 1
    tol: float = 0.0
    eval_tol: float = 1e-2
    channels_last: bool = False
    compile: bool = False
    weights: str = ''

    @property
    def on_gpu(self):
        """bool: Whether the device works beside the process, as GPUs do."""
        return torch.device(self.device).type == 'cuda'

    @property
    def memory_format(self):
        """torch.memory_format: Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self):
        """Context in which the models run."""
        if self.dtype == 'fp32':
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def images(self, count, seed=0):
        """Random images, (count, 3, H, W), the same in every run."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, self.image, self.image, generator=generator)
        return images.to(self.device, memory_format=self.memory_format)
