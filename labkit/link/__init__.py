"""A link of known delay, loss, rate and buffer between hosts of our own on one machine."""

from labkit.link.leg import Leg
from labkit.link.link import Link

__all__ = ["Leg", "Link"]
