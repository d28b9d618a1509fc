"""Packaging of mdeq_mm."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_version():
    """Read the version without importing the package, which needs torch."""
    text = (ROOT / 'mdeq_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE).group(1)


def read_requirements(name):
    """Read ``requirements/<name>.txt`` without its comments and empty lines."""
    text = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8')
    lines = (line.split('#')[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


class BuildWithConfigs(build_py):
    """Ship configs, tools and model index under ``mdeq_mm/.mim``.

    That is where OpenMMLab's packages keep theirs, so that a user of the wheel
    finds them without a checkout. An editable install has the checkout itself.
    """

    SHIPPED = ('configs', 'tools', 'model-index.yml')

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'mdeq_mm', '.mim')
        # An earlier build may have left files there that are no more.
        shutil.rmtree(target, ignore_errors=True)
        for name in self.SHIPPED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '.*_cache', '*.pyc')
                shutil.copytree(
                    source, target / name, ignore=ignore, dirs_exist_ok=True
                )
            elif source.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / name)


readme = ROOT / 'README.md'

setup(
    name='mdeq_mm',
    version=read_version(),
    description='Multiscale deep equilibrium models for the OpenMMLab toolboxes',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, deep equilibrium models, implicit models, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mdeq_mm', 'mdeq_mm.*']),
    python_requires='>=3.11',
    install_requires=read_requirements('runtime'),
    extras_require={
        # The pip that comes with Python 3.11 cannot read '===' beside an extra.
        'onedl': [line.replace('===', '==') for line in read_requirements('onedl')],
        'demo': read_requirements('demo'),
        'deployment': read_requirements('deployment'),
        'docs': read_requirements('docs'),
        'tests': read_requirements('tests'),
    },
    cmdclass={'build_py': BuildWithConfigs},
    zip_safe=False,
)
