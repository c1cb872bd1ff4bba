"""Where an image lies, and how its bytes are read, for listers of installed packages; the code is in ``distill.listing``."""

from distill.listing.locations import Kind, Location, Reader

__all__ = ["Kind", "Location", "Reader"]
