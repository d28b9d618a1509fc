from .fuse_scales import MDEQFuseScales
from .pool_branches import MDEQPoolBranches

__all__ = ['MDEQFuseScales', 'MDEQPoolBranches']
