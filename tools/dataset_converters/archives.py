"""What the converters of archives share: safe reading, and a folder that appears whole.

Nothing is extracted to the names that an archive gives, so that no member can be
written outside of the destination.
"""

import argparse
import lzma
import os
import os.path as osp
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator


class ConversionError(Exception):
    """Says why the archive cannot be converted, and what to do."""


def read_members(
    src: str, wanted: re.Pattern, foreign: str, ignored: re.Pattern | None = None
) -> Iterator[tuple[re.Match, bytes]]:
    """Yield (match of the name, bytes) of the files in an archive, in its order.

    Args:
        src (str): The archive.
        wanted (re.Pattern): Names that it may hold.
        foreign (str): Ends the sentence on a member that is neither wanted nor
            ignored: what holds no such member, and what to give instead.
        ignored (re.Pattern, optional): Names that are passed over, as folders are.

    Raises:
        ConversionError: If the archive holds anything else, or damaged bytes.
    """
    try:
        with tarfile.open(src) as archive:
            for member in archive:
                name = osp.normpath(member.name)
                if member.isdir() or (ignored and ignored.fullmatch(name)):
                    continue
                match = wanted.fullmatch(name)
                if not member.isreg() or not match:
                    raise ConversionError(
                        f'{src} holds {member.name!r}, which {foreign}'
                    )
                yield match, archive.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ConversionError(
            f'{src} could not be unpacked ({error}): get the archive again.'
        ) from error


def convert(
    src: str,
    dst: str,
    force: bool,
    write: Callable[[str], None],
    faults: Callable[[str], list[str]],
) -> bool:
    """Convert an archive to a folder, which appears when all is complete.

    Args:
        src (str): The archive.
        dst (str): The folder to be made.
        force (bool): Replace ``dst`` where it exists.
        write (Callable): Fills the folder that it is given.
        faults (Callable): Says of a folder what it has too much or too little of,
            a phrase each; nothing where it is complete.

    Returns:
        bool: False where ``dst`` was complete and nothing was done.

    Raises:
        ConversionError: If the archive is not what it should be, or ``dst`` is in
            the way. ``dst`` is then as it was.
    """
    if osp.lexists(dst) and not force:
        if not osp.isdir(dst):
            raise ConversionError(f'{dst} is in the way: it is not a folder.')
        if os.listdir(dst):
            wrong = faults(dst)
            if not wrong:
                return False
            raise ConversionError(
                f'{dst} exists and is not complete ({wrong[0]}): name another folder, '
                'or replace it with --force.'
            )
    if not osp.isfile(src):
        raise ConversionError(f'the archive {src} does not exist.')

    dst = osp.abspath(dst)
    partial = f'{dst}.partial'
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    try:
        write(partial)
    except OSError as error:
        raise ConversionError(
            f'{src} could not be unpacked ({error}): get the archive again, or make '
            'room on the disk.'
        ) from error
    wrong = faults(partial)
    if wrong:
        more = f', and {len(wrong) - 1} more such faults' if len(wrong) > 1 else ''
        raise ConversionError(f'{src} is not complete: {wrong[0]}{more}.')
    replace(partial, dst)
    return True


def replace(new: str, dst: str) -> None:
    """Put a folder in the place of another, which is removed only after that."""
    aside = tempfile.mkdtemp(prefix=f'{osp.basename(dst)}.old-', dir=osp.dirname(dst))
    old = osp.join(aside, osp.basename(dst))
    if osp.lexists(dst):
        os.rename(dst, old)
    try:
        os.rename(new, dst)
    except OSError:
        if osp.lexists(old):
            os.rename(old, dst)
        raise
    shutil.rmtree(aside)


def run(
    doc: str, dst: str, convert: Callable[[str, str, bool], bool], contents: str
) -> str:
    """Read the command line, convert, and print whether anything had to be done.

    Args:
        doc (str): What --help says.
        dst (str): Default of the destination.
        convert (Callable): As :func:`convert`, of (src, dst, force).
        contents (str): What a complete folder holds.

    Returns:
        str: The destination.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('src', metavar='SRC', help='the archive')
    parser.add_argument(
        'dst', metavar='DST', nargs='?', default=dst, help='%(default)s'
    )
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    args = parser.parse_args()
    try:
        converted = convert(args.src, args.dst, args.force)
    except (ConversionError, OSError) as error:
        sys.exit(f'{parser.prog}: error: {error}')
    state = 'is complete' if converted else 'was complete already, nothing was done'
    print(f'{args.dst} {state}: {contents}.')
    return args.dst
