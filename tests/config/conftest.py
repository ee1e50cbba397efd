"""No deadline for an example: the machine may be busy with other things."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
