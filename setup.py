from setuptools import find_packages, setup

setup(
    name="ldm",
    version="0.1.0",
    description="Train and use a latent text-to-image model: every stage, on one machine or many",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ldm", "ldm.*", "data_pipeline", "data_pipeline.*"]),
    install_requires=[
        "torch>=2.10",
        "open_clip_torch>=3.3",
        "transformers>=5.6",
        "accelerate>=1.10",
        "omegaconf>=2.3",
        "webdataset>=1.0",
        "safetensors>=0.6",
        "numpy>=2.0",
        "scipy>=1.13",
        "pillow>=12.3",
        "typer>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["xformers", "bitsandbytes"],
        "data": ["fonttools>=4.50"],
        "eval": ["torchmetrics>=1.9"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "dev": ["diffusers>=0.42", "psutil", "pytest>=9", "pytest-timeout", "pytest-xdist", "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["ldm = ldm.cli.main:main"]},
)
