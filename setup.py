"""Packaging. The kernels live in the top-level folder kernels/ and are packaged as kvlock_fast.kernels.

kvlock_fast/kernels is a committed symlink to ../kernels without an __init__.py: setuptools then sees a plain
namespace package below kvlock_fast, in wheels, sdists and editable installs alike, and a top-level module named
`kernels` (which would hide the Hugging Face package of that name) never exists: tests/project/test_packaging.py.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kvlock_fast/version.py").read_text())[1]
README = ROOT / "README.md"

setup(
    name="kvlock-fast",
    version=VERSION,
    description="Triton-accelerated, training-free video editing with KV-Lock on diffusers' video transformers",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["kvlock_fast", "kvlock_fast.*"]),
    package_data={"": ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.md", "*.png", "*.svg", "py.typed"]},
    entry_points={"console_scripts": ["kvlock-fast = kvlock_fast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "diffusers>=0.42",
        "transformers>=5",
        "accelerate>=1",
        "tokenizers",
        "safetensors>=0.4",
        "numpy>=1.26",
        "av>=18",
        "pillow>=10",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "typer>=0.12",
        "rich>=13",
        "pydantic>=2",
        "filelock>=4.2",
        "psutil>=5.9",
        "prometheus-client>=0.20",
        "scipy>=1.11",
        "xxhash>=3",
        "pyyaml>=6",
        "fsspec>=2024.2",
        "nvtx>=0.2.10",
        "ftfy",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "scikit-image",
            "ruff",
            "basedpyright",
            "peft",
            "torchmetrics",
            "setuptools>=77",
        ],
        "ray": ["ray>=2.40"],
        "s3": ["s3fs"],
        "parquet": ["pyarrow"],
        "flash-attn": ["flash-attn>=2.7; platform_system == 'Linux'"],
    },
)
