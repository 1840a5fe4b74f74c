"""What is installed: the package, its kernel, and the libraries it needs. Tool settings stand in pyproject.toml."""

import re
from pathlib import Path

import jaxlib
from setuptools import Extension, find_packages, setup

# The sparse sum, ranking and what saves memory on CPUs. Without a C++ compiler the installation goes through all the
# same, and what JAX has, half as fast, takes their place.
KERNELS = Extension(
    "fused_rec.kernels._compiled",
    sources=[
        f"fused_rec/kernels/{name}.cc"
        for name in ("sparse_sum", "ranking", "attention", "layers", "dense", "buffers", "cross_entropy", "products")
    ],
    depends=[f"fused_rec/kernels/{name}.h" for name in ("lanes", "parts", "tiles")],
    include_dirs=[str(Path(jaxlib.__file__).with_name("include"))],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-w"],  # -g0: compiles a quarter faster; -w: the headers warn
    language="c++",
    optional=True,
)

INIT = Path(__file__).with_name("fused_rec").joinpath("__init__.py")
[VERSION] = re.findall(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="fused_rec",
    version=VERSION,
    description="Recommends financial products from text and a heterogeneous graph, trained together in JAX.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # experiments/ stays out: its name would claim a top-level module of every environment. Its commands are in
    # fused_rec/commands, which is installed.
    packages=find_packages(include=["fused_rec", "fused_rec.*"]),
    package_data={"fused_rec": ["py.typed", "explanation/locale/*"]},
    entry_points={"console_scripts": ["fused-rec = fused_rec.cli:main"]},
    ext_modules=[KERNELS],
    zip_safe=False,
    # Lower bounds are the oldest versions that the test suite passed with, all of them together.
    install_requires=[
        "absl-py>=2.1",
        "flatbuffers>=25.12",  # jax.export serialises with it, and does not ask for it
        "flax>=0.12.7",
        "huggingface_hub>=1.3",
        "jax>=0.10.0",
        "jaxtyping>=0.3.3",
        "jraph==0.0.6.dev0",  # the last release, and a pre-release: without the pin pip looks for an older one
        "ml_collections>=1.0",
        "numpy>=2.1",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0",
        "packaging>=24.2",
        "pyarrow>=18.0",
        "safetensors>=0.6.2",
        "scikit-learn>=1.5",
        "scipy>=1.14.1",
        "tensorboardX>=2.6.2.2",
        "tqdm>=4.66",
        "tokenizers>=0.22.1",
        "transformers>=5.3",  # earlier ones could run code that a model folder names
    ],
    extras_require={
        "als": ["implicit>=0.7.2", "threadpoolctl>=3.1"],  # one baseline alone needs them
        "tests": [
            "axe-playwright-python>=0.1.8",  # drives an installed browser; brings axe, which checks accessibility
            "babel>=2.17",  # compiles message catalogs
            "beartype>=0.22.1",
            "build>=1.2",
            "httpx>=0.28.1",  # asks the server as clients do
            "hypothesis>=6.100",
            "ir-measures>=0.4",
            "pandas>=2.2.3",  # frames that tests hand over, as polars'
            "polars>=1.20",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.4",
            "pytest-xdist>=3.6.1",
            "ruff>=0.15",
        ],
        "faiss": ["faiss-cpu>=1.15"],  # an index in exports, and `recommend --index=ivf`
        "serve": [
            "prometheus-client>=0.26",  # metrics in the text format that Prometheus reads
            "starlette>=1.10",  # routes, requests and responses of the ASGI application
            "uvicorn>=0.54",  # the HTTP server; without [standard], whose parts in C are not needed
        ],
        "docs": ["furo>=2024.8", "myst-nb>=1.2", "sphinx>=8.0"],
        "plots": ["matplotlib>=3.9"],
        "notebooks": [
            "ipykernel>=6.29",
            "ipywidgets>=8.1",  # without it libraries warn that they cannot draw their progress
            "jinja2>=3.1",  # pandas shows formatted tables with it
            "jupytext>=1.16",
            "matplotlib>=3.9",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "optuna>=5.0",
            "pandas>=2.2.3",
        ],
        "sweeps": ["optuna>=5.0"],
        "wandb": ["wandb>=0.31"],
        "parity": ["torch>=2.6"],  # stores the reference vectors that the encoders are tested against
    },
)
