"""Whether image files can be loaded, told from their first and last bytes."""

import os
import struct
from contextlib import contextmanager, suppress

import mmcv
import numpy as np
from mmengine import fileio
from PIL import Image, UnidentifiedImageError

# Where EXIF says which way up a photograph is; values that swap its sides.
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)
_HEAD, _TAIL = 4096, 1024
_PNG = b'\x89PNG\r\n\x1a\n'
# Segments of a JPEG file that begin with the sides of the image.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ANN_FILE = 'check ann_file and data_prefix.img_path'


@contextmanager
def reading(path, remedy):
    """Name the file in whatever goes wrong while it is read."""
    try:
        yield
    except FileNotFoundError as error:
        if os.path.islink(path):
            remedy = f'it is a link to {os.readlink(path)}, which is gone; {remedy}'
        raise FileNotFoundError(f'{path} does not exist: {remedy}') from error
    except IsADirectoryError as error:
        raise ValueError(
            f'{path} cannot be read as an image (it is a folder): {remedy}'
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f'{path} claims more than {_most_pixels():,} pixels in its header: replace '
            'the file or cut the image into tiles; if it is sound and as large as '
            'that, raise PIL.Image.MAX_IMAGE_PIXELS'
        ) from error
    except Exception as error:
        reason = 'it is of no known format'
        if not isinstance(error, UnidentifiedImageError):
            reason = str(error).strip().partition('\n')[0] or type(error).__name__
        raise ValueError(
            f'{path} cannot be read as an image ({reason}): replace the file'
        ) from error


def check_image(path, backend=None, loader=None, whole=False):
    """Check that an image file can be loaded.

    The beginning and the end of PNG, JPEG and WebP files are looked at, which takes
    0.02 ms; files of other formats, and those without their end, are decoded. What is
    damaged in the middle is not found so, but by ``whole``.

    Args:
        path (str): The file.
        backend (dict, optional): ``backend_args`` of the data set.
        loader (LoadImageFromFile, optional): What loads it in training.
        whole (bool): Whether to decode any image.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no image, empty, or incomplete.
    """
    with reading(path, ANN_FILE), fileio.get_local_path(path, backend) as local:
        _look(local, loader, whole)


def check_local_image(path, loader=None, whole=False):
    """As :func:`check_image`, for a file of this machine.

    Returns:
        bool: Whether it is a PNG file of 16 bits.
    """
    with reading(path, ANN_FILE):
        return _look(path, loader, whole)


def size_of(path, backend, loader=None):
    """Width and height of an image as it is loaded, after a look at the file."""
    check_image(path, backend, loader)
    with (
        reading(path, ANN_FILE),
        fileio.get_local_path(path, backend) as local,
        Image.open(local) as image,
    ):
        width, height = image.size
        turned = image.format == 'JPEG' and _turns(loader)
        if turned and image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE:
            width, height = height, width
    return width, height


def _turns(loader):
    """Whether a transform turns photographs the way up that EXIF says."""
    backend = getattr(loader, 'imdecode_backend', None) or 'cv2'
    kept = ('unchanged', 'color_ignore_orientation', 'grayscale_ignore_orientation')
    return backend in ('cv2', 'pillow') and (
        getattr(loader, 'color_type', 'color') not in kept
    )


def is_dark_of_sixteen_bits(path):
    """Whether an image of 16 bits becomes almost black where 8 are made of them.

    That is so for 12 bits, of a sensor, in the lower part of 16.

    Args:
        path (str): A PNG file of 16 bits.
    """
    with Image.open(path) as image:
        # Of colours, PIL gives the upper 8 bits.
        limit = 16 if len(image.getbands()) > 1 else 4096
        return 0 < np.asarray(image).max() < limit


def _look(path, loader, whole):
    with open(path, 'rb', buffering=0) as file:
        head = file.read(_HEAD)
        length = os.fstat(file.fileno()).st_size
        tail = head
        if length > len(head):
            file.seek(max(0, length - _TAIL))
            tail = file.read(_TAIL)
    if not head:
        raise ValueError('it is empty')
    if getattr(loader, 'imdecode_backend', None) == 'tifffile':
        # Reads what neither PIL nor OpenCV know.
        return False
    size, ended, sixteen_bits = None, False, False
    if head.startswith(b'\xff\xd8\xff'):
        size, ended = _jpeg_size(head), b'\xff\xd9' in tail
    elif head.startswith(_PNG):
        ended, sixteen_bits = b'IEND' in tail, head[24:25] == b'\x10'
        if len(head) >= 24:
            size = struct.unpack('>II', head[16:24])
    elif head.startswith(b'RIFF') and head[8:12] == b'WEBP':
        ended = length >= 8 + int.from_bytes(head[4:8], 'little')
    if size is not None:
        if not all(size):
            raise ValueError(f'its header says {size[0]}x{size[1]} pixels')
        if size[0] * size[1] > _most_pixels():
            raise Image.DecompressionBombError
    if whole or not ended:
        # Something may have been appended to a whole file.
        _decode(path, loader)
    return sixteen_bits


def _jpeg_size(head):
    """Sides of a JPEG image; None where they stand further back in the file."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        if head[at + 1] in _FRAMES:
            height, width = struct.unpack('>HH', head[at + 5 : at + 9])
            return width, height
        # A byte of filling, or a segment.
        filling = head[at + 1] == 0xFF
        at += 1 if filling else 2 + int.from_bytes(head[at + 2 : at + 4])
    return None


def _decode(path, loader):
    # OpenCV 4 makes grey of what lacks at the end of a JPEG file, and says nothing;
    # formats that PIL does not know are left to the loader.
    with suppress(UnidentifiedImageError), Image.open(path) as image:
        image.load()
    backend = getattr(loader, 'imdecode_backend', None)
    flag = getattr(loader, 'color_type', 'color')
    with open(path, 'rb') as file:
        if mmcv.imfrombytes(file.read(), flag=flag, backend=backend) is None:
            raise UnidentifiedImageError


def _most_pixels():
    """Where PIL takes an image for an attack."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
