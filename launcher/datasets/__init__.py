"""Small general data sets that ship: labelled images, and tokens. They know torch and the errors
alone."""

from launcher.datasets.image_list import ListFile
from launcher.datasets.tokens import TokenFile

__all__ = ["ListFile", "TokenFile"]
