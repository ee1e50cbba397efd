"""Small general data sets that ship: labelled images, tokens, mixtures, and bundles of a bounded
size. They know torch, the errors, and the arithmetic of data/order.py alone."""

from launcher.datasets.bundles import Bundles
from launcher.datasets.image_list import ImageFolder, ListFile
from launcher.datasets.mixture import Mixture
from launcher.datasets.tokens import TokenFile, TokenWindows

__all__ = ["Bundles", "ImageFolder", "ListFile", "Mixture", "TokenFile", "TokenWindows"]
