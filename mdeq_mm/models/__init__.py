from .backbones import MDEQ
from .necks import MDEQFuseScales

__all__ = ['MDEQ', 'MDEQFuseScales']
