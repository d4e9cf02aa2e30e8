"""Weights of timm's own CoAtNets, as those of the others."""

from glocal.models.keys.coatnet import SOURCES

__all__ = ["SOURCES"]
