from .fuse_scales import MDEQFuseScales

__all__ = ['MDEQFuseScales']
