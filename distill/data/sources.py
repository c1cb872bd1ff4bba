"""What listers of installed packages import to name an image, and what lists a source; the code is in ``distill.listing``."""

from distill.listing.sources import Found, Lister, list_source

__all__ = ["Found", "Lister", "list_source"]
