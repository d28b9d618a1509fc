"""Image files of all kinds: damaged ones, and sound ones that look odd."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

SIDE = 32
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
#: Grows to the right in red and downwards in green.
COLOURS = np.stack([COLUMNS * 8, ROWS * 8, 0 * ROWS + 128], axis=2).astype(np.uint8)


def opencv_reads(content):
    """Whether this version of OpenCV makes an image of the bytes of a file."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None


def encoded(image, kind, **options):
    """Bytes of an image file.

    Args:
        image (PIL.Image.Image | ndarray): The image, in RGB.
        kind (str): Its format, as PIL names it.
        **options: Of PIL.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_opencv(suffix, array):
    """Bytes of an image file of more than 8 bits, of RGB or grey."""
    if array.ndim == 3:
        array = array[..., ::-1]
    return cv2.imencode(suffix, np.ascontiguousarray(array))[1].tobytes()


def png_that_says(width, height):
    """A PNG file whose header promises what it does not hold."""

    def chunk(name, content):
        check = struct.pack('>I', zlib.crc32(name + content))
        return struct.pack('>I', len(content)) + name + content + check

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        chunk(*part)
        for part in (
            (b'IHDR', header),
            (b'IDAT', zlib.compress(bytes(100))),
            (b'IEND', b''),
        )
    )


JPEG, PNG = encoded(COLOURS, 'JPEG'), encoded(COLOURS, 'PNG')
BMP, TIFF = encoded(COLOURS, 'BMP'), encoded(COLOURS, 'TIFF')
WEBP, GIF = encoded(COLOURS, 'WEBP'), encoded(COLOURS, 'GIF')


def _half(content):
    return content[: len(content) // 2]


#: From a name to the suffix, the bytes, and a word of the reason.
DAMAGED = {
    'no bytes': ('.jpg', b'', 'it is empty'),
    'one byte': ('.jpg', JPEG[:1], 'no known format'),
    'text': ('.jpg', b'hello\n' * 99, 'no known format'),
    'a page instead': ('.png', b'<html>404 Not Found</html>', 'no known format'),
    'JPEG, only its header': ('.jpg', JPEG[:100], ''),
    'half a JPEG': ('.jpg', _half(JPEG), ''),
    'JPEG without its last byte': ('.jpg', JPEG[:-1], 'truncated'),
    'JPEG whose second half was not written': (
        '.jpg',
        _half(JPEG) + bytes(len(JPEG) - len(JPEG) // 2),
        '',
    ),
    'half a PNG': ('.png', _half(PNG), 'truncated'),
    'half a BMP': ('.bmp', _half(BMP), 'truncated'),
    'half a TIFF': ('.tif', _half(TIFF), 'truncated'),
    'half a WebP, named otherwise': ('.jpg', _half(WEBP), ''),
    'half a GIF, named otherwise': ('.jpg', _half(GIF), 'truncated'),
    'TIFF of fractions': ('.tif', by_opencv('.tif', COLOURS / np.float32(255)), ''),
    'a bomb': ('.png', png_that_says(60000, 60000), 'claims more than'),
    'nothing in it': ('.png', png_that_says(0, 0), '0x0 pixels'),
}

_SIXTEEN = COLOURS.astype(np.uint16) * 257
_ON_ITS_SIDE = Image.Exif()
_ON_ITS_SIDE[0x0112] = 6
_TRANSPARENT = np.dstack([COLOURS, COLUMNS.astype(np.uint8) * 8])
_PALETTE = Image.fromarray(COLOURS).convert('P')
_GREY = np.asarray(Image.fromarray(COLOURS).convert('L'))

#: From a name to the suffix, the bytes, and the pixels that are loaded, as RGB.
SOUND = {
    'JPEG': ('.jpg', JPEG, COLOURS),
    'PNG named JPEG': ('.jpg', PNG, COLOURS),
    'WebP named JPEG': ('.jpg', WEBP, COLOURS),
    'BMP': ('.bmp', BMP, COLOURS),
    'TIFF': ('.tif', TIFF, COLOURS),
    'something appended': ('.jpg', JPEG + bytes(3000), COLOURS),
    'grey': ('.png', encoded(_GREY, 'PNG'), np.dstack([_GREY] * 3)),
    'grey JPEG': ('.jpg', encoded(_GREY, 'JPEG'), np.dstack([_GREY] * 3)),
    'grey with transparency': (
        '.png',
        encoded(Image.fromarray(_TRANSPARENT).convert('LA'), 'PNG'),
        np.dstack([_GREY] * 3),
    ),
    'RGBA': ('.png', encoded(_TRANSPARENT, 'PNG'), COLOURS),
    'palette': ('.png', encoded(_PALETTE, 'PNG'), np.asarray(_PALETTE.convert('RGB'))),
    'one bit': (
        '.png',
        encoded(COLUMNS > ROWS, 'PNG'),
        np.dstack([(COLUMNS > ROWS) * np.uint8(255)] * 3),
    ),
    'CMYK': (
        '.jpg',
        encoded(Image.fromarray(COLOURS).convert('CMYK'), 'JPEG'),
        COLOURS,
    ),
    '16 bits': ('.png', by_opencv('.png', _SIXTEEN), COLOURS),
    '16 bits, grey': (
        '.png',
        by_opencv('.png', _GREY.astype(np.uint16) * 257),
        np.dstack([_GREY] * 3),
    ),
    '16 bits, TIFF': ('.tif', by_opencv('.tif', _SIXTEEN), COLOURS),
    'on its side': (
        '.jpg',
        encoded(COLOURS, 'JPEG', exif=_ON_ITS_SIDE),
        np.rot90(COLOURS, -1),
    ),
    'one pixel': ('.png', encoded(COLOURS[:1, :1], 'PNG'), COLOURS[:1, :1]),
    'moving': (
        '.jpg',
        encoded(
            Image.fromarray(COLOURS),
            'GIF',
            save_all=True,
            append_images=[Image.fromarray(COLOURS[::-1])],
        ),
        COLOURS,
    ),
}
if not opencv_reads(GIF):
    # Before 4.11.
    del SOUND['moving']
