"""Where each package lives. Metadata, tools and build system are in pyproject.toml."""

from setuptools import setup

PACKAGE_DIR = {
    "msa_hf": "msa_hf",
    "msa_hf.serving": "msa_hf/serving",
    "msa_hf.store": "msa_hf/store",
    "msa_hf.training": "msa_hf/training",
    "msa_hf.evaluation": "msa_hf/evaluation",
    "msa_hf.kernels": "kernels/torch-ext/msa_kernels",
    "msa_hf.modeling": "modeling",
    "msa_hf.configs": "configs",
    "msa_hf.space_app": "space_app",
}

# Listed by hand: find_packages() would also install tests/ and modeling/ as top-level packages.
setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={
        "msa_hf.configs": ["*.json", "**/*.json", "**/*.jsonl", "**/*.safetensors", "**/*.md"],
        "msa_hf.space_app": ["*.css", "*.md", "*.txt", "examples/*.txt"],
    },
)
