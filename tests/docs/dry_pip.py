"""Looks whether what ``pip install`` is given is there, and installs nothing."""

import re
import sys
from pathlib import Path


def check(arguments):
    """Raise SystemExit with a sentence where something is not there."""
    if arguments[:1] != ['install']:
        sys.exit(f'pip {arguments[0]} is not known here')
    extras = re.findall(r"^        '(\w+)': ", Path('setup.py').read_text(), re.M)
    pinned = ''.join(p.read_text() for p in Path('requirements').glob('*.txt'))
    words = iter(arguments[1:])
    for word in words:
        if word in ('-r', '-c'):
            file = next(words)
            if not Path(file).is_file():
                sys.exit(f'there is no file {file}')
        elif word == '--config-settings':
            if next(words) != 'editable_mode=compat':
                sys.exit(f'setuptools knows no {word} of this kind')
        elif word.startswith('-') and word not in (
            *('-e', '--no-deps', '--no-build-isolation'),
        ):
            sys.exit(f'the option {word} is not known here')
        elif '/' in word or word.startswith('.'):
            path, _, extra = word.rstrip(']').partition('[')
            if not (Path(path) / 'setup.py').is_file():
                sys.exit(f'there is no package in {path}')
            if extra and extra not in extras:
                sys.exit(f'setup.py has no extra {extra}')
        elif '==' in word and word not in pinned:
            sys.exit(f'requirements/ pin another version than {word}')


if __name__ == '__main__':
    check(sys.argv[1:])
