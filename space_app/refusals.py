"""What the app says no to."""

from msa_hf.modeling.errors import MSAError


class Refused(MSAError):
    """A request that was not carried out; nothing has changed. The message is for the person who asked."""
