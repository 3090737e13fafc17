"""Installs `configs/` as data of the package `mu`. All else about the package is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["mu", "mu.*"]), "mu.configs"], package_dir={"mu.configs": "configs"})
