from .dropout import channel_mask
from .fusion import MultiscaleFusion
from .multiscale import MultiscaleFunction
from .residual import ResidualBlock

__all__ = ['MultiscaleFunction', 'MultiscaleFusion', 'ResidualBlock', 'channel_mask']
