"""How long tests wait for what should come at once."""

__all__ = ["SOON"]

# Seconds after which a test gives up; so many that no other load of the machine makes it wrong.
SOON = 60.0
