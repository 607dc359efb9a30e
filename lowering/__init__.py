"""Lowerings: importing this package registers the launchers of every operator that has generated kernels."""

from effcompile.lowering import cpp, triton  # noqa: F401
