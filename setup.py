"""Package metadata of keras_squeeze."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "keras_squeeze" / "__init__.py").read_text())[1]

TEST = [
    "pytest>=8",
    "pytest-xdist>=3",
    "pandas>=2",
    "tf_keras>=2.16",  # what tensorflow-model-optimization runs on; only the tests use both
]

setup(
    name="keras_squeeze",
    version=VERSION,
    description="Make Keras 3 models really smaller and really faster, from inside model.fit",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_squeeze", "keras_squeeze.*"]),
    py_modules=["keras_squeeze_launcher"],
    package_data={"keras_squeeze": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    install_requires=[
        "tensorflow>=2.16.2",
        "keras>=3.8",
        "keras-tuner>=1.4.7",
        "tensorboard>=2.16",  # keras-tuner imports it and does not declare it
        "tensorflow-model-optimization>=0.8.0",
        "ai-edge-litert>=1.0",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "optuna>=5,<6",
        "pyyaml>=6",
        "rich>=13",
        "scikit-learn>=1.4",  # its handwritten digits are the data of `keras-squeeze demo`
    ],
    extras_require={"test": TEST, "dev": [*TEST, "ruff>=0.8", "mypy>=1.13"]},
    entry_points={"console_scripts": ["keras-squeeze=keras_squeeze_launcher:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
