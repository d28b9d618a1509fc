"""Models by name, for the command line and for scripts.

Example:
    python -m mdeq_mm list 'mdeq-*' --task 'image classification'
    python tools/train.py $(python -m mdeq_mm path mdeq-digits)
"""

import argparse
import sys

from .apis import config_path, list_models


def main(argv=None):
    """Print names, or the path of a config."""
    parser = argparse.ArgumentParser(
        prog='python -m mdeq_mm',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    names = commands.add_parser('list', help='print the names of models')
    names.add_argument('pattern', nargs='?', help='with * and ?')
    names.add_argument('--task', help="such as 'semantic segmentation'")
    names.add_argument(
        '--pretrained', action='store_true', help='only those with published weights'
    )
    path = commands.add_parser('path', help='print where the config of a model lies')
    path.add_argument('name', help='name of a model, or path below configs/')
    args = parser.parse_args(argv)
    try:
        if args.command == 'path':
            print(config_path(args.name))
        else:
            for name in list_models(args.pattern, args.task, args.pretrained):
                print(name)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
