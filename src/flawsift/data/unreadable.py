"""The reason why one image cannot be used."""

from flawsift.errors import InputError


class UnreadableImage(InputError):
    """One image cannot be decoded; the text is the reason without the path."""
